"""What an engine is: token ids in; token ids, log-probabilities and versions out."""

from typing import Literal, Protocol

import msgspec

from schemas.images import ImageInput


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One turn to sample."""

    ids: list[int]
    """[T] everything so far; never empty."""
    images: list[ImageInput] = []
    """What the policy sees at their places among the tokens, in order."""
    max_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    stop: tuple[str, ...] = ()
    """Sampling ends with the token that completes one of these; the token is kept."""
    begun: int = 0
    """How many of the last `ids` are of this turn, which was cut short: a stop may have begun in them."""
    seed: int = 0
    """Of this turn: the same seed, ids and weights give the same tokens, whatever else is in the batch."""
    cache_key: str = ""
    """Turns of one trajectory share it, so that an engine may keep what it has computed; a hint."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What was sampled: N tokens, the end-of-turn token included."""

    ids: list[int]
    logprobs: list[float]
    """[N] under softmax(logits / temperature); at temperature 0, under softmax(logits)."""
    versions: list[int]
    """[N] the policy version whose weights gave each token's logits."""
    finish_reason: Literal["stop", "length", "partial"]


class Engine(Protocol):
    """Samples many turns at once; each joins and leaves the running batch by itself."""

    @property
    def policy_version(self) -> int:
        """The version that the next token will be sampled by; -1 before the first weights."""
        ...

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn.

        Raises EngineError when the engine cannot: that is never the policy's fault.
        """
        ...

    async def load(self, weights: bytes, policy_version: int) -> None:
        """Take new weights (the bytes of a safetensors file) between two tokens; running turns go on."""
        ...

    async def interrupt(self) -> None:
        """End every running turn now with what it has (`partial`)."""
        ...

    async def close(self) -> None:
        """Free everything; running turns end as `partial`."""
        ...
