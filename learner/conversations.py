"""Demonstrations as tokens: the same tokens that sampling will see.

    messages    user            assistant           tool          assistant
    segments    prompt_ids      content             observation   content, end of turn
    mask        0 0 0 0 0 0     1 1 1 1             0 0 0 0       1 1 1

Each segment is tokenised by itself, as it is when the policy samples the assistant's part. An assistant message that
another follows ends where its tool call ends: its end of turn is the template's, given with the observation. Only the
last message's end of turn is the policy's own.

Shapes: T tokens of a conversation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from learner.errors import BadConversation
from learner.samples import BoolArray, IntArray
from schemas.images import ImageInput
from schemas.task import ChatMessage


class Chat(Protocol):
    """How the engine's side writes a conversation; the learner must write the same tokens."""

    end_ids: frozenset[int]
    """The tokens that end a turn."""

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The conversation up to where the assistant begins to speak."""
        ...

    def observation_ids(self, texts: Sequence[str], role: str, ended: bool) -> list[int]:
        """What stands between two assistant messages; the end of turn too unless the turn has `ended`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversation:
    """A demonstration; made by a Segmenter, read by `Policy.supervised_step`."""

    ids_T: IntArray
    mask_T: BoolArray
    """True where the token is the assistant's own."""
    images: tuple[ImageInput, ...] = ()


class Segmenter:
    """Makes demonstrations into tokens, segment by segment."""

    def __init__(
        self, chat: Chat, encode: Callable[[str], list[int]], observation_role: str
    ) -> None:
        """`encode` is the tokenizer's, adding no special tokens. Raises BadConversation.

        A tool's messages are shown in `observation_role`.
        """
        self._chat = chat
        self._encode = encode
        self._observation_role = observation_role
        after = chat.observation_ids([], observation_role, ended=False)
        ends = [token for token in after if token in chat.end_ids]
        if not ends:
            raise BadConversation("the chat template does not end the assistant's part")
        self._end_of_turn = ends[0]

    def conversation(self, messages: Sequence[ChatMessage]) -> Conversation:
        """Tokenise a demonstration.

        Raises BadConversation unless assistant messages come after a prompt, one at a time, and one of them last; and
        for images, which nobody has stored.
        """
        if any(message.images for message in messages):
            raise BadConversation("a demonstration shows no images")
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not turns or turns[0] == 0 or turns[-1] != len(messages) - 1:
            roles = ", ".join(message.role for message in messages)
            raise BadConversation(
                f"a demonstration goes from a prompt to an assistant, not {roles}"
            )
        segments = [(self._chat.prompt_ids(messages[: turns[0]]), False)]
        for turn, following in pairwise(turns):
            segments.append((self._encode(messages[turn].content), True))
            segments.append((self._observation_ids(messages[turn + 1 : following]), False))
        segments.append(([*self._encode(messages[-1].content), self._end_of_turn], True))
        ids = [token for segment, _ in segments for token in segment]
        return Conversation(
            ids_T=np.array(ids, np.int32),
            mask_T=np.repeat([own for _, own in segments], [len(ids) for ids, _ in segments]),
        )

    def _observation_ids(self, observations: Sequence[ChatMessage]) -> list[int]:
        roles = {self._observation_role if m.role == "tool" else m.role for m in observations}
        if len(roles) != 1:
            found = ", ".join(sorted(roles)) or "nothing"
            raise BadConversation(f"between assistant messages stands one role, not {found}")
        texts = [message.content for message in observations]
        return self._chat.observation_ids(texts, roles.pop(), ended=False)
