"""The gateway: actions of policies elsewhere become trajectories of this run, by VerlTool's protocol.

    action → admitted (the first), turn → the toolbox's result → answer        finish → finished

Nothing is kept here that the log does not say, but who was answered: the actions of a trajectory may come to any
gateway, and one that is sent again, since its gateway or its connection died, is not run again. The dispatcher sweeps,
fails and expires as everywhere.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from actors.calling import Toolset
from actors.fleet import Fleet
from actors.gateway_actions import Actions, observation, prepared
from actors.gateway_requests import Action, Answer
from actors.images import load_image
from actors.process import Process
from bus import subjects
from bus.codec import encode
from bus.connection import Message, wait
from bus.errors import Conflict, Unavailable
from bus.log import fold_stored
from bus.room import shortage
from bus.work import publish_work
from schemas.events import (
    TERMINAL,
    Admitted,
    AnyEvent,
    Expired,
    Failed,
    Finished,
    Paused,
    Result,
    Resumed,
    Turn,
)
from schemas.images import StoredImage
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, TrajectoryId, fold

_LOOK_S = 2.0
"""How often a waiting action looks at the log by itself: the server's hint may be lost."""
_ROOM_S = 1.0
_KNOWN = 1024
"""Trajectories that are not read from the log again for each action."""
_TOLD = 100_000
_ENDED = Answer("", done=True, valid=True)
T = TypeVar("T")

_PLAIN = re.compile(r"[A-Za-z0-9_]{1,64}")


class TooLarge(Exception):
    """An action, or what came with it, fits into no message."""


class NotNow(Exception):
    """Nothing new may begin; the same request may be sent again later."""


class Gateway:
    """Answers actions; many at once, those of one trajectory one after another."""

    def __init__(self, process: Process, toolset: Toolset, fleet: Fleet) -> None:
        """`toolset`: its format is `Actions`."""
        self._process = process
        self._fleet = fleet
        self._toolset = toolset
        self._load = partial(load_image, process.bus, process.run)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By the trainer's name of a trajectory."""
        self._known: dict[str, Trajectory] = {}
        """The same; perhaps behind the log, which refuses what is appended to an old state."""
        self._waiting: dict[str, asyncio.Event] = {}
        """By trajectory; set when it has moved."""
        self._told: dict[str, int] = {}
        """By the trainer's name: the sequence of the last state whose answer its client was there to take."""
        self._paused = False
        self._shortage = ""

    def observe(self, event: AnyEvent | None) -> None:
        """Take an event of the run itself in: which tools there are, and whether trajectories may begin."""
        self._toolset.take(event)
        if isinstance(event, Paused | Resumed):
            self._paused = isinstance(event, Paused)

    async def hear(self) -> None:
        """Be told of what ends a wait."""

        async def on_event(message: Message) -> None:
            if event := self._waiting.get(message.subject.split(".")[3]):
                event.set()

        for kind in (Result, *TERMINAL):
            subject = subjects.trajectory(self._process.run, "*", kind.__name__.lower())
            await self._process.bus.subscribe(subject, on_event)

    async def watch_room(self) -> None:
        """Look whether there is room for new trajectories; never ends."""
        while True:
            with suppress(Unavailable):
                self._shortage = await shortage(self._process.bus)
            await asyncio.sleep(_ROOM_S)

    async def answer(self, action: Action) -> Answer:
        """Run what the action calls. Raises TooLarge, NotNow, BusError."""
        lock = self._locks.setdefault(action.trajectory, asyncio.Lock())
        async with lock:
            if action.finish:
                await self._finish(action.trajectory, "told to finish")
                return _ENDED
            state = await self._take_turn(action)
            if isinstance(state.end, Failed | Expired):
                return _broken(state, state.end)
            if state.end is not None:  # finished through another gateway while its call ran
                return _ENDED
            answer = await self._show(action, state)
            if answer.done or action.last:
                await self._finish(action.trajectory, "done" if answer.done else "last step")
            return answer

    def told(self, trainers: str) -> None:
        """The last answer to this trajectory is with its client: the same action again is another."""
        if known := self._known.get(trainers):
            _put_newest(self._told, trainers, known.seq, _TOLD)

    # -- the log -----------------------------------------------------------------------------------

    async def _current(self, trainers: str) -> tuple[str, Trajectory | None]:
        """Our name of a trainer's trajectory, and its state if it has begun; once finished it may begin anew."""
        known = self._known.get(trainers)
        life = TrajectoryId.parse(known.id).member if known else 0
        while True:
            name = name_of(trainers, life)
            fresh = known is None or known.id != name
            state = await self._process.log.trajectory(name) if fresh else known
            if state is None or not isinstance(state.end, Finished):
                return name, state
            life += 1

    def _remember(self, trainers: str, state: Trajectory) -> Trajectory:
        _put_newest(self._known, trainers, state, _KNOWN)
        return state

    async def _append(
        self, trainers: str, state: Trajectory | None, event: Admitted | Turn | Finished
    ) -> Trajectory | None:
        """The state after the event; None when the trajectory had moved, so that it must be looked at again."""
        limit = self._process.bus.client.max_payload
        size = len(encode(event))
        if size > limit - 1024:
            raise TooLarge(f"{event.kind}: {size} bytes; a message of the bus holds {limit}")
        try:
            seq = await self._process.log.append(event, state.seq if state else 0)
        except Conflict:
            self._known.pop(trainers, None)
            return None
        return self._remember(trainers, fold(state, event, seq))

    async def _take_turn(self, action: Action) -> Trajectory:
        """The state after the action's results, or after its trajectory has failed or expired."""
        while True:
            name, state = await self._current(action.trajectory)
            if state is None:
                if why := "the run is paused" if self._paused else self._shortage:
                    raise NotNow(f"no new trajectory: {why}")
                state = await self._append(action.trajectory, None, self._admitted(name, action))
            if state is None:
                continue
            if state.end is not None:
                return state
            if state.next_hop is not None:  # another gateway took it, or its trainer asks again
                again = state.turns[-1].text == action.text
                state = await self._until_answered(action.trajectory, state, look=True)
                if again:
                    return state
                continue
            if self._sent_again(action, state):
                return self._remember(action.trajectory, state)
            state = await self._append(action.trajectory, state, self._turn(name, action))
            if state is not None:
                return await self._until_answered(action.trajectory, state)

    def _sent_again(self, action: Action, state: Trajectory) -> bool:
        """Whether the last turn is this action, and its answer reached nobody, as far as can be known."""
        if not state.turns or state.turns[-1].text != action.text:
            return False
        if self._told.get(action.trajectory) == state.seq:
            return False
        taker = state.turns[-1].replica
        alive = (beat.replica for beat in self._fleet.alive())
        return taker == self._process.replica or taker not in alive

    async def _until_answered(
        self, trainers: str, state: Trajectory, *, look: bool = False
    ) -> Trajectory:
        """Have the calls of the last turn run, and wait for their results, or for the trajectory's end.

        The dispatcher owns the deadline. `look`: the log may be ahead already.
        """
        process = self._process
        moved = self._waiting[state.id] = asyncio.Event()
        subject = subjects.trajectory(process.run, state.id)
        try:
            await publish_work(process.bus, process.run, state)
            while state.next_hop is not None:
                if not look:
                    await wait(moved, _LOOK_S)
                look = False
                moved.clear()
                with suppress(Unavailable):  # a server that restarts is waited for
                    async for stored in process.log.read(subject, state.seq):
                        state = fold_stored(state, stored) or state
        finally:
            del self._waiting[state.id]
        return self._remember(trainers, state)

    async def _finish(self, trainers: str, reason: str) -> None:
        while True:
            name, state = await self._current(trainers)
            if state is None or state.end is not None:
                return
            event = Finished(trajectory=name, replica=self._process.replica, reason=reason)
            if await self._append(trainers, state, event):
                del self._known[trainers]  # all that it was told is not needed any more
                return

    # -- actions and answers -----------------------------------------------------------------------

    def _admitted(self, name: str, action: Action) -> Admitted:
        return Admitted(
            trajectory=name,
            replica=self._process.replica,
            task=action.trajectory,
            public=PublicPart(messages=[], extra=task_extra(action.extra)),
            private_key="",
            purpose="external",
        )

    def _turn(self, name: str, action: Action) -> Turn:
        parsed = self._toolset.calling.parse(action.text, None)
        calls = [prepared(call, action.extra) for call in parsed.calls]
        return Turn(
            trajectory=name,
            replica=self._process.replica,
            tokens=Tokens(),
            text=action.text,
            calls=[] if parsed.ends else calls,
            feedback=parsed.feedback,
        )

    async def _show(self, action: Action, state: Trajectory) -> Answer:
        """What the client is told of the last turn."""
        turn = state.turns[-1]
        if not turn.calls:
            return self._without_call(action.text, turn.feedback)
        results = state.results_of(len(state.turns) - 1)
        shown = observation(action.text, turn.calls, results, action.extra)
        images = [await self._uri(image) for result in results for image in result.images]
        if turn.feedback or images:
            told = {"obs": shown} if isinstance(shown, str) else shown
            told["obs"] += turn.feedback
            shown = told | ({"image": images} if images else {})
        return Answer(shown, done=False, valid=True, tool=turn.calls[0].tool)

    def _without_call(self, text: str, feedback: str) -> Answer:
        actions = self._toolset.calling.shown(None)
        assert isinstance(actions, Actions)
        if self._toolset.calling.parse(text, None).ends:
            return _ENDED
        if not feedback and actions.answers(text):
            return Answer("", done=True, valid=False)
        invalid = {
            "obs": feedback,
            "invalid_reason": feedback or "No valid tool found for action",
            "available_tools": actions.explain(),
        }
        done = self._process.recipe.gateway.done_if_invalid
        return Answer(invalid, done=done, valid=False)

    async def _uri(self, stored: StoredImage) -> str:
        data = base64.b64encode((await self._load(stored)).data).decode()
        return f"data:{stored.media_type};base64,{data}"


def _put_newest(table: dict[str, T], key: str, value: T, limit: int) -> None:
    """Put a value last; the first goes when there are too many."""
    table.pop(key, None)
    table[key] = value
    if len(table) > limit:
        del table[next(iter(table))]


def name_of(trainers: str, life: int) -> str:
    """Our name of what a trainer calls its trajectory; `life` counts those that it has finished before."""
    plain = _PLAIN.fullmatch(trainers)
    digest = hashlib.sha256(trainers.encode()).hexdigest()[:32]
    return str(TrajectoryId(f"x_{trainers}" if plain else f"x{digest}", life, 0))


def task_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What tools are told of the task: the first action's extra fields, and the database by the name it has here."""
    database = next(
        (extra[key] for key in ("database", "db_path", "db_id") if extra.get(key)), None
    )
    return {**extra, **({"database": database} if database else {})}


def _broken(state: Trajectory, end: Failed | Expired) -> Answer:
    """Infrastructure failed, or the trajectory was left alone too long: as VerlTool tells of a tool that raised."""
    call = state.next_call
    tool = call[1].tool if call else ""
    cause = str(end.cause) if isinstance(end, Failed) else "expired"
    detail = end.cause.detail if isinstance(end, Failed) else end.reason
    told = {
        "obs": "",
        "error": f"Tool processing failed: {cause}: {detail}",
        "invalid_reason": cause,
        "tool_type": tool,
    }
    return Answer(told, done=True, valid=False, tool=tool, cause=cause)
