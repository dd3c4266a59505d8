"""Joins the dispatcher to the bus: folds the log into it and carries out what it decides."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable
from typing import Any

import structlog

from actors.data import evaluation_rows, training_rows
from actors.decisions import Admit, Decision, End, Finish, Sweep, View, Wake
from actors.dispatcher import Dispatcher
from actors.fleet import Fleet
from actors.process import Process
from bus import policy, private, subjects
from bus.errors import BusError, Conflict, Unavailable
from bus.lease import Lease
from bus.log import Stored, fold_stored, follow_dead
from bus.work import backlog, publish_again, publish_work
from schemas.events import Admitted, TrajectoryEvent
from schemas.messages import DeadLetter
from schemas.trajectory import Trajectory

log = structlog.get_logger()

_PATROL_S = 1.0
_POLL_S = 0.1
_APPENDS_AT_ONCE = 32


class Dispatching:
    """One dispatcher process: the holder of the lease, or its standby."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._fleet = Fleet()
        recipe, folder = process.recipe, process.recipe_dir
        self._dispatcher = Dispatcher(
            recipe,
            training_rows(recipe.data, recipe.seed, folder),
            evaluation_rows(recipe.evaluation, recipe, folder),
            process.replica,
        )
        self._policy_version = -1
        self._backlog: frozenset[str] = frozenset()
        self._patrol_s = 0.0
        self._letters: asyncio.Queue[DeadLetter] = asyncio.Queue()
        self._appends = asyncio.Semaphore(_APPENDS_AT_ONCE)
        self._states: dict[str, Trajectory | None] = {}
        """With barriers: what is to be woken, folded here so that a barrier costs no reading."""

    async def serve(self) -> None:
        """Wait for the lease, then act until it is lost, the run ends or we are told to stop."""
        process = self._process
        lease = Lease(process.bus, process.run, "dispatcher", process.replica)
        await self._fleet.hear(process.bus, process.run)
        process.vitals.phase = "standby"
        if not await self._unless_stopping(lease.acquire()):
            return
        process.vitals.phase = ""
        tasks = [
            asyncio.ensure_future(each)
            for each in (
                lease.keep(),
                self._act(),
                self._follow_policy(),
                self._follow_dead(),
                process.stopping.wait(),
            )
        ]
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.wait(tasks)
        await lease.release()
        for task in done:
            task.result()

    async def _unless_stopping(self, wait: Coroutine[Any, Any, None]) -> bool:
        """Whether the wait ended before we were told to stop."""
        waiting = asyncio.ensure_future(wait)
        stop = asyncio.ensure_future(self._process.stopping.wait())
        await asyncio.wait({waiting, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (waiting, stop):
            task.cancel()
        return waiting.done() and not waiting.cancelled()

    async def _follow_policy(self) -> None:
        async for pointer in policy.follow(self._process.bus, self._process.run):
            self._policy_version = self._process.vitals.policy_version = pointer.policy_version

    async def _follow_dead(self) -> None:
        async for letters in follow_dead(self._process.bus, self._process.run):
            for letter in letters:
                self._letters.put_nowait(letter)

    async def _act(self) -> None:
        """Fold what comes; at the end of what is stored, decide."""
        run = self._process.run
        barriers = self._process.recipe.asynchrony.barriers
        # the learner's events free slots; with barriers every event may be the last that all wait for
        hint = subjects.log(run) if barriers else subjects.learner(run, "*")
        async for found in self._process.log.follow(poll_s=_POLL_S, hint=hint):
            now = time.monotonic()
            for stored in found:
                self._observe(stored, now)
            if found:
                continue
            if self._dispatcher.ended:
                return
            await self._carry_out(await self._decisions(now))

    async def _decisions(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        if now_s - self._patrol_s >= _PATROL_S:
            self._patrol_s = now_s
            with contextlib.suppress(Unavailable):
                self._backlog = await backlog(
                    self._process.bus, self._process.run, self._process.recipe.tools.names
                )
            decisions += self._dispatcher.patrol(self._view(now_s))
            self._say_how_it_goes()
        while not self._letters.empty():
            decisions += self._dispatcher.fail(self._letters.get_nowait())
        return [*decisions, *self._dispatcher.decide(self._view(now_s))]

    def _view(self, now_s: float) -> View:
        alive = self._fleet.alive()
        return View(
            now_s=now_s,
            policy_version=self._policy_version,
            generators=sum(beat.role == "generator" for beat in alive),
            held=frozenset(held.trajectory for beat in alive for held in beat.held),
            backlog=self._backlog,
        )

    def _say_how_it_goes(self) -> None:
        cause = self._dispatcher.failing_cause
        phase = f"admission backs off: most trajectories fail with {cause}" if cause else ""
        if self._dispatcher.paused:
            phase = "paused"
        if phase != self._process.vitals.phase:
            self._process.vitals.phase = phase
            if phase:
                log.warning(phase)

    def _observe(self, stored: Stored, now_s: float) -> None:
        self._dispatcher.observe(stored.event, stored.seq, now_s)
        event = stored.event
        if self._process.recipe.asynchrony.barriers and isinstance(event, TrajectoryEvent):
            self._states[event.trajectory] = fold_stored(self._states.get(event.trajectory), stored)
        elif not self._dispatcher.live:
            self._states.clear()

    async def _carry_out(self, decisions: Iterable[Decision]) -> None:
        async with asyncio.TaskGroup() as group:
            for decision in decisions:
                group.create_task(self._do(decision))

    async def _do(self, decision: Decision) -> None:
        try:
            if isinstance(decision, Admit):
                await self._admit(decision)
            elif isinstance(decision, End):
                await self._end(decision)
            elif isinstance(decision, Sweep):
                await self._sweep(decision.trajectory)
            elif isinstance(decision, Wake):
                await self._wake(decision.trajectory)
            else:
                assert isinstance(decision, Finish)
                await self._process.log.append_run(decision.event)
        except BusError as error:
            log.warning("not done; decided anew", decision=repr(decision)[:200], error=str(error))

    async def _admit(self, decision: Admit) -> None:
        process = self._process
        if decision.private is not None:
            key = decision.events[0].private_key
            await private.put_private(process.bus, process.run, key, decision.private)
        await asyncio.gather(*(self._admit_one(event) for event in decision.events))

    async def _admit_one(self, event: Admitted) -> None:
        process = self._process
        async with self._appends:
            try:
                seq = await process.log.append(event, 0)
            except Conflict:
                return  # admitted before; the log will show it
            self._dispatcher.observe(event, seq, time.monotonic())
            await publish_work(process.bus, process.run, Trajectory(admitted=event, seq=seq))

    async def _end(self, decision: End) -> None:
        async with self._appends:
            for event, after in decision.events:
                try:
                    seq = await self._process.log.append(event, after)
                except Conflict:
                    return  # it has moved: decided anew when the log shows how
                self._dispatcher.observe(event, seq, time.monotonic())

    async def _wake(self, trajectory: str) -> None:
        state = self._states.get(trajectory)
        if state is not None:
            await publish_work(self._process.bus, self._process.run, state)

    async def _sweep(self, trajectory: str) -> None:
        state = await self._process.log.trajectory(trajectory)
        if state is not None:
            log.warning("swept", trajectory=trajectory, stage=state.next_hop)
            await publish_again(self._process.bus, self._process.run, state)
