"""The sessions of a toolbox: a tool that keeps a state has one sandbox session for each trajectory.

A session is a cache of the log: it has run the trajectory's calls of its tool, one after another. Where there is none,
or it has run another number of calls than have results (another replica ran some, or what it ran last was not
committed), it is made anew by running those calls again; their effects died with the sandbox that they ran in.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from schemas.events import Call, Result
from schemas.trajectory import Trajectory
from tools.sandbox.sandbox import Limits, Sandbox, Session, SessionKind


class Key(NamedTuple):
    """Whose session it is."""

    trajectory: str
    tool: str


class Kept:
    """What is kept for one trajectory and tool."""

    def __init__(self, sandbox: Sandbox, limits: Limits) -> None:
        self._sandbox = sandbox
        self._limits = limits
        self._session: Session | None = None
        self.calls = 0
        """How many it has run."""
        self.one_at_a_time = asyncio.Lock()

    async def open(self, kind: SessionKind) -> Session:
        """The session, or a new one when it has ended."""
        if self._session is None or not self._session.alive:
            self._session = await self._sandbox.open_session(kind, self._limits)
        return self._session

    async def close(self) -> None:
        """End it; it can be opened again, and has run nothing then."""
        self.calls = 0
        if self._session is not None:
            await self._session.close()
            self._session = None


class Sessions:
    """At most `limit` at rest: the one that rests longest is closed for another, and made anew when it is needed."""

    def __init__(self, sandbox: Sandbox, limits: Limits, limit: int) -> None:
        self._sandbox = sandbox
        self._limits = limits
        self._limit = limit
        self._kept: dict[Key, Kept] = {}
        """The longest unused first."""

    @asynccontextmanager
    async def use(self, key: Key) -> AsyncIterator[Kept]:
        """What is kept for a trajectory and a tool, for one call; closed if that is not carried through."""
        kept = self._kept.pop(key, None) or Kept(self._sandbox, self._limits)
        self._kept[key] = kept
        async with kept.one_at_a_time:
            whole = False
            try:
                yield kept
                whole = True
            finally:
                if not whole:
                    await kept.close()
        await self._make_room()

    async def _make_room(self) -> None:
        resting = [key for key, kept in self._kept.items() if not kept.one_at_a_time.locked()]
        for key in resting[: max(0, len(resting) - self._limit)]:
            await self._kept.pop(key).close()

    async def forget(self, trajectory: str) -> None:
        """The trajectory has ended."""
        for key in [key for key in self._kept if key.trajectory == trajectory]:
            await self._kept.pop(key).close()

    async def close(self) -> None:
        """End all."""
        for kept in self._kept.values():
            await kept.close()
        self._kept.clear()


def committed_calls(state: Trajectory, tool: str) -> Sequence[tuple[Call, Result]]:
    """The calls of a tool that have results, in the order in which they ran."""
    called = ((state.turns[result.turn].calls[result.call], result) for result in state.results)
    return [(call, result) for call, result in called if call.tool == tool]
