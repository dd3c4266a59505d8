"""What a trajectory is asked to do: one row of a data set, split by who may read it."""

from typing import Any, Literal

import msgspec

from schemas.images import StoredImage


class ChatMessage(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One message of a conversation, in the chat-template sense.

    In a data row `content` may also be a list of parts, as Hugging Face has them; see actors/row_images.py.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    images: list[StoredImage] = []
    """One for each placeholder in the content, in order; no data row gives them."""


class PublicPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of a row that every role may read."""

    messages: list[ChatMessage]
    """The conversation so far; the policy writes the next turn."""
    tools: list[str] | None = None
    """Names of the tools granted; None grants all of the recipe's."""
    extra: dict[str, Any] = {}
    """What the tools need (a database, a repository, images), by name."""


class TaskRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of a data file: `{"id": …, "public": {"messages": […]}, "private": {…}}`.

    The private part (answers, tests, rubrics) reaches scorers only.
    """

    id: str
    public: PublicPart
    private: dict[str, Any] = {}
