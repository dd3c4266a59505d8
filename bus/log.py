"""The log: the truth of a run. Append with the commit rule, read one trajectory, follow everything.

Readers use batched direct gets, which need no consumer and keep no state at the server: a reader that falls behind,
dies or meets a restarted server goes on from the sequence it has.
"""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import NamedTuple, TypeVar

import structlog
from msgspec.structs import replace
from nats.errors import Error as NatsError

from bus import subjects
from bus.codec import decode, encode
from bus.connection import Bus, Message, wait
from bus.errors import BadMessage, Conflict, Unavailable
from schemas.events import (
    AnyEvent,
    AnyLearnerEvent,
    AnyRunEvent,
    AnyTrajectoryEvent,
    Evaluated,
    Scored,
    TrajectoryEvent,
)
from schemas.trajectory import Trajectory, TrajectoryId, fold

log = structlog.get_logger()

_BATCH = 512
_ANSWER_S = 2.0
_BEHIND_S, _LOOK_AGAIN_S = 5.0, 0.1
"""How long a server may be behind the others of its cluster, and how often it is asked until it is not."""
POLL_S = 0.25
"""How often a follower looks for more."""

T = TypeVar("T")


class Stored(NamedTuple):
    """An event as the log has it."""

    seq: int
    time_s: float
    """Server time when it was stored, in seconds since the epoch."""
    subject: str
    event: AnyEvent

    @property
    def learner(self) -> str:
        """The learner in whose write-ahead log it stands; empty when in none."""
        part = self.subject.split(".")
        return part[3] if part[2:3] == ["l"] else ""


class Raw(NamedTuple):
    """A stored message, not yet read."""

    seq: int
    time_s: float
    subject: str
    data: bytes


def timestamp_s(stamp: str) -> float:
    """A time of the server's, in seconds since the epoch."""
    # it leaves trailing zeros out; fromisoformat takes just six of its nine digits
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{fraction[:6].ljust(6, '0')}+00:00").timestamp()


def is_stored(message: Message) -> bool:
    """Whether a direct get has answered with a message, whatever its own headers are, and not with a status."""
    return "Nats-Sequence" in (message.headers or ())  # the server's own: it replaces any other


def raw_message(message: Message) -> Raw:
    """The stored message that a direct get has answered with."""
    headers = message.headers or {}
    time_s = timestamp_s(headers["Nats-Time-Stamp"])
    return Raw(int(headers["Nats-Sequence"]), time_s, headers["Nats-Subject"], message.data)


class StreamReader:
    """Reads one stream by batched direct gets; many reads may go on at once. Made by `open_reader`."""

    def __init__(self, bus: Bus, stream: str) -> None:
        self._bus = bus
        self._asks = f"$JS.API.DIRECT.GET.{stream}"
        self.address = bus.client.new_inbox()
        self._requests = 0
        self._answers: dict[str, asyncio.Queue[Message]] = {}

    async def on_answer(self, message: Message) -> None:
        """Hand a message to the request that it answers; one that was given up is dropped."""
        answers = self._answers.get(message.subject)
        if answers is not None:
            answers.put_nowait(message)

    async def batch(self, subject: str, after: int) -> tuple[list[Raw], bool]:
        """The next messages after a sequence, and whether more are there already.

        Raises Unavailable when the server does not answer in time, and Denied.
        """
        self._requests += 1
        reply = f"{self.address}.{self._requests}"
        answers = self._answers[reply] = asyncio.Queue()
        query = json.dumps({"seq": after + 1, "batch": _BATCH, "next_by_subj": subject}).encode()
        found: list[Raw] = []
        try:
            with self._bus.answer_to(self._asks):
                await self._bus.client.publish(self._asks, query, reply=reply)
                while True:
                    async with asyncio.timeout(_ANSWER_S):
                        message = await answers.get()
                    if is_stored(message):
                        found.append(raw_message(message))
                        continue
                    headers = message.headers or {}
                    status = headers.get("Status")
                    if status == "204":
                        return found, int(headers.get("Nats-Num-Pending", "0")) > 0
                    if status == "404":
                        return found, False
                    if status == "503":
                        raise Unavailable(subject, "no server answers for such a stream")
                    raise Unavailable(subject, f"status {status}", refused=True)
        except (NatsError, TimeoutError) as error:
            if found:
                return found, True
            raise Unavailable(subject, repr(error)) from error
        finally:
            del self._answers[reply]

    async def read(self, subject: str, after: int = 0) -> AsyncIterator[Raw]:
        """Everything stored now after a sequence, in order; servers that start again are waited for.

        Raises Unavailable when they do not come.
        """
        more = True
        while more:
            found, more = await self._bus.patiently(partial(self.batch, subject, after))
            for raw in found:
                after = raw.seq
                yield raw

    async def follow(
        self, subject: str, after: int = 0, *, poll_s: float = POLL_S, hint: str = ""
    ) -> AsyncIterator[list[Raw]]:
        """Everything after a sequence and then what comes, in order, in lists; never ends.

        An empty list says that the end of what is stored was reached. Looks again every `poll_s`, and at once when
        something is published on the subject `hint`: each hint costs the server a delivery, each look an answer.
        """
        woken = asyncio.Event()

        async def wake(_: Message) -> None:
            woken.set()

        if hint:
            await self._bus.subscribe(hint, wake)
        while not self._bus.closed.is_set():
            woken.clear()
            try:
                found, more = await self.batch(subject, after)
            except Unavailable as error:
                log.warning("log not readable; trying again", error=str(error))
                await asyncio.sleep(POLL_S)
                continue
            if found:
                after = found[-1].seq
                yield found
            if not more:
                yield []
                await wait(woken, poll_s)


@asynccontextmanager
async def open_reader(bus: Bus, stream: str) -> AsyncIterator[StreamReader]:
    """A reader of one stream, with an inbox of its own."""
    reader = StreamReader(bus, stream)
    inbox = await bus.client.subscribe(
        f"{reader.address}.*", cb=reader.on_answer, pending_msgs_limit=0, pending_bytes_limit=0
    )
    try:
        yield reader
    finally:
        with suppress(NatsError):
            await inbox.unsubscribe()


def read_event(raw: Raw) -> AnyEvent:
    """The event, if subject, kind and schema agree. Raises BadMessage otherwise."""
    event: AnyEvent = decode(raw.data, AnyEvent, raw.subject)
    part = raw.subject.split(".")
    if part[-1] != event.kind:
        raise BadMessage(raw.subject, f"holds a {event.kind!r}", raw.data)
    expected = {"t": AnyTrajectoryEvent, "l": AnyLearnerEvent, "r": AnyRunEvent}.get(part[2])
    if expected is None or not isinstance(event, expected):
        raise BadMessage(raw.subject, f"is no place for a {event.kind!r}", raw.data)
    if isinstance(event, TrajectoryEvent) and part[3] != event.trajectory:
        raise BadMessage(raw.subject, f"holds an event of {event.trajectory}", raw.data)
    if part[2] == "t":
        try:
            TrajectoryId.parse(part[3])
        except ValueError as error:
            raise BadMessage(raw.subject, str(error), raw.data) from error
    if isinstance(event, Scored | Evaluated) and not math.isfinite(event.reward):
        raise BadMessage(raw.subject, f"the reward {event.reward}", raw.data)
    return event


class Log:
    """One run's log."""

    def __init__(self, bus: Bus, run: str, reader: StreamReader) -> None:
        self._bus = bus
        self._reader = reader
        self.run = run
        self.junk = 0
        """Stored messages that no event could be read from; they are skipped."""

    async def append(self, event: AnyTrajectoryEvent, after: int) -> int:
        """Append, if `after` is still the last sequence of the event's trajectory (0: it has none).

        Returns the new sequence. Raises Conflict when the trajectory has moved, Unavailable.
        """
        return await self._append(
            subjects.trajectory(self.run, event.trajectory, event.kind),
            subjects.trajectory(self.run, event.trajectory),
            event,
            after,
        )

    async def append_learner(self, name: str, event: AnyLearnerEvent, after: int) -> int:
        """Append to a learner's write-ahead log; a Conflict says that another learner has taken over."""
        return await self._append(
            subjects.learner(self.run, name, event.kind),
            subjects.learner(self.run, name),
            event,
            after,
        )

    async def append_run(self, event: AnyRunEvent) -> int:
        """Append a fact of the run itself; the order among writers does not matter."""
        subject = subjects.run_event(self.run, event.kind)
        return await self._bus.store(subject, encode(event), {"Nats-Msg-Id": uuid.uuid4().hex})

    async def _append(self, subject: str, scope: str, event: AnyEvent, after: int) -> int:
        data = encode(event)
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(after),
            "Nats-Expected-Last-Subject-Sequence-Subject": scope,
        }
        try:
            return await self._bus.store(subject, data, headers)
        except Conflict:
            # our own first try may have been stored though its confirmation was lost; who answers may be behind
            end = time.monotonic() + _BEHIND_S
            while not (last := [raw async for raw in self._reader.read(scope, after)]):
                if time.monotonic() > end:
                    break
                await asyncio.sleep(_LOOK_AGAIN_S)
            if last and last[0].data == data and last[0].subject == subject:
                return last[0].seq
            raise

    async def trajectory(self, trajectory_id: str, through_seq: int = 0) -> Trajectory | None:
        """One trajectory folded from its events; None when it was never admitted.

        `through_seq`: what is known to be stored; who answers for a cluster may be behind. Raises Unavailable when it
        does not come in time.
        """
        end = time.monotonic() + _BEHIND_S
        while True:
            state = await self._fold(trajectory_id)
            if (state.seq if state else 0) >= through_seq:
                return state
            if time.monotonic() > end:
                why = f"the log ends before sequence {through_seq}"
                raise Unavailable(trajectory_id, why, refused=True)
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _fold(self, trajectory_id: str) -> Trajectory | None:
        state: Trajectory | None = None
        subject = subjects.trajectory(self.run, trajectory_id)
        async for raw in self._reader.read(subject):
            stored = self._stored(raw)
            if stored is not None:
                state = fold_stored(state, stored)
            if state is not None:  # junk moves the sequence too: the next append must expect it
                state = replace(state, seq=raw.seq)
        return state

    async def last_seq(self) -> int:
        """The last sequence of the run; 0 when it has none."""
        info = await self._bus.ask(f"STREAM.INFO.{subjects.LOG_STREAM}")
        return int(info["state"]["last_seq"])

    async def read(self, subject: str = "", after: int = 0) -> AsyncIterator[Stored]:
        """Everything in the log now, in order."""
        async for raw in self._reader.read(subject or subjects.log(self.run), after):
            if (stored := self._stored(raw)) is not None:
                yield stored

    async def follow(
        self, after: int = 0, *, subject: str = "", poll_s: float = POLL_S, hint: str = ""
    ) -> AsyncIterator[list[Stored]]:
        """Everything in the log and then what comes, as StreamReader.follow says."""
        subject = subject or subjects.log(self.run)
        async for found in self._reader.follow(subject, after, poll_s=poll_s, hint=hint):
            events = [stored for raw in found if (stored := self._stored(raw)) is not None]
            if events or not found:  # else it would say that the end was reached
                yield events

    def _stored(self, raw: Raw) -> Stored | None:
        try:
            return Stored(raw.seq, raw.time_s, raw.subject, read_event(raw))
        except BadMessage as error:
            self.junk += 1
            log.warning("junk in the log; skipped", seq=raw.seq, error=str(error))
            return None


def fold_stored(state: Trajectory | None, stored: Stored) -> Trajectory | None:
    """`fold` for a reader of the log: an event that cannot follow is junk, skipped with a warning."""
    event = stored.event
    assert isinstance(event, TrajectoryEvent)
    try:
        return fold(state, event, stored.seq)
    except ValueError as error:
        log.warning("junk in the log; skipped", seq=stored.seq, error=str(error))
        return state


@asynccontextmanager
async def open_log(bus: Bus, run: str) -> AsyncIterator[Log]:
    """One run's log, with a reader of its own."""
    async with open_reader(bus, subjects.LOG_STREAM) as reader:
        yield Log(bus, run, reader)
