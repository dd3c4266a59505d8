"""The client's end of one process of zygote.py: starts it, hands it jobs, ends it."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence

import msgspec

from tools.errors import SandboxError
from tools.sandbox.jobs import PACKET_BYTES, DeadBefore, JobEnd, JobServer, spawn
from tools.sandbox.sandbox import Limits

_START_S = 60.0
_STOP_S = 5.0
_BEFORE = "the fork server died before the call"
_QUEUE_BYTES = 32 << 10
"""Few packets in flight: the kernel limits the descriptors in them, and a full queue makes callers wait."""


class ForkServer(JobServer):
    """One process of zygote.py."""

    died = "zygote_died"

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._sending = asyncio.Lock()
        self._gone = False

    @classmethod
    async def start(cls, imports: Sequence[str]) -> "ForkServer":
        """Start it and wait until it serves. Raises SandboxError."""
        try:
            server = await cls._spawn(imports)
        except OSError as error:
            raise SandboxError("start_failed", str(error)) from error
        try:
            refusal = await server._greeting()
        except BaseException:  # cancelled
            await server.stop()
            raise
        if refusal:
            await server.stop()
            raise SandboxError("start_failed", refusal)
        return server

    @classmethod
    async def _spawn(cls, imports: Sequence[str]) -> "ForkServer":
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as on_error, theirs:
            on_error.enter_context(control)
            control.setblocking(False)
            control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
            settings = {"control_fd": theirs.fileno(), "imports": list(imports)}
            process = await spawn("tools.sandbox.zygote", settings, [theirs.fileno()])
            on_error.pop_all()
        return cls(process, control)

    async def _greeting(self) -> str:
        """What kept it from serving; empty when it serves."""
        try:
            async with asyncio.timeout(_START_S):
                loop = asyncio.get_running_loop()
                packet = await loop.sock_recv(self._control, PACKET_BYTES)
        except TimeoutError:
            return f"not ready within {_START_S:g} s"
        if not packet:
            return "it ended before it was ready; see its stderr"
        return msgspec.json.decode(packet, type=JobEnd).error

    @property
    def dead(self) -> bool:
        """See JobServer."""
        return self._gone or self._process.returncode is not None

    async def begin(self, kind: str, limits: Limits, fds: Sequence[int]) -> socket.socket:
        """See JobServer."""
        leash, far_leash = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as on_error, far_leash:
            on_error.enter_context(leash)
            leash.setblocking(False)
            packet = msgspec.json.encode({"kind": kind, "limits": limits})
            await self._send(packet, [far_leash.fileno(), *fds])
            on_error.pop_all()
        return leash

    async def stop(self) -> None:
        """End it and everything in it."""
        self._gone = True
        self._control.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def give_up(self) -> None:
        """See JobServer."""
        self._gone = True
        if self._process.returncode is None:
            self._process.kill()

    async def _send(self, packet: bytes, fds: list[int]) -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            while True:
                if self._gone:
                    raise DeadBefore(self.died, _BEFORE)
                try:
                    socket.send_fds(self._control, [packet], fds)
                    return
                except BrokenPipeError:
                    self.give_up()
                    raise DeadBefore(self.died, _BEFORE) from None
                except BlockingIOError:
                    writable = asyncio.Event()
                    loop.add_writer(self._control, writable.set)
                    try:
                        await writable.wait()
                    finally:
                        loop.remove_writer(self._control)
