"""Joins a role to the bus. Actors know none of this.

A hop: take the wake-up → handle → append the event, only if the trajectory has not moved → wake the next stage →
acknowledge. Killed anywhere in it, the wake-up comes again and finds the log as it is: before the append the hop is
taken again, after it the next stage is woken again. The loser of a race reads the winner and does the same.

What may fail, and where it is named: the handler (its boundary, by HopFailed), the bus within it or around it
(`bus`), a message that is none (`bus.bad_message`), a hop whose holders die again and again
(`<boundary>.holder_died`). Each ends as a dead letter, from which the dispatcher makes the trajectory's one `failed`;
silence is the dispatcher's to see.
"""

import asyncio
import math
import os
import random
import time
import traceback
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars, bound_contextvars

from actors import metrics
from actors.actor import Actor, HopFailed
from actors.heartbeat import HeartbeatThread, Vitals, replica_name
from bus import subjects
from bus.connection import Bus, Endpoint, connect, wait
from bus.dead import publish_dead
from bus.errors import (
    BadMessage,
    BusError,
    Conflict,
    Denied,
    Full,
    Missing,
    TooLarge,
    Unavailable,
)
from bus.log import Log, open_log
from bus.subjects import Stage
from bus.work import Delivery, WorkQueue, open_queue, publish_work
from schemas.events import Boundary, Ended, Opened, Started, Stopping
from schemas.messages import DeadLetter, RoleName, Work
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory, fold

log = structlog.get_logger()

_RETRY_DELAY_S = 0.5
_HELD_HERE_DELAY_S = 10.0
_LAG_PERIOD_S = 0.25
_SUSPECT_DELIVERIES = 3
"""From so many on a hop is taken by itself among its like: one of them may be what kills its holders."""
_MAX_DELIVERIES = 10
"""Beyond it a hop is taken for one that kills its holders. Kills from outside do not strike one hop so often."""
_BOUNDARY: dict[Stage, Boundary] = {"gen": "engine", "tool": "tool", "score": "scorer"}


@dataclass
class Process:
    """One replica of one role, joined to the bus."""

    bus: Bus
    log: Log
    recipe: Recipe
    recipe_dir: str
    vitals: Vitals
    stopping: asyncio.Event
    """Set when it was told to stop, or the link is gone."""

    @property
    def run(self) -> str:
        """The run's name."""
        return self.vitals.run

    @property
    def replica(self) -> str:
        """`<role>-<host>-<pid>`."""
        return self.vitals.replica

    async def unless_stopping(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether the work was done before we were told to stop; it is cancelled otherwise. Raises what it raises."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self.stopping.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if tasks[0].cancelled():
            return False
        tasks[0].result()
        return True


async def opened(run_log: Log) -> Opened | None:
    """The run's newest recipe; None when there is no such run."""
    found: Opened | None = None
    async for stored in run_log.read(subjects.run_event(run_log.run, "opened")):
        if isinstance(stored.event, Opened):
            found = stored.event
    return found


async def until_over(run_log: Log) -> bool:
    """Until the run ends, or is told to stop from now on; whether it has ended."""
    old = True
    async for found in run_log.follow(subject=subjects.run_event(run_log.run)):
        for stored in found:
            if isinstance(stored.event, Ended):
                return True
            if isinstance(stored.event, Stopping) and not old:
                return False
        old = old and bool(found)
    return False


@asynccontextmanager
async def join(
    endpoint: Endpoint, run: str, role: RoleName, stopping: asyncio.Event, pid: int | None = None
) -> AsyncIterator[Process]:
    """Connect, read the run's recipe and give signs of life for as long as the block runs.

    `pid`: by which the replica is known, if not this process's own.
    """
    vitals = Vitals(run=run, role=role, replica=replica_name(role, pid or os.getpid()))
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(endpoint, vitals.replica))
        # the others would lose a hop, a step; what the dispatcher does not get done it decides anew
        bus.waits_when_full = role != "dispatcher"
        run_log = await stack.enter_async_context(open_log(bus, run))
        event = await opened(run_log)
        if event is None:
            raise Missing(f"run {run!r} at {endpoint.url}")
        stack.enter_context(metrics.serving(vitals, lambda: bus.client.is_connected))
        heartbeat = HeartbeatThread(endpoint, vitals)
        heartbeat.start()
        stack.callback(heartbeat.stop)
        lag = asyncio.create_task(_note_lag(vitals), name="note lag")
        end = asyncio.create_task(_stop_when_closed(bus, stopping), name="stop when closed")
        stack.callback(lag.cancel)
        stack.callback(end.cancel)
        yield Process(bus, run_log, event.recipe, event.recipe_dir, vitals, stopping)


async def _note_lag(vitals: Vitals) -> None:
    """Tell the heartbeat thread that this loop still runs."""
    while True:
        vitals.loop_ran_s = time.monotonic()
        await asyncio.sleep(_LAG_PERIOD_S)


async def _stop_when_closed(bus: Bus, stopping: asyncio.Event) -> None:
    await bus.closed.wait()
    stopping.set()


class Hops:
    """Serves one stage's queues with one actor until told to stop."""

    def __init__(self, process: Process, actor: Actor) -> None:
        self._process = process
        self._actor = actor
        self._tools: asyncio.Queue[str] = asyncio.Queue()
        self._suspects = asyncio.Lock()

    def add(self, tool: str) -> None:
        """Serve one more tool's queue."""
        self._tools.put_nowait(tool)

    async def serve(self, tools: Sequence[str], slots: int) -> None:
        """Take hops until the process is stopping; then finish or hand back what is held."""
        process = self._process
        process.vitals.phase = ""
        metrics.begin_stage(self._actor.stage)
        for tool in tools:
            self.add(tool)
        queues: list[WorkQueue] = []
        takers: list[asyncio.Task[None]] = []
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:

            async def open_queues() -> None:
                while True:
                    tool = await self._tools.get()
                    opened = open_queue(
                        process.bus, self._actor.stage, process.run, tool, slots=slots
                    )
                    queue = await stack.enter_async_context(opened)
                    queues.append(queue)
                    takers.extend(group.create_task(self._take(queue)) for _ in range(slots))

            opener = group.create_task(open_queues())
            await process.stopping.wait()
            opener.cancel()
            await self._drain(queues)
            for taker in takers:
                taker.cancel()

    async def _drain(self, queues: Sequence[WorkQueue]) -> None:
        self._process.vitals.phase = "draining"
        for queue in queues:
            queue.drain()
        await self._actor.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._process.recipe.deadlines.drain_s):
                for queue in queues:
                    await queue.empty()

    async def _take(self, queue: WorkQueue) -> None:
        while True:
            delivery = await queue.take()
            # what a hop binds is its own: the task goes on to the next
            about = {"trajectory": "", "attempt": delivery.deliveries, "policy_version": -1}
            with bound_contextvars(stage=self._actor.stage, **about):
                await self._finish(delivery)

    async def _finish(self, delivery: Delivery) -> None:
        """Take the hop until the log and the queues confirm it; what a server that is there refuses has failed.

        It stays here meanwhile: given back, it would come again at once, and count as one more holder that died.
        """
        process = self._process
        again, refusals = False, 0
        if delivery.redelivered:
            metrics.REDELIVERED.labels(self._actor.stage).inc()
        while not process.stopping.is_set():
            try:
                if refusals < process.recipe.deadlines.handler_failures:
                    await self._hop(delivery, again=again)
                else:
                    why = f"not confirmed {refusals} times"
                    await self._put_aside(delivery, HopFailed("bus", "unconfirmed", why))
                return
            except BusError as error:
                log.warning("hop not confirmed", error=str(error))
                again = True
                # no room, or no server that answers: both are waited for, however long
                outage = isinstance(error, Unavailable) and not error.refused
                waits = outage or isinstance(error, Full)
                refusals = 0 if waits else refusals + 1
            await wait(process.stopping, _RETRY_DELAY_S)
        await delivery.give_back()

    async def _hop(self, delivery: Delivery, *, again: bool) -> None:
        process = self._process
        try:
            work = delivery.work()
        except BadMessage as error:
            await self._put_aside(delivery, HopFailed("bus", "bad_message", str(error)))
            return
        bind_contextvars(
            trajectory=work.trajectory,
            attempt=delivery.deliveries + work.failures,
            policy_version=process.vitals.policy_version,
        )
        state = work.state
        # a reward is for what the log says, whoever woke the scorer
        doubted = again or delivery.redelivered or work.failures or self._actor.stage == "score"
        if state is None or doubted or state.id != work.trajectory:
            state = await process.log.trajectory(work.trajectory, work.seq)
        if state is None or state.seq != work.seq:
            await self._moved_on(state, delivery)
            return
        hop = state.next_hop
        if (
            hop is None
            or hop.stage != self._actor.stage
            or delivery.subject != subjects.work(hop.stage, process.run, hop.tool)
        ):
            await delivery.done()
        elif (state.id, state.seq) in process.vitals.held:
            # a sweep, or delivered again after a stall: it is worked on here, or this replica will be killed for it
            if delivery.redelivered:
                await delivery.give_back(_HELD_HERE_DELAY_S)
            else:
                await delivery.done()
        else:
            # by sequence: the next hop of this trajectory may be ours too, and come before this one is let go
            process.vitals.held[state.id, state.seq] = (self._actor.stage, math.inf)
            try:
                await self._suspected(state, work, delivery)
            finally:
                del process.vitals.held[state.id, state.seq]

    async def _suspected(self, state: Trajectory, work: Work, delivery: Delivery) -> None:
        """A hop that came again and again may be what kills its holders: then no other suspect dies with it."""
        if delivery.deliveries > _MAX_DELIVERIES:
            why = f"given out {delivery.deliveries - 1} times, and its holder died, hung or gave it back each time"
            died = HopFailed(_BOUNDARY[self._actor.stage], "holder_died", why)
            await self._put_aside(delivery, died, state)
        elif delivery.deliveries >= _SUSPECT_DELIVERIES:
            await asyncio.sleep(
                random.random()
            )  # in any order, lest the same one be first each time
            async with self._suspects:
                await self._advance(state, work, delivery)
        else:
            await self._advance(state, work, delivery)

    async def _advance(self, state: Trajectory, work: Work, delivery: Delivery) -> None:
        process = self._process
        held = state.id, state.seq
        begun_s = time.monotonic()
        process.vitals.held[held] = (self._actor.stage, begun_s)
        try:
            event = await self._actor.handle(state)
            if isinstance(
                event, Started
            ):  # who has appended it acts, and no other: it is no hop of its own
                state = fold(state, event, await process.log.append(event, state.seq))
                event = await self._actor.handle(state)
        except HopFailed as error:
            await self._failed(state, work, delivery, error)
            return
        except Conflict:
            await self._moved_on(await process.log.trajectory(state.id, state.seq + 1), delivery)
            return
        except (Denied, Full, Unavailable):
            raise  # a wrong login, or the server's state: the trajectory has not failed
        except BusError as error:
            code = type(error).__name__.lower()
            await self._failed(state, work, delivery, HopFailed("bus", code, str(error)))
            return
        except Exception as error:  # noqa: BLE001 (logged in `_crash`)
            # fails its own trajectory, with its name, and never the run
            crash = _crash(self._actor.stage, error)
            await self._failed(state, work, delivery, crash)
            return
        # from here on it is the log that is waited for: a full disk does not make a replica hang
        process.vitals.held[held] = (self._actor.stage, math.inf)
        try:
            seq = await process.log.append(event, state.seq)
        except Conflict:
            await self._moved_on(await process.log.trajectory(state.id, state.seq + 1), delivery)
            return
        except TooLarge as error:
            await self._failed(state, work, delivery, HopFailed("bus", "toolarge", str(error)))
            return
        metrics.committed(self._actor.stage, state, event, time.monotonic() - begun_s)
        # with barriers the dispatcher wakes the next stage
        if not process.recipe.asynchrony.barriers:
            await publish_work(process.bus, process.run, fold(state, event, seq))
        await delivery.done()

    async def _moved_on(self, state: Trajectory | None, delivery: Delivery) -> None:
        """The log is ahead of this wake-up: make sure that the next stage knows, and let go."""
        metrics.MOVED_ON.labels(self._actor.stage).inc()
        if state is not None:
            await publish_work(self._process.bus, self._process.run, state)
        await delivery.done()

    async def _failed(
        self, state: Trajectory, work: Work, delivery: Delivery, error: HopFailed
    ) -> None:
        """Try again a few times, then put the message aside; the dispatcher ends the trajectory."""
        process = self._process
        failures = work.failures + 1
        cause = f"{error.boundary}.{error.code}"
        log.warning("hop failed", failures=failures, cause=cause, error=error.detail)
        metrics.HOP_FAILURES.labels(self._actor.stage, cause).inc()
        if failures < process.recipe.deadlines.handler_failures and not error.final:
            await asyncio.sleep(_RETRY_DELAY_S * failures)
            await publish_work(process.bus, process.run, state, failures=failures)
        else:
            await self._put_aside(delivery, error, state)
            return
        await delivery.done()

    async def _put_aside(
        self, delivery: Delivery, error: HopFailed, state: Trajectory | None = None
    ) -> None:
        """A dead letter instead of the message; the dispatcher ends the trajectory if it has not moved."""
        process = self._process
        name, seq = (state.id, state.seq) if state else _about(delivery)
        letter = DeadLetter(
            stage=self._actor.stage,
            run=process.run,
            error=error.detail,
            payload=delivery.payload,
            trajectory=name,
            seq=seq,
            boundary=error.boundary,
            code=error.code,
            replica=process.replica,
        )
        await publish_dead(process.bus, letter)
        metrics.DEAD_LETTERS.labels(self._actor.stage).inc()
        await delivery.done()


def _crash(stage: Stage, error: Exception) -> HopFailed:
    """An exception that no handler expects, with its traceback in our log.

    Of a reward nothing but the kind and the place is told: its message may quote the private answer.
    """
    boundary = _BOUNDARY[stage]
    if stage != "score":
        log.warning("actor crashed", exc_info=error)
        return HopFailed(boundary, "crashed", repr(error))
    *_, last = traceback.extract_tb(error.__traceback__)
    place = f"{last.filename}:{last.lineno}, in {last.name}"
    return HopFailed(boundary, "crashed", f"{type(error).__name__} at {place}")


def _about(delivery: Delivery) -> tuple[str, int]:
    """The trajectory and sequence that a message names; nothing for one that cannot be read."""
    try:
        work = delivery.work()
    except BadMessage:
        return "", 0
    return work.trajectory, work.seq
