"""Any Hugging Face causal model with full attention, sampled with continuous batching.

sample() ──► mailbox ──► decode thread: batch.step(), batch.step(), … ──► the caller's future
load()   ──► mailbox ──►   between two steps
"""

import asyncio
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Literal, Self

import torch

from engines.batch import Batch
from engines.engine import Sample, SampleRequest
from engines.errors import EngineError, TooLong
from engines.policy_model import PolicyModel, open_model
from engines.tokenizer import Vocabulary, open_vocabulary
from engines.turns import StopStrings, Turn, answer
from engines.weights import read_weights

_KEPT_BYTES = 512 << 20
_PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""About where more tokens in a step stop paying off."""


class _Swap:
    def __init__(self, tensors: dict[str, torch.Tensor], policy_version: int) -> None:
        self.tensors = tensors
        self.policy_version = policy_version
        self.done: Future[None] = Future()


class _Interrupt:
    def __init__(self, *, close: bool) -> None:
        self.close = close
        self.done: Future[None] = Future()


class _Abandoned:
    """A caller has gone away."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn


_Message = Turn | _Swap | _Interrupt | _Abandoned


class TransformersEngine:
    """An Engine whose decode loop runs in a thread of its own."""

    def __init__(
        self,
        model: PolicyModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        threads: int = 1,
        weight_swap: Literal["token", "turn"] = "token",
    ) -> None:
        """`slots`: turns sampled at once; `threads`: of torch. `open` makes the rest from a folder."""
        self._model = model
        self._tokenizer = vocabulary.tokenizer
        self._threads = threads
        self._swap_between_turns = weight_swap == "turn"
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._batch = Batch(
            model,
            vocabulary.end_ids,
            slots=slots,
            prefill_tokens=_PREFILL_TOKENS.get(model.device.type, 512),
            kept_bytes=_KEPT_BYTES,
        )
        self._waiting: deque[Turn] = deque()
        self._unanswered: set[Turn] = set()
        self._swaps: deque[_Swap] = deque()
        self._mailbox: SimpleQueue[_Message] = SimpleQueue()
        self._failure: tuple[str, str] | None = None
        self._lock = Lock()  # nobody writes to the mailbox after its last reader has gone
        # A daemon, so that a process whose owner forgot `close` can still exit.
        Thread(target=self._run, name="decode", daemon=True).start()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dtype: str,
        slots: int,
        threads: int,
        device: str = "auto",
        weight_swap: Literal["token", "turn"] = "token",
    ) -> Self:
        """Read a Hugging Face folder; without weights in it, `load` must bring them first.

        Raises EngineError (`unsupported_model`, `bad_weights`).
        """
        torch.set_num_threads(threads)
        model = open_model(folder, dtype, device)
        vocabulary = open_vocabulary(folder)
        return cls(model, vocabulary, slots=slots, threads=threads, weight_swap=weight_swap)

    @property
    def policy_version(self) -> int:
        """The version that the next token will be sampled by; -1 until `load`: a folder does not know its own."""
        return self._batch.policy_version

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn; see Engine."""
        have, need = self._model.context, len(request.ids) + 1
        if need > have:
            raise TooLong(need, have)
        if not request.ids or request.max_tokens < 1:
            raise EngineError("bad_request", "a turn needs a token before it and one to sample")
        if max(request.ids) >= self._model.vocabulary or min(request.ids) < 0:
            raise EngineError("bad_request", "a token that the model does not have")
        if request.images and not self._model.sees:
            raise EngineError("bad_request", "images for a model that sees none")
        if not self._model.has_weights:
            raise EngineError("no_weights", "the folder has none and none were loaded")
        stops = self._stop_strings(request.stop) if request.stop else None
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        turn = Turn(request, future, min(request.max_tokens, have - len(request.ids)), stops)
        self._send(turn)
        try:
            return await future
        except asyncio.CancelledError:
            turn.abandoned = True
            self._mailbox.put(_Abandoned(turn))
            raise

    async def load(self, weights: bytes, policy_version: int) -> None:
        """Take new weights; see Engine. Raises EngineError (`bad_weights`) naming what does not fit."""
        tensors = await asyncio.to_thread(read_weights, weights, self._model.module)
        swap = _Swap(tensors, policy_version)
        self._send(swap)
        await asyncio.wrap_future(swap.done)

    async def interrupt(self) -> None:
        """End running and waiting turns now; see Engine."""
        await self._interrupt(close=False)

    async def close(self) -> None:
        """End the thread; running turns end as `partial`. May be called again."""
        if self._failure is None:
            await self._interrupt(close=True)

    async def _interrupt(self, *, close: bool) -> None:
        interrupt = _Interrupt(close=close)
        self._send(interrupt)
        await asyncio.wrap_future(interrupt.done)

    def _stop_strings(self, strings: tuple[str, ...]) -> StopStrings:
        if strings not in self._stops:
            self._stops[strings] = StopStrings(self._tokenizer, strings)
        return self._stops[strings]

    def _send(self, message: _Message) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineError(*self._failure)
            self._mailbox.put(message)

    # Below: the decode thread.

    def _run(self) -> None:
        with ExitStack() as stack, torch.inference_mode():
            stack.push(self._ended)
            torch.set_num_threads(self._threads)
            while self._obey():
                if self._swaps and not (self._swap_between_turns and self._batch.turns):
                    self._swap()
                held = self._swap_between_turns and self._swaps
                if finished := self._batch.step(deque() if held else self._waiting):
                    self._answer(finished)

    def _obey(self) -> bool:
        """Do what the mailbox says, waiting for it if there is nothing to sample; False to end."""
        idle = not (self._batch.turns or self._waiting or self._swaps)
        try:
            message = self._mailbox.get(block=idle)
            while self._take(message):
                message = self._mailbox.get_nowait()
        except Empty:
            return True
        return False

    def _take(self, message: _Message) -> bool:
        if isinstance(message, Turn):
            self._waiting.append(message)
            self._unanswered.add(message)
        elif isinstance(message, _Swap):
            if message.done.set_running_or_notify_cancel():
                self._swaps.append(message)
        elif isinstance(message, _Abandoned):
            self._unanswered.discard(message.turn)
            self._batch.drop_abandoned()
        else:
            for turn in self._waiting:
                turn.finish("partial")
            self._answer([*self._batch.end(), *self._waiting])
            self._waiting.clear()
            if message.done.set_running_or_notify_cancel():
                message.done.set_result(None)
            return not message.close
        return True

    def _answer(self, turns: list[Turn]) -> None:
        self._unanswered.difference_update(turns)
        answer(turns)

    def _swap(self) -> None:
        while self._swaps:
            swap = self._swaps[0]
            self._batch.swap(swap.tensors, swap.policy_version)
            self._swaps.popleft().done.set_result(None)

    def _ended(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        """Tell everyone who waits, and everyone who comes later; whatever it was, they are told."""
        failure = _explain(error)
        with self._lock:
            self._failure = failure
            while not self._mailbox.empty():
                message = self._mailbox.get()
                if isinstance(message, Turn):
                    self._unanswered.add(message)
                elif isinstance(message, _Swap | _Interrupt):
                    self._fail(message.done, failure, error)
        for turn in self._unanswered:  # wherever in a step they were
            turn.outcome = _chain(failure, error)
        answer(list(self._unanswered))
        for swap in self._swaps:
            swap.done.set_exception(_chain(failure, error))
        return True

    @staticmethod
    def _fail(done: Future[None], failure: tuple[str, str], error: BaseException | None) -> None:
        if not done.set_running_or_notify_cancel():
            return
        if error is None:  # closed: nothing runs, as was asked for
            done.set_result(None)
        else:
            done.set_exception(_chain(failure, error))


def _explain(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return "closed", "the engine is closed"
    if isinstance(error, EngineError):
        return error.code, error.detail
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or "can't allocate memory" in str(error):  # how torch says it of the host's memory
        return "out_of_memory", str(error)
    return "decode_failed", f"{type(error).__name__}: {error}"


def _chain(failure: tuple[str, str], cause: BaseException | None) -> EngineError:
    error = EngineError(*failure)
    error.__cause__ = cause
    return error
