"""The sessions of a toolbox: a tool that keeps a state has one sandbox session for each trajectory.

A session is a cache of the log: it has run the trajectory's calls of its tool, one after another. It stands where the
log does when the last result that it gave is the last one that the log has. Where there is none, or it stands elsewhere
(another replica went on, or what it ran last was not committed), it is made anew by running those calls again; their
effects died with the sandbox that they ran in.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import structlog

from bus.holders import Key
from schemas.events import Call, Result
from schemas.trajectory import Trajectory
from tools.sandbox.sandbox import Limits, Sandbox, Session, SessionKind
from tools.tool import Closes

log = structlog.get_logger()

_MEASURE_EVERY_S = 1.0
_MEASURE_SHARE = 0.05
"""Of the time, for measuring many."""


class Kept:
    """What is kept for one trajectory and tool."""

    def __init__(self, sandbox: Sandbox, limits: Limits) -> None:
        self._sandbox = sandbox
        self._limits = limits
        self._session: Session | None = None
        self._opened: dict[str, Closes] = {}
        self.last: Result | None = None
        """What the last call that it ran returned; None while one runs, and when it has run nothing."""
        self.asked_seq = 0
        """The log's sequence at which that call was asked for; 0 for one of the log's that was run again."""
        self.users = 0
        self.one_at_a_time = asyncio.Lock()

    async def open(self, kind: SessionKind, limits: Limits | None = None) -> Session:
        """The session, or a new one when it has ended."""
        if self._session is not None and not self._session.alive:
            await self._session.close()
            self._session = None
        if self._session is None:
            self._session = await self._sandbox.open_session(kind, limits or self._limits)
        return self._session

    async def memory_bytes(self) -> int:
        """What the session takes; not what `keep` made."""
        return await self._session.memory_bytes() if self._session else 0

    def keep(self, name: str, make: Callable[[], Closes]) -> Closes:
        """What was made under the name, which is made now if nothing was."""
        if name not in self._opened:
            self._opened[name] = make()
        return self._opened[name]

    async def close(self) -> None:
        """End it; it can be opened again, and has run nothing then."""
        self.last, self.asked_seq = None, 0
        session, self._session = self._session, None
        opened, self._opened = self._opened, {}
        if session is not None:
            await session.close()
        for each in opened.values():
            await each.close()


class Sessions:
    """So many at rest, in so much memory: beyond it the one that rests longest is closed, and made anew when needed."""

    def __init__(self, limits: Limits, most: int, most_bytes: int) -> None:
        self._limits = limits
        self._most = most
        self._most_bytes = most_bytes
        self._kept: dict[Key, Kept] = {}
        """The longest unused first."""
        self.on_closed: Callable[[Key], Awaitable[None]] | None = None
        """Told of each that is kept no more."""

    def find(self, key: Key) -> Kept | None:
        """What is kept for a trajectory and a tool."""
        return self._kept.get(key)

    @asynccontextmanager
    async def use(self, key: Key, sandbox: Sandbox) -> AsyncIterator[Kept]:
        """What is kept for a trajectory and a tool, for one call; closed if that is not carried through."""
        kept = self._kept.pop(key, None) or Kept(sandbox, self._limits)
        self._kept[key] = kept
        kept.users += 1
        try:
            async with kept.one_at_a_time:
                whole = False
                try:
                    yield kept
                    whole = True
                finally:
                    if not whole:
                        await kept.close()
        finally:
            kept.users -= 1
            if not kept.users and self._kept.get(key) is not kept:  # forgotten meanwhile
                await kept.close()
        await self._make_room()

    async def _make_room(self) -> None:
        while len(self._kept) > self._most and len(resting := self._resting()) > self._most:
            await self.drop(next(iter(resting)))

    def _resting(self) -> dict[Key, Kept]:
        return {key: kept for key, kept in self._kept.items() if not kept.users}

    async def watch_memory(self) -> None:
        """Close what takes too much, again and again: what runs in the background grows between calls too."""
        while True:
            begun = time.monotonic()
            await self.free_memory()
            await asyncio.sleep(max(_MEASURE_EVERY_S, (time.monotonic() - begun) / _MEASURE_SHARE))

    async def free_memory(self) -> None:
        """Measure those at rest, and close those that rest longest until the others take no more than they may."""
        sizes = {key: await kept.memory_bytes() for key, kept in self._resting().items()}
        while sum(sizes.get(key, 0) for key in self._resting()) > self._most_bytes:
            key = next(key for key in self._resting() if sizes.get(key))
            await self.drop(key)
            mb = sizes[key] >> 20
            log.info(
                "session closed for its memory", trajectory=key.trajectory, tool=key.tool, mb=mb
            )

    async def drop(self, key: Key) -> None:
        """Close what is kept, if anything is."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            await kept.close()
            if self.on_closed:
                await self.on_closed(key)

    async def forget(self, trajectory: str) -> None:
        """The trajectory has ended."""
        for key in [key for key in self._kept if key.trajectory == trajectory]:
            await self.drop(key)

    async def close(self) -> None:
        """End all."""
        while self._kept:
            _, kept = self._kept.popitem()
            await kept.close()


def committed_calls(state: Trajectory, queue: str) -> Sequence[tuple[Call, Result]]:
    """The calls of one version of a tool that have results, in the order in which they ran."""
    called = ((state.turns[result.turn].calls[result.call], result) for result in state.results)
    return [(call, result) for call, result in called if call.queue == queue]
