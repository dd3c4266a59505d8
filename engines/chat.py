"""Messages and observations → token ids, through the model's own chat template.

prompt_ids(messages)      <system><user><generation prompt>
… sampled tokens …                                          kept as they are, never decoded and tokenised again
observation_ids(texts)                                      <end of turn><observation><generation prompt>
"""

import contextlib
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from engines.errors import ChatError
from engines.tokenizer import open_vocabulary
from schemas.images import PLACEHOLDER
from schemas.task import ChatMessage

_ASSISTANT = "zqassistantzq"
_OBSERVATION = "zqobservationzq"
_CALLED = "zqcalledzq"
_PAD = " \n "


Content = str | list[str | list[int]]
"""Of an observation: a text; or texts, with the tokens of images between them."""


class _Frame(NamedTuple):
    """What a template writes around observations."""

    pieces: tuple[str, ...]
    """One more than there are observations."""
    strips_left: bool
    strips_right: bool


class Chat:
    """A tokenizer and its chat template."""

    def __init__(self, folder: Path) -> None:
        """Read a Hugging Face folder's tokenizer. Raises ChatError if it has no chat template."""
        self._tokenizer, self.end_ids = open_vocabulary(folder)
        if not self._tokenizer.chat_template:
            raise ChatError(
                "the model's tokenizer has no chat template: use an instruction-tuned model, "
                "or set `chat_template` in its tokenizer_config.json"
            )
        self._special = tuple(self._tokenizer.get_added_vocab())
        added = self._tokenizer.added_tokens_decoder.values()
        self._not_special = [
            each.content for each in added if not (each.special or each.content.isspace())
        ]
        self._in_parts = False
        with contextlib.suppress(ChatError):
            user = {"role": "user", "content": _OBSERVATION}
            self._in_parts = _OBSERVATION not in self._render([user], None)
        """Whether the template reads no texts but lists of parts, as those of models that see images often do."""
        self._frame = lru_cache(maxsize=64)(self._render_frame)
        self._prompt = lru_cache(maxsize=256)(self._prompt_ids)  # a group's members ask for one

    def prompt_ids(
        self, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The conversation up to where the assistant begins to speak; of an image as much as the template writes.

        `tools`: JSON schemas, for templates that write them. Raises ChatError.
        """
        plain = tuple((each.role, each.content, len(each.images)) for each in messages)
        return list(self._prompt(plain, json.dumps(tools) if tools else ""))

    def observation_ids(self, contents: Sequence[Content], role: str, ended: bool) -> list[int]:
        """What stands between a sampled turn and the next one: one message for each content.

        `ended`: the turn's last token is an end-of-turn token; else it is added here. Control tokens spelled out
        in a text stay text. Raises ChatError if the template refuses the role.
        """
        frame = self._frame(role, len(contents))
        stripped = [self._strip(content, frame) for content in contents]
        texts = [part for content in stripped for part in content if isinstance(part, str)]
        images = any(len(content) > 1 for content in stripped)
        if images or any(token in text for text in texts for token in self._special):
            ids = self._encode(frame.pieces[0])
            for content, piece in zip(stripped, frame.pieces[1:], strict=True):
                for part in content:
                    ids += self._as_text(part) if isinstance(part, str) else part
                ids += self._encode(piece)
        else:
            pairs = zip(texts, frame.pieces[1:], strict=True)
            ids = self._encode(frame.pieces[0] + "".join(text + piece for text, piece in pairs))
        # Tokenised with the end of turn before it, as in a whole conversation, then cut.
        return ids[1:] if ended and ids[0] in self.end_ids else ids

    def shows_tools(self) -> bool:
        """Whether the template writes the functions that the model may call."""
        messages = [{"role": "user", "content": "?"}]
        parameters: dict[str, Any] = {"type": "object", "properties": {}}
        function = {"name": _CALLED, "description": "", "parameters": parameters}
        return _CALLED in self._render(messages, [{"type": "function", "function": function}])

    def write_calls(self, calls: Sequence[tuple[str, dict[str, str]]]) -> str:
        """What the template writes for an assistant's turn that makes these calls (name, arguments), special tokens
        included, without the end of the turn. Raises ChatError if it writes none."""
        question = {"role": "user", "content": "?"}
        before = self._render([question], None)
        written = ""
        for as_text in (False, True):  # some templates want the arguments as JSON already
            with contextlib.suppress(TypeError):
                turn = {"role": "assistant", "content": "", "tool_calls": _calls(calls, as_text)}
                written = self._render([question, turn], None, open_turn=False)
                break
        # what opens a turn to speak need not open one that calls
        while not written.startswith(before):
            before = before[:-1]
        written = written[len(before) :]
        names = [written.rfind(name) for name, _ in calls]
        if not written or min(names, default=-1) < 0:
            raise ChatError('the chat template writes no calls: use tools.format = "hermes"')
        ends = [written.find(end, max(names)) for end in self._end_texts()]
        return written[: min((end for end in ends if end >= 0), default=len(written))]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, without special ones; with `special`, only without those that end the turn."""
        ids = list(ids)
        while special and ids and ids[-1] in self.end_ids:
            del ids[-1]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def _end_texts(self) -> list[str]:
        return [self._tokenizer.decode([end]) for end in self.end_ids]

    def _prompt_ids(self, messages: tuple[tuple[str, str, int], ...], tools: str) -> list[int]:
        """`messages`: roles, contents and how many images they have."""
        plain = [
            {"role": role, "content": content, "images": images}
            for role, content, images in messages
        ]
        return self._encode(self._render(plain, json.loads(tools) if tools else None))

    def _as_text(self, text: str) -> list[int]:
        """No control token, whatever is spelled out; one that is not called special is cut in two, lest it be found."""
        cuts = {0, len(text)}
        for token in self._not_special:
            at = text.find(token)
            while at >= 0:
                cuts.add(at + 1)
                at = text.find(token, at + 1)
        parts = [text[first:end] for first, end in pairwise(sorted(cuts))]
        return [id_ for part in parts for id_ in self._encode(part, split_special_tokens=True)]

    def _encode(self, text: str, **how: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, **how)
        return ids

    @staticmethod
    def _strip(content: Content, frame: _Frame) -> list[str | list[int]]:
        first, *others = [content] if isinstance(content, str) else content
        parts = [first.lstrip() if frame.strips_left and isinstance(first, str) else first, *others]
        if frame.strips_right and isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip()
        return parts

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        open_turn: bool = True,
    ) -> str:
        if self._in_parts:
            messages = [
                message | {"content": _parts(message["content"], message.get("images", 0))}
                for message in messages
            ]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=open_turn, tokenize=False
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ChatError(f"the chat template refuses the roles {roles}: {error}") from error
        return text

    def _render_frame(self, role: str, count: int) -> _Frame:
        """Render marked contents once, and keep what stands around the marks."""
        marks = [f"{_OBSERVATION}{index}zq" for index in range(count)]
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ASSISTANT},
            *({"role": role, "content": f"{_PAD}{mark}{_PAD}"} for mark in marks),
        ]
        advice = 'set `policy.observation_role = "user"`' if role != "user" else "use another model"
        try:
            _, _, rest = self._render(messages, None).partition(_ASSISTANT)
        except ChatError as error:
            raise ChatError(f"{error}; {advice}") from error
        pieces: list[str] = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise ChatError(f"the chat template drops messages of role {role!r}; {advice}")
            pieces.append(piece)
        pieces.append(rest)
        strips_left = not all(piece.endswith(_PAD) for piece in pieces[:-1])
        strips_right = not all(piece.startswith(_PAD) for piece in pieces[1:])
        if not strips_right:
            pieces[1:] = [piece.removeprefix(_PAD) for piece in pieces[1:]]
        if not strips_left:
            pieces[:-1] = [piece.removesuffix(_PAD) for piece in pieces[:-1]]
        return _Frame(tuple(pieces), strips_left, strips_right)


def _calls(calls: Sequence[tuple[str, dict[str, str]]], as_text: bool) -> list[dict[str, Any]]:
    return [
        {
            "id": f"zqcallid{index}",  # nine characters, as some templates demand
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps(arguments) if as_text else arguments,
            },
        }
        for index, (name, arguments) in enumerate(calls)
    ]


def _parts(content: str, images: int) -> list[dict[str, str]]:
    """A content as a list of texts and images."""
    first, *others = content.split(PLACEHOLDER, images)
    parts = [{"type": "text", "text": first}] if first or not images else []
    for text in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts
