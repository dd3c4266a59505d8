"""What a chat template shows of tools, and how it writes calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engines.chat import Chat
from engines.errors import ChatError
from schemas.task import ChatMessage

QWEN = (  # as Qwen 2.5 writes them, a little shortened
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}"
    "{{ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'assistant' and message.tool_calls %}"
    "{{ '<|im_start|>' + message.role }}{% if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{% for tool_call in message.tool_calls %}{% if tool_call.function is defined %}"
    "{% set tool_call = tool_call.function %}{% endif %}"
    '{{ \'\n<tool_call>\n{"name": "\' }}{{ tool_call.name }}{{ \'", "arguments": \' }}'
    "{{ tool_call.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT_ARGUMENTS = (  # wants the arguments as text, as DeepSeek's does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ '[CALL]' + c.function.name + '[ARGS]' + c.function.arguments }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = [("add", {"x": "1"}), ("pick", {"y": "2"})]


@pytest.fixture
def chat_with(make_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str | None], Chat]:
    """A chat with another template; None is ChatML without tools."""

    def make(template: str | None) -> Chat:
        tokenizer: Any = AutoTokenizer.from_pretrained(make_folder("llama"))
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(tmp_path)
        return Chat(tmp_path)

    return make


def test_calls_are_written_as_the_template_does(chat_with: Any) -> None:
    """From where the assistant begins to speak to the end of its turn, without either."""
    written = chat_with(QWEN).write_calls(CALLS)
    assert written.strip() == (
        '<tool_call>\n{"name": "add", "arguments": {"x": "1"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "pick", "arguments": {"y": "2"}}\n</tool_call>'
    )
    written = chat_with(TEXT_ARGUMENTS).write_calls(CALLS[:1])
    assert written == '[CALL]add[ARGS]{"x": "1"}'


def test_a_template_without_calls_says_what_to_do(chat_with: Any) -> None:
    chat = chat_with(None)
    with pytest.raises(ChatError, match=r'tools\.format = "hermes"'):
        chat.write_calls(CALLS)
    assert not chat.shows_tools()


def test_tools_are_shown_in_the_prompt(chat_with: Any) -> None:
    """By templates that do; each set of tools has its own prompt."""
    chat = chat_with(QWEN)
    assert chat.shows_tools()
    question = [ChatMessage(role="user", content="?")]
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    shown = chat.decode(chat.prompt_ids(question, [{"type": "function", "function": function}]))
    assert '"description": "Adds."' in shown
    assert "Adds." not in chat.decode(chat.prompt_ids(question))
    assert chat.prompt_ids(question, []) == chat.prompt_ids(question)


def test_special_tokens_are_seen_by_parsers(chat_with: Any) -> None:
    """All but those that end the turn."""
    chat = chat_with(None)
    ids = chat.prompt_ids([ChatMessage(role="user", content="?")])
    end = next(iter(chat.end_ids))
    assert chat.decode([*ids, end, end], special=True).endswith("<|im_start|>assistant\n")
    assert "<|im_start|>" not in chat.decode(ids)
