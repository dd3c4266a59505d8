"""The tiers that need no namespaces: a keeper process for each call or session, started cold. See keeper.py."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence

import msgspec

from tools.sandbox.jobs import JobEnd, JobServer, spawn
from tools.sandbox.sandbox import Limits


class Keepers(JobServer):
    """Starts a keeper for each job."""

    died = "keeper_died"

    def __init__(self, *, confined: bool) -> None:
        self._confined = confined
        self._running: dict[socket.socket, asyncio.subprocess.Process] = {}

    @property
    def dead(self) -> bool:
        """See JobServer: one keeper's death is not the others'."""
        return False

    def give_up(self) -> None:
        """See JobServer: the one that is stuck has let its leash go."""

    async def begin(self, kind: str, limits: Limits, fds: Sequence[int]) -> socket.socket:
        """See JobServer."""
        leash, far_leash = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as on_error, far_leash:
            on_error.enter_context(leash)
            leash.setblocking(False)
            inherited = [far_leash.fileno(), *fds]
            job = {"kind": kind, "limits": msgspec.to_builtins(limits)}
            settings = {"fds": inherited, "job": job, "confined": self._confined}
            process = await spawn("tools.sandbox.keeper", settings, inherited)
            on_error.pop_all()
        self._running = {one: p for one, p in self._running.items() if p.returncode is None}
        self._running[leash] = process
        return leash

    async def end_of(self, leash: socket.socket, limit_s: float) -> JobEnd:
        """See JobServer; the keeper itself has ended then."""
        end = await super().end_of(leash, limit_s)
        await self._running[leash].wait()
        return end

    async def stop(self) -> None:
        """End every job and wait for their keepers, which clean up after them."""
        for leash in self._running:
            with contextlib.suppress(OSError):  # it has ended
                leash.shutdown(socket.SHUT_WR)
        for process in self._running.values():
            await process.wait()
