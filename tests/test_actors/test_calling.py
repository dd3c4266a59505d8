"""Calls between generator and toolbox: formats, what is shown, what is granted, what ends a trajectory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.calling import Calling
from actors.generator import Generator, Policies
from actors.images import Images
from actors.toolbox import Toolbox
from engines.chat import Chat
from engines.scripted import ScriptedEngine
from schemas.events import Admitted, AnyTrajectoryEvent, Call, Turn
from schemas.images import StoredImage
from schemas.recipe import Policy, Recipe, Tools
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.formats import open_format
from tools.registry import load_tools
from tools.sandbox.unsafe import UnsafeSandbox
from tools.tool import Image

QWEN = (
    "{% if tools %}{{ 'TOOLS ' }}{% for tool in tools %}{{ tool.function.name + ' ' }}{% endfor %}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{% else %}"
    "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONE = '<tool_call>\n{"name": "python", "arguments": {"code": "6*7"}}\n</tool_call>'
FINISH = '<tool_call>{"name": "finish", "arguments": {"answer": "42"}}</tool_call>'
PYTHON = Call(tool="python", arguments={"code": "6*7"})


def recipe_of(**tools: Any) -> Recipe:
    return Recipe(
        policy=Policy(model="m", max_turn_tokens=400, max_tokens=4000),
        tools=Tools(**({"use": ["python", "finish"], "format": "hermes"} | tools)),
    )


def state_of(*events: AnyTrajectoryEvent, granted: list[str] | None = None) -> Trajectory:
    question = ChatMessage(role="user", content="What is 6 * 7?")
    public = PublicPart(messages=[question], tools=granted)
    admitted = Admitted(trajectory="g0-0-0", task="t", public=public, private_key="k")
    state = fold(None, admitted, 1)
    for seq, event in enumerate(events, 2):
        state = fold(state, event, seq)
    return state


@pytest.fixture
def ask(model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`await ask(recipe, reply, state)`: the turn, and the prompt as text."""

    async def hop(
        recipe: Recipe, reply: str, state: Trajectory, template: str | None = None
    ) -> tuple[Turn, str]:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(tmp_path)
        chat = Chat(tmp_path)
        engine = ScriptedEngine.open(tmp_path, lambda _text, _seed: reply)
        await engine.load(b"", 0)

        async def no_other(*_: int) -> Any:
            raise AssertionError

        config = recipe.tools
        tools = load_tools(config.use)
        formats = open_format(config.format, tools, config.tags, chat.write_calls)
        generator = Generator(
            recipe, Policies(engine, no_other, no_other), chat, Calling(formats), "generator-1"
        )
        turn = await generator.handle(state)
        given = [i for i, own in zip(turn.tokens.ids_T, turn.tokens.mask, strict=True) if not own]
        return turn, chat.decode(given)

    return hop


async def test_a_turn_ends_with_its_first_call(ask: Any) -> None:
    """Or, where the recipe says so, with the policy's own end: then it may have several."""
    turn, _ = await ask(recipe_of(), f"{ONE} and {ONE}", state_of())
    assert turn.calls == [PYTHON]
    assert turn.text == ONE
    turn, _ = await ask(recipe_of(stop_after_call=False), f"{ONE} and {ONE}", state_of())
    assert turn.calls == [PYTHON, PYTHON]
    assert not turn.last


async def test_finish_is_the_last_turn(ask: Any) -> None:
    """No tool runs any more, whatever else was called."""
    turn, _ = await ask(recipe_of(stop_after_call=False), ONE + FINISH, state_of())
    assert turn.last
    assert turn.calls[-1] == Call(tool="finish", arguments={"answer": "42"})
    hop = state_of(turn).next_hop
    assert hop is not None
    assert hop.stage == "score"


async def test_a_malformed_call_has_another_turn(ask: Any) -> None:
    """With feedback, which is what it is given next."""
    turn, _ = await ask(recipe_of(), "<tool_call>{'name'}</tool_call>", state_of())
    assert (turn.calls, turn.last) == ([], False)
    assert "not valid JSON" in turn.feedback
    _, given = await ask(recipe_of(), "42", state_of(turn))
    assert turn.feedback in given


async def test_only_what_is_granted_can_be_called(ask: Any) -> None:
    """And only that is shown."""
    recipe = recipe_of(show="system")
    turn, given = await ask(recipe, ONE, state_of(granted=["finish"]))
    assert turn.calls == []
    assert "'python'" in turn.feedback
    assert '"name":"finish"' in given
    assert '"name":"python"' not in given
    _, given = await ask(recipe_of(), ONE, state_of())
    assert "finish" not in given


async def test_the_template_shows_and_reads_calls(ask: Any) -> None:
    """Its own format, found out from it."""
    turn, given = await ask(recipe_of(format="template"), ONE, state_of(), QWEN)
    assert given.startswith("TOOLS python finish")
    assert turn.calls == [PYTHON]


@pytest.mark.parametrize("cut", [1, 5, 12, 30])
async def test_a_call_over_two_pieces_is_one(ask: Any, model_folder: Path, cut: int) -> None:
    """A turn that another replica went on with is read whole, from its tokens."""
    whole, _ = await ask(recipe_of(), ONE, state_of())
    begun = whole.tokens.sampled_ids[:cut]
    piece = Turn(
        trajectory="g0-0-0",
        tokens=Tokens.sampled(begun, [0.0] * cut, [0] * cut),
        text="(as it was shown to people)",
        finish_reason="partial",
    )
    rest = ONE.removeprefix(Chat(model_folder).decode(begun, special=True))
    assert 0 < len(rest) < len(ONE)
    turn, given = await ask(recipe_of(), rest, state_of(piece))
    assert turn.calls == [PYTHON]
    assert given == ""


async def no_image(image: StoredImage) -> Image:
    raise AssertionError(image)


async def no_images(images: Sequence[Image]) -> list[StoredImage]:
    assert not images
    return []


async def test_a_tool_has_limits_of_its_own(tmp_path: Path) -> None:
    """Time, length and side of an observation: the tool's options, then the recipe's, then the tool's own."""
    options = {"python": {"timeout_s": 0.5, "observation_chars": 6, "keep": "tail"}}
    recipe = recipe_of(options=options, timeout_s=9, observation_chars=10, keep="head")
    for given, slow, text in (
        (options, True, "[16 characters cut]\n0.5 s."),
        ({"python": options["python"] | {"timeout_s": 60}}, False, "[5 characters cut]\n56789\n"),
        ({}, False, "0123456789\n[1 characters cut]"),
    ):
        sandbox = UnsafeSandbox()
        tools = load_tools(["python"], options=given)
        box = Toolbox(recipe, tools, sandbox, Images(no_images, no_image), "toolbox-1")
        code = "import time; time.sleep(60)" if slow else "print('0123456789')"
        call = Call(tool="python", arguments={"code": code})
        turn = Turn(trajectory="g0-0-0", tokens=Tokens(), text="", calls=[call])
        result = await box.handle(state_of(turn))
        assert result.text == text
        await box.close()
