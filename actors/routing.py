"""Where a call runs: in the replica that holds its tool's session, and, where it acts on the world, once.

    no session         here
    session            here, if we hold it; else its holder is asked to run the call, and we append what it returns;
                       when there is none, we take it, make it anew (toolbox.py) and run the call
    effects outside    we append `started`, and act; whoever finds another's asks what came of it, and when nobody
                       knows any more, the trajectory fails instead of acting twice

Asking costs no lineage: whoever has the wake-up appends, and only if the trajectory has not moved.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ClassVar

from structlog.contextvars import bind_contextvars

from actors.actor import HopFailed
from actors.toolbox import Toolbox, key_of
from bus.codec import decode
from bus.errors import BusError
from bus.holders import Holders, Key
from bus.subjects import Stage
from bus.work import work_message
from schemas.events import Boundary, Cause, Event, Result, Started
from schemas.messages import Answer, Ask, Work
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory
from tools.tool import Tool

ReadTrajectory = Callable[[str, int], Awaitable[Trajectory | None]]
"""Folds one from the log."""

_CALL = tuple[int, int]
"""Turn and call."""
_TAKE_OVERS = 5
"""So often a session may slip away while we try to take it."""


class Routing:
    """The toolbox as an actor among its like."""

    stage: ClassVar[Stage] = "tool"
    produces: ClassVar[tuple[type[Event], ...]] = (Started, Result)

    def __init__(
        self, recipe: Recipe, toolbox: Toolbox, holders: Holders, read: ReadTrajectory, replica: str
    ) -> None:
        self.toolbox = toolbox
        self._holders = holders
        self._read = read
        self._replica = replica
        self._drain_s = recipe.deadlines.drain_s
        self._for_others = asyncio.Semaphore(recipe.toolbox.slots)
        """Calls that others may run here at once, beside our own."""
        self._acts: defaultdict[Key, dict[_CALL, asyncio.Future[Answer]]] = defaultdict(dict)
        """What came of the calls with effects outside that we have begun."""
        self._may_act: set[tuple[Key, _CALL]] = set()
        """Of them, those that have not acted yet."""
        holders.answer = self.answer
        toolbox.sessions.on_closed = self._let_go

    async def handle(self, state: Trajectory) -> Started | Result:
        """See Actor. Calls of tools with effects outside take two: `started`, then the result."""
        tool = self.toolbox.tool(state)
        if tool.effects == "none":
            return await self._run(state, tool)
        key, call = key_of(state), _call_of(state)
        begun = state.started
        if begun is None or (begun.turn, begun.call) != call:
            # others find us from the moment at which they see that we have begun
            await self._holders.listen(key)
            self._acts[key].setdefault(call, asyncio.Future())
            self._may_act.add((key, call))
            return Started(trajectory=state.id, replica=self._replica, turn=call[0], call=call[1])
        if self._may_still_act(state):
            return await self._act(state, tool, call)
        return _unpacked(await self._told(state, tool, begun.replica), final=True)

    # -- sessions ------------------------------------------------------------------------------------------

    async def _run(self, state: Trajectory, tool: Tool) -> Result:
        if not tool.session:
            return await self.toolbox.handle(state)
        key = key_of(state)
        for _ in range(_TAKE_OVERS):
            if self.toolbox.holds(state):
                return await self.toolbox.handle(state)
            held = await self._holders.find(key)
            if held.replica not in ("", self._replica):
                await self.toolbox.sessions.drop(key)  # ours, if there is one, is old
                answer = await self._holders.ask(key, held.replica, work_message(state))
                if answer is None and tool.effects == "external":
                    raise _unknown(held.replica)
                if answer is not None and answer != Answer():
                    return _unpacked(answer)
            if await self._holders.take(key, held.revision):
                return await self.toolbox.handle(state)
        raise HopFailed("tool", "contended", f"others took the session of {tool.name} each time")

    async def answer(self, key: Key, ask: Ask) -> Answer:
        """What we say to another replica that asks for what we hold."""
        try:
            work: Work = decode(ask.work, Work)
            bind_contextvars(stage=self.stage, trajectory=work.trajectory)
            state = work.state or await self._read(work.trajectory, work.seq)
            if state is None or state.seq != work.seq:
                return _refusal("bus", "moved_on", "the trajectory has moved")
            if not ask.run:
                if self._may_still_act(state):  # our own hop was lost on its way
                    return Answer(
                        result=await self._act(state, self.toolbox.tool(state), _call_of(state))
                    )
                return await self._known(state)
            if not self.toolbox.holds(state) and not await self._is_ours(key):
                return Answer()
            async with self._for_others:
                return Answer(result=await self.toolbox.handle(state))
        except HopFailed as error:
            return _refusal(error.boundary, error.code, error.detail)
        except BusError as error:
            return _refusal("bus", type(error).__name__.lower(), str(error))

    async def _is_ours(self, key: Key) -> bool:
        return (await self._holders.find(key)).replica == self._replica

    async def _let_go(self, key: Key) -> None:
        if key not in self._acts:  # else others may yet ask what came of a call
            with suppress(BusError):  # then whoever needs it asks in vain, and takes it
                await self._holders.let_go(key)

    # -- effects outside -----------------------------------------------------------------------------------

    def _begun_here(self, state: Trajectory) -> bool:
        """The log says so; another may have been first."""
        begun = state.started
        return (
            begun is not None
            and begun.replica == self._replica
            and (begun.turn, begun.call) == _call_of(state)
        )

    def _may_still_act(self, state: Trajectory) -> bool:
        return self._begun_here(state) and (key_of(state), _call_of(state)) in self._may_act

    async def _act(self, state: Trajectory, tool: Tool, call: _CALL) -> Result:
        key = key_of(state)
        self._may_act.discard((key, call))
        outcome = self._acts[key][call]
        answer = _refusal("tool", "outcome_unknown", "it was begun, and how it ended is not known")
        try:
            result = await self._run(state, tool)
            answer = Answer(result=result)
        except (HopFailed, BusError) as error:
            failed = _final(error)
            answer = _refusal(failed.boundary, failed.code, failed.detail)
            raise failed from error
        finally:
            outcome.set_result(answer)
        return result

    async def _told(self, state: Trajectory, tool: Tool, beginner: str) -> Answer:
        """What those say that may know what came of a call. Raises HopFailed when nobody does."""
        key, work = key_of(state), work_message(state)
        answer = await self._known(state)
        if answer == Answer():
            may_know = (
                [beginner, (await self._holders.find(key)).replica] if tool.session else [beginner]
            )
            for replica in dict.fromkeys(may_know):
                if replica not in ("", self._replica):
                    answer = await self._holders.ask(key, replica, work, run=False) or Answer()
                if answer != Answer():
                    return answer
            raise _unknown(beginner)
        return answer

    async def _known(self, state: Trajectory) -> Answer:
        """What came of the pending call, if it was begun or run here; nothing otherwise."""
        outcome = self._acts.get(key_of(state), {}).get(_call_of(state))
        if outcome is not None and self._begun_here(state):
            return await asyncio.shield(outcome)
        return Answer(result=await self.toolbox.known(state))

    # -- its end -------------------------------------------------------------------------------------------

    async def forget(self, trajectory: str) -> None:
        """A trajectory has ended: keep nothing of it."""
        begun = [key for key in self._acts if key.trajectory == trajectory]
        for key in begun:
            self._may_act -= {(key, call) for call in self._acts.pop(key)}
        await self.toolbox.forget(trajectory)
        for key in begun:
            await self._holders.let_go(key)

    async def drain(self) -> None:
        """See Actor. What others have begun here is finished, and they are answered until we are closed."""
        await self._holders.leave(self._drain_s)

    async def close(self) -> None:
        """Answer no more, and kill what still runs."""
        await self._holders.close()
        await self.toolbox.close()


def _call_of(state: Trajectory) -> _CALL:
    pending = state.next_call
    assert pending is not None, "a tool's queue holds only trajectories with a pending call"
    return len(state.turns) - 1, pending[0]


def _unpacked(answer: Answer, *, final: bool = False) -> Result:
    if answer.result is not None:
        return answer.result
    cause = answer.cause
    assert cause is not None, "an answer without either is none"
    raise HopFailed(cause.boundary, cause.code, cause.detail, final=final)


def _refusal(boundary: Boundary, code: str, detail: str) -> Answer:
    return Answer(cause=Cause(boundary=boundary, code=code, detail=detail))


def _unknown(replica: str) -> HopFailed:
    what = f"{replica} began to act on the world outside and is gone: the call may have been carried out"
    return HopFailed("tool", "outcome_unknown", f"{what}, and does not run again", final=True)


def _final(error: HopFailed | BusError) -> HopFailed:
    """What ends a call that may have acted."""
    if isinstance(error, HopFailed):
        return HopFailed(error.boundary, error.code, error.detail, final=True)
    return HopFailed("bus", type(error).__name__.lower(), str(error), final=True)
