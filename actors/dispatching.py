"""Joins the dispatcher to the bus: folds the log into it and carries out what it decides."""

import asyncio
import contextlib
import time
from collections.abc import Iterable

import structlog
from msgspec import structs

from actors import metrics
from actors.cleaning import delete_orphaned_blobs
from actors.data import evaluation_rows, training_rows
from actors.decisions import Admit, Decision, End, Finish, Sweep, View, Wake
from actors.dispatcher import Dispatcher
from actors.errors import RecipeError
from actors.fleet import HEARD_S, Fleet
from actors.images import store_images
from actors.learner import NAME, is_shadow
from actors.process import Process
from actors.row_images import load_row_image, with_images
from actors.watchdog import Sight, Waiting, Watchdog
from bus import policy, private, subjects
from bus.bookmark import read_bookmark, write_bookmark
from bus.dead import follow_dead
from bus.errors import BusError, Conflict, TooLarge, Unavailable
from bus.lease import Lease
from bus.log import Stored, fold_stored
from bus.room import shortage
from bus.work import Queue, backlog, publish_work
from schemas.events import (
    Admitted,
    Dropped,
    Expired,
    Failed,
    ToolAdded,
    TrajectoryEvent,
)
from schemas.messages import DeadLetter
from schemas.trajectory import Trajectory

log = structlog.get_logger()

_PATROL_S = 1.0
_BACKLOG_S = 3.0
"""How long a patrol waits to hear of the queues; then it goes by what they were."""
_POLL_S = 0.1
_APPENDS_AT_ONCE = 32


class Dispatching:
    """One dispatcher process: the holder of the lease, or its standby."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._fleet = Fleet()
        self._policy_version = -1
        self._queues: dict[str, Queue] = {}
        self._shortage = ""
        self._patrol_s = 0.0
        self._appends = asyncio.Semaphore(_APPENDS_AT_ONCE)
        self._forget()

    def _forget(self) -> None:
        """Know nothing: all that the holder of the lease knows is folded from the log."""
        process = self._process
        recipe, folder = process.recipe, process.recipe_dir
        self._dispatcher = Dispatcher(
            recipe,
            training_rows(recipe.data, recipe.seed, folder),
            evaluation_rows(recipe.evaluation, recipe, folder),
            process.replica,
        )
        self._appended_seq = 0
        """Of the newest event of ours that was observed, read or not."""
        self._watchdog = Watchdog(recipe)
        self._tools = recipe.tools.names
        """The queues of tools; see Call."""
        self._letters: dict[str, DeadLetter] = {}
        """By trajectory, until the log shows that it has ended or moved."""
        self._states: dict[str, Trajectory] = {}
        """With barriers: what is to be woken, folded here so that a barrier costs no reading."""
        process.vitals.stalls = []
        process.vitals.phase = "standby"
        metrics.stop_acting()

    async def serve(self) -> None:
        """Wait for the lease and act; when it is lost, wait again, until the run ends or we are told to stop."""
        process = self._process
        await self._fleet.hear(process.bus, process.run)
        lease = Lease(process.bus, process.run, "dispatcher", process.replica)
        while await process.unless_stopping(lease.acquire()):
            process.vitals.phase = ""
            await self._hold(lease)
            if self._dispatcher.ended or process.stopping.is_set():
                return
            log.warning("lease lost")
            self._forget()

    async def _hold(self, lease: Lease) -> None:
        """Act until the lease is lost, the run ends or we are told to stop."""
        metrics.ACTING.set(1)
        tasks = [
            asyncio.ensure_future(each)
            for each in (
                lease.keep(),
                self._act(),
                self._follow_policy(),
                self._follow_dead(),
                self._watch_room(),
                delete_orphaned_blobs(self._process.bus),
                self._process.stopping.wait(),
            )
        ]
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.wait(tasks)
        await lease.release()
        for task in done:
            task.result()

    async def _follow_policy(self) -> None:
        async for pointer in policy.follow(self._process.bus, self._process.run):
            self._policy_version = self._process.vitals.policy_version = pointer.policy_version

    async def _follow_dead(self) -> None:
        async for letters in follow_dead(self._process.bus, self._process.run):
            self._letters |= {letter.trajectory: letter for letter in letters}

    async def _watch_room(self) -> None:
        """Look whether there is room for what may be admitted; on a task of its own, since a full log holds us up."""
        while True:
            await asyncio.sleep(_PATROL_S)
            await self._look_for_room()

    async def _look_for_room(self) -> None:
        with contextlib.suppress(Unavailable):
            self._shortage = await shortage(self._process.bus)
            self._say_how_it_goes()

    async def _act(self) -> None:
        """Fold what comes; at the end of what is stored, decide."""
        await self._look_for_room()
        run = self._process.run
        barriers = self._process.recipe.asynchrony.barriers
        # the learner's events free slots; with barriers every event may be the last that all wait for
        hint = subjects.log(run) if barriers else subjects.learner(run, NAME)
        read_seq = await self._resume()
        async for found in self._process.log.follow(read_seq, poll_s=_POLL_S, hint=hint):
            now = time.monotonic()
            for stored in found:
                self._observe(stored, now)
            if found:
                read_seq = found[-1].seq
                continue
            if self._dispatcher.ended:
                return
            await self._keep_place(read_seq)
            decisions = [await self._pictured(each) for each in await self._decisions(now)]
            await self._carry_out(each for each in decisions if each is not None)

    async def _resume(self) -> int:
        """Begin at the bookmark; returns where to read on. Of what was before, only the run's own events are read."""
        run_log = self._process.log
        try:
            last_seq = await run_log.last_seq()
            bookmark = await read_bookmark(self._process.bus, run_log.run, last_seq)
            if bookmark is None:
                return 0
            before = [each async for each in run_log.read(subjects.run_event(run_log.run))]
        except Unavailable:
            return 0
        self._dispatcher.resume(bookmark)
        for stored in before:
            if stored.seq <= bookmark.seq:
                self._observe(stored, time.monotonic())
        return bookmark.seq

    async def _keep_place(self, read_seq: int) -> None:
        """Write a bookmark now and then, where nothing of ours is known that is not read yet."""
        bookmark = self._dispatcher.mark(read_seq) if read_seq >= self._appended_seq else None
        if bookmark is not None:
            with contextlib.suppress(BusError):  # the next one will do
                await write_bookmark(self._process.bus, self._process.run, bookmark)

    async def _decisions(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        # after an outage the replicas need a moment to be heard again
        if now_s - self._patrol_s >= _PATROL_S and self._fleet.flows_s(now_s) > HEARD_S:
            self._patrol_s = now_s
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(_BACKLOG_S):
                    self._queues = await backlog(self._process.bus, self._process.run, self._tools)
            decisions += self._dispatcher.patrol(self._view(now_s))
            self._say_how_it_goes()
            self._watch(now_s)
        for name, letter in list(self._letters.items()):
            ends = self._dispatcher.fail(letter)
            decisions += ends
            if not ends:
                del self._letters[name]
        return [*decisions, *self._dispatcher.decide(self._view(now_s))]

    def _view(self, now_s: float) -> View:
        alive = self._fleet.alive()
        held: dict[str, float] = {}
        for beat in alive:
            for each in beat.held:
                held[each.trajectory] = min(each.for_s, held.get(each.trajectory, each.for_s))
        return View(
            now_s=now_s,
            policy_version=self._policy_version,
            generators=sum(beat.role == "generator" for beat in alive),
            held=held,
            queues=self._queues,
            shortage=self._shortage,
        )

    def _watch(self, now_s: float) -> None:
        """Tell of what stands still: in our heartbeat for as long as it does, in our log when it begins and ends."""
        live = {
            name: Waiting(
                each.stage, each.place.queue, each.moved_s, each.admitted.purpose == "train"
            )
            for name, each in self._dispatcher.live.items()
            if not each.outside
        }
        heard = self._fleet.heard(now_s)
        # a run that only serves tools waits for no version 0
        version = self._policy_version if self._process.recipe.policy.model else 0
        sight = Sight(now_s, live, heard, self._queues, version)
        metrics.show_work(sight)
        metrics.show_fleet(self._fleet.alive(), version)
        changes = self._watchdog.look(sight)
        self._process.vitals.stalls = changes.stalls
        for stall in changes.begun:
            log.warning("stall begins", stall=stall.kind, subject=stall.subject, what=str(stall))
        for stall in changes.ended:
            log.info("stall is over", stall=stall.kind, subject=stall.subject, what=str(stall))

    def _say_how_it_goes(self) -> None:
        cause = self._dispatcher.failing_cause
        paused, no_room = self._dispatcher.paused, bool(self._shortage)
        metrics.show_admission(paused=paused, no_room=no_room, failing=bool(cause))
        phase = f"admission backs off: most trajectories fail with {cause}" if cause else ""
        if self._shortage:
            phase = (
                f"admission stops: {self._shortage}; `actors archive` of a closed run makes room"
            )
        if self._dispatcher.paused:
            phase = "paused"
        if phase != self._process.vitals.phase:
            self._process.vitals.phase = phase
            if phase:
                log.warning(phase)

    def _observe(self, stored: Stored, now_s: float) -> None:
        if is_shadow(stored.learner):
            return
        self._dispatcher.observe(stored.event, stored.seq, now_s)
        event = stored.event
        if isinstance(event, ToolAdded) and event.queue not in self._tools:
            self._tools.append(event.queue)
        if not (self._process.recipe.asynchrony.barriers and isinstance(event, TrajectoryEvent)):
            return
        if isinstance(event, Admitted) or event.trajectory in self._states:
            state = fold_stored(self._states.pop(event.trajectory, None), stored)
            if state is not None and state.next_hop is not None:
                self._states[event.trajectory] = state

    async def _pictured(self, decision: Decision) -> Decision | None:
        """The decision, with the images of an admission put away; None when they cannot be now. Raises RecipeError."""
        if not isinstance(decision, Admit) or not decision.images:
            return decision
        process = self._process
        try:
            images = [
                await asyncio.to_thread(load_row_image, image, process.recipe_dir)
                for image in decision.images
            ]
            stored = await store_images(process.bus, process.run, images)
        except BusError as error:
            log.warning("images not put away; decided anew", error=str(error))
            return None
        public = with_images(decision.events[0].public, decision.images, stored)
        events = [structs.replace(event, public=public) for event in decision.events]
        return Admit(events, decision.private)

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
            what = type(decision).__name__  # an admission holds answers
            log.warning("not done; decided anew", decision=what, error=str(error))

    async def _admit(self, decision: Admit) -> None:
        """Raises RecipeError for a row of which no message holds a part: it would be decided anew for ever."""
        process = self._process
        first, part = decision.events[0], "private"
        try:
            if decision.private is not None:
                key = first.private_key
                await private.put_private(process.bus, process.run, key, decision.private)
            part = "public"
            await asyncio.gather(*(self._admit_one(event) for event in decision.events))
        except TooLarge as error:
            raise RecipeError(f"task {first.task}", part, str(error)) from error

    async def _admit_one(self, event: Admitted) -> None:
        process = self._process
        async with self._appends:
            try:
                seq = await process.log.append(event, 0)
            except Conflict:
                return  # admitted before; the log will show it
            self._appended(event, seq)
            await publish_work(process.bus, process.run, Trajectory(admitted=event, seq=seq))

    async def _end(self, decision: End) -> None:
        async with self._appends:
            for event, after in decision.events:
                seq = await self._append_end(event, after)
                if seq is None:
                    return  # it has moved: decided anew when the log shows how
                self._appended(event, seq)

    def _appended(self, event: Admitted | Expired | Failed | Dropped, seq: int) -> None:
        metrics.appended(event)
        self._appended_seq = max(self._appended_seq, seq)
        self._dispatcher.observe(event, seq, time.monotonic())

    async def _append_end(self, event: Expired | Failed | Dropped, after: int) -> int | None:
        """Append the end of a trajectory whose last event is at `after`, also behind junk; None when it has moved."""
        run_log = self._process.log
        with contextlib.suppress(Conflict):
            return await run_log.append(event, after)
        state = await run_log.trajectory(event.trajectory)  # its sequence counts junk
        valid: Trajectory | None = None
        async for stored in run_log.read(subjects.trajectory(run_log.run, event.trajectory)):
            valid = fold_stored(valid, stored)
        if state is None or valid is None or valid.seq != after:
            return None
        with contextlib.suppress(Conflict):
            return await run_log.append(event, state.seq)
        return None

    async def _wake(self, trajectory: str) -> None:
        state = self._states.get(trajectory)
        if state is not None:
            await publish_work(self._process.bus, self._process.run, state)

    async def _sweep(self, trajectory: str) -> None:
        state = await self._process.log.trajectory(trajectory)
        if state is not None:
            stage = state.next_hop.stage if state.next_hop else ""
            log.warning("swept", trajectory=trajectory, stage=stage)
            metrics.SWEPT.labels(stage).inc()
            await publish_work(self._process.bus, self._process.run, state, again=True)
