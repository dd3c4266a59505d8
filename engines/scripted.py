"""An engine whose replies come from a Python function: tests, oracle policies, measuring everything else."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Self

from engines.engine import Sample, SampleRequest
from engines.errors import EngineError, TooLong
from engines.tokenizer import Vocabulary, open_vocabulary
from engines.turns import Finish, StopStrings, begun_ids

Script = Callable[[str, int], str]
"""`script(text, seed)`: everything so far, special tokens included → the turn's text, without its end."""

_CONTEXT = 1 << 20


class ScriptedEngine:
    """Says what a function says, tokenised as a model's own turn would be.

    Log-probabilities are 0.0: the function is certain. Weights are not read, only their version is taken.
    """

    def __init__(
        self, script: Script, vocabulary: Vocabulary, *, seconds_per_token: float = 0.0
    ) -> None:
        """`seconds_per_token` paces each turn by itself, as an engine with a slot for each would."""
        self._script = script
        self._tokenizer, self._ends = vocabulary
        self._seconds_per_token = seconds_per_token
        self._policy_version = -1
        self._interrupted = asyncio.Event()
        self._closed = False

    @classmethod
    def open(cls, folder: Path, script: Script, *, seconds_per_token: float = 0.0) -> Self:
        """Read the tokenizer of a Hugging Face folder."""
        return cls(script, open_vocabulary(folder), seconds_per_token=seconds_per_token)

    @property
    def policy_version(self) -> int:
        """The version that the next token will carry."""
        return self._policy_version

    async def sample(self, request: SampleRequest) -> Sample:
        """Say the script's text, token by token; see Engine."""
        self._refuse_if_closed()
        if len(request.ids) + 1 > _CONTEXT:
            raise TooLong(len(request.ids) + 1, _CONTEXT)
        if not request.ids or request.max_tokens < 1:
            raise EngineError("bad_request", "a turn needs a token before it and one to sample")
        planned, reason = self._plan(request)
        if not self._seconds_per_token:
            return self._sample(planned, [self._policy_version] * len(planned), reason)
        versions: list[int] = []
        interrupted = self._interrupted
        begun_s = asyncio.get_running_loop().time()
        for number in range(1, len(planned) + 1):
            due_s = begun_s + number * self._seconds_per_token  # lateness does not add up
            try:
                async with asyncio.timeout_at(due_s):
                    await interrupted.wait()
            except TimeoutError:  # the token's time has passed
                versions.append(self._policy_version)
            else:
                reason = "partial"
                break
        return self._sample(planned[: len(versions)], versions, reason)

    async def load(self, weights: bytes, policy_version: int) -> None:  # noqa: ARG002 (not read)
        """Take the version."""
        self._refuse_if_closed()
        self._policy_version = policy_version

    async def interrupt(self) -> None:
        """End every running turn now."""
        self._interrupted.set()
        self._interrupted = asyncio.Event()

    async def close(self) -> None:
        """End every running turn, and refuse new ones."""
        self._closed = True
        await self.interrupt()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineError("closed", "the engine is closed")

    def _plan(self, request: SampleRequest) -> tuple[list[int], Finish]:
        """The turn if nothing interrupts it."""
        text = self._script(self._tokenizer.decode(request.ids), request.seed)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        ids.append(min(self._ends))
        stops = StopStrings(self._tokenizer, request.stop) if request.stop else None
        begun = begun_ids(request)
        for count in range(1, min(len(ids), request.max_tokens) + 1):
            if ids[count - 1] in self._ends or (stops and stops.complete(ids[:count], begun)):
                return ids[:count], "stop"
        return ids[: request.max_tokens], "length"

    @staticmethod
    def _sample(ids: list[int], versions: list[int], reason: Finish) -> Sample:
        return Sample(ids=ids, logprobs=[0.0] * len(ids), versions=versions, finish_reason=reason)
