"""Messages and observations → token ids, through the model's own chat template.

prompt_ids(messages)      <system><user><generation prompt>
… sampled tokens …                                          kept as they are, never decoded and tokenised again
observation_ids(texts)                                      <end of turn><observation><generation prompt>
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from engines.errors import ChatError
from engines.tokenizer import open_vocabulary
from schemas.task import ChatMessage

_ASSISTANT = "zqassistantzq"
_OBSERVATION = "zqobservationzq"
_PAD = " \n "


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
        self._frame = lru_cache(maxsize=64)(self._render_frame)
        self._prompt = lru_cache(maxsize=256)(  # all members of a group ask for the same one
            lambda messages: self._encode(self._render(_plain(messages), None))
        )

    def prompt_ids(
        self, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The conversation up to where the assistant begins to speak.

        `tools`: JSON schemas, for templates that write them. Raises ChatError.
        """
        if tools is None:
            return list(self._prompt(tuple(messages)))
        return self._encode(self._render(_plain(messages), tools))

    def observation_ids(self, texts: Sequence[str], role: str, ended: bool) -> list[int]:
        """What stands between a sampled turn and the next one: one message for each text.

        `ended`: the turn's last token is an end-of-turn token; else it is added here. Control tokens spelled out
        in a text stay text. Raises ChatError if the template refuses the role.
        """
        frame = self._frame(role, len(texts))
        contents = [self._strip(text, frame) for text in texts]
        if any(token in content for content in contents for token in self._special):
            ids = self._encode(frame.pieces[0])
            for content, piece in zip(contents, frame.pieces[1:], strict=True):
                ids += self._encode(content, split_special_tokens=True) + self._encode(piece)
        else:
            pairs = zip(contents, frame.pieces[1:], strict=True)
            ids = self._encode(frame.pieces[0] + "".join(c + piece for c, piece in pairs))
        # Tokenised with the end of turn before it, as in a whole conversation, then cut.
        return ids[1:] if ended and ids[0] in self.end_ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _encode(self, text: str, **how: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, **how)
        return ids

    @staticmethod
    def _strip(text: str, frame: _Frame) -> str:
        text = text.lstrip() if frame.strips_left else text
        return text.rstrip() if frame.strips_right else text

    def _render(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
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


def _plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
