"""A turn while it runs, and the prefixes that are kept between turns."""

import asyncio
import hashlib
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engines.engine import Sample, SampleRequest
from engines.errors import EngineError

Finish = Literal["stop", "length", "partial"]

_HEAD_TOKENS = 16


def begun_ids(request: SampleRequest) -> list[int]:
    """What was sampled of the turn before it was cut short."""
    return request.ids[len(request.ids) - request.begun :]


class StopStrings:
    """Tells when a string is complete, decoding only after a token that could complete one."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        # A token holds at least one byte, so this many hold the longest string wherever it starts;
        # the spare ones let a cut character at the start of the tail decode as junk.
        self._tail_tokens = max(len(string.encode()) for string in strings) + 4
        self._could_end: dict[int, bool] = {}

    def complete(self, sampled: list[int], begun: list[int]) -> bool:
        """Whether the last token completes a string; to be asked after each token.

        `begun`: the turn's tokens before those, which a string may reach back into.
        """
        token = sampled[-1]
        could_end = self._could_end.get(token)
        if could_end is None:
            could_end = self._could_end[token] = self._examine(token)
        if not could_end:
            return False
        most = self._tail_tokens
        tail = [*begun[-most:], *sampled[-most:]][-most:]
        text = self._decode(tail)
        found = [string for string in self._strings if string in text]
        if not found:
            return False
        before = self._decode(tail[:-1])  # what was begun may hold a whole one
        return any(text.count(string) > before.count(string) for string in found)

    def first_from(self, begun: list[int], sampled: list[int]) -> int | None:
        """How many tokens it takes to complete a string that began in `begun`, if they do."""
        lengths = range(1, min(len(sampled), self._tail_tokens) + 1)
        return next((n for n in lengths if self.complete(sampled[:n], begun)), None)

    def _examine(self, token: int) -> bool:
        piece = self._decode([token])
        # A character may be spread over tokens, and a tokenizer may hide a lone token's space.
        return any(
            not string[-1].isascii() or string[-1].isspace() or string[-1] in piece
            for string in self._strings
        )

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class Turn:
    """One request on its way: waiting, then in a row, then answered."""

    def __init__(
        self,
        request: SampleRequest,
        future: asyncio.Future[Sample],
        limit: int,
        stops: StopStrings | None,
    ) -> None:
        """`limit`: tokens that may be sampled, by the request and the model's context."""
        self.request = request
        self.future = future
        """Belongs to its loop's thread; `answer` is the way there."""
        self.prompt_T = np.array(request.ids, dtype=np.int64)
        """Where an image stands, a negative number of its own: equal prompts show equal images."""
        for image in request.images:
            self.prompt_T[image.places] = _name(image.pixels)
        self.head = self.prompt_T[:_HEAD_TOKENS].tobytes()
        """Turns with unlike heads share nothing that is worth sharing."""
        self.limit = limit
        self.stops = stops
        self.begun = begun_ids(request)
        self.abandoned = False
        """The caller has gone away."""
        self.sampled: list[int] = []
        self.logprobs: list[float] = []
        self.prefill_version = -1
        """The version that computed the keys and values of the prompt."""
        self.outcome: Sample | EngineError | None = None
        self._versions: list[int] = []

    def mark(self, policy_version: int) -> None:
        """Say which version sampled the tokens since the last mark: before weights change, and at the end."""
        self._versions += [policy_version] * (len(self.sampled) - len(self._versions))

    def finish(self, reason: Finish) -> None:
        """Make the outcome of what was sampled and marked."""
        self.outcome = Sample(
            ids=self.sampled,
            logprobs=self.logprobs,
            versions=self._versions,
            finish_reason=reason,
        )


def _name(pixels: bytes) -> int:
    """A negative number that no other image has."""
    return -1 - int.from_bytes(hashlib.sha256(pixels).digest()[:7], "little")


def answer(turns: list[Turn]) -> None:
    """Give callers their outcomes, from any thread, waking each event loop once."""
    for loop in {turn.future.get_loop() for turn in turns}:
        its = [turn for turn in turns if turn.future.get_loop() is loop]
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_resolve, its)


def _resolve(turns: list[Turn]) -> None:
    for turn in turns:
        if turn.future.done():  # cancelled
            continue
        if isinstance(turn.outcome, EngineError):
            turn.future.set_exception(turn.outcome)
        elif turn.outcome is not None:
            turn.future.set_result(turn.outcome)


class Prefix(NamedTuple):
    """Tokens [T] and what Slots.read gave for them."""

    ids_T: npt.NDArray[np.int64]
    cache: torch.Tensor


def common_prefix(left_T: npt.NDArray[np.int64], right_T: npt.NDArray[np.int64]) -> int:
    """The length of the longest common prefix."""
    length = min(len(left_T), len(right_T))
    differ_T = left_T[:length] != right_T[:length]
    first = int(differ_T.argmax()) if length else 0
    return first if length and differ_T[first] else length


class KeptPrefixes:
    """The last turn of each trajectory, the least recently used forgotten first."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()

    def find(self, key: str) -> Prefix | None:
        """The key's prefix, which counts as a use."""
        if key not in self._prefixes:
            return None
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def forget(self, key: str) -> None:
        """Make room: the trajectory will bring a longer one."""
        prefix = self._prefixes.pop(key, None)
        if prefix is not None:
            self._bytes -= prefix.cache.nbytes

    def keep(self, key: str, prefix: Prefix) -> None:
        """Keep a prefix instead of the key's former one."""
        self.forget(key)
        self._prefixes[key] = prefix
        self._bytes += prefix.cache.nbytes
        while self._bytes > self._capacity_bytes:
            _, oldest = self._prefixes.popitem(last=False)
            self._bytes -= oldest.cache.nbytes

    def clear(self) -> None:
        """Forget all: the weights that computed them are gone."""
        self._prefixes.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._prefixes)
