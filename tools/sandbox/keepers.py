"""The tiers that need no namespaces: a keeper process for each call or session, started cold. See keeper.py."""

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Sequence

import msgspec

from tools.errors import SandboxError
from tools.sandbox.calls import call
from tools.sandbox.job_session import JobSession
from tools.sandbox.jobs import ENVIRONMENT, IMPORT_ROOT, JobEnd, JobServer
from tools.sandbox.sandbox import Limits, Outcome, SessionKind


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
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tools.sandbox.keeper",
                json.dumps(settings),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                cwd=IMPORT_ROOT,
                env=ENVIRONMENT,
                pass_fds=inherited,
                start_new_session=True,
            )
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


class KeeperSandbox:
    """Calls and sessions of one tier without namespaces."""

    tier: str
    confined: bool

    def __init__(self) -> None:
        self._keepers = Keepers(confined=self.confined)
        self._closed = False

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Sandbox.run. Codes of errors: `client_failed`, `setup_failed`, `keeper_died`, `no_answer`, `closed`."""
        self._check_open()
        return await call(self._keepers, code, stdin, limits or Limits())

    async def open_session(self, kind: SessionKind, limits: Limits | None = None) -> JobSession:
        """See Sandbox.open_session. Codes of errors as for `run`."""
        self._check_open()
        return await JobSession.open(self._keepers, kind, limits or Limits())

    async def close(self) -> None:
        """Kill every running call and session."""
        self._closed = True
        await self._keepers.stop()

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxError("closed", "the sandbox was closed")
