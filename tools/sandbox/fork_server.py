"""The client's end of one process of zygote.py: starts it, hands it jobs, ends it."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

import tools
from tools.errors import SandboxError
from tools.sandbox.sandbox import Limits

PACKET_BYTES = 1 << 16
GRACE_S = 30.0
"""The server ends a job at its limit; it is stuck if it has not answered so long after."""
_START_S = 60.0
_STOP_S = 5.0
_QUEUE_BYTES = 32 << 10
"""Few packets in flight: the kernel limits the descriptors in them, and a full queue makes callers wait."""

_IMPORT_ROOT = Path(tools.__file__).parent.parent
_ENVIRONMENT = {
    "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # the same call prints the same, in whatever replica
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore:FigureCanvasAgg is non-interactive:UserWarning",  # plt.show()
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class JobEnd(msgspec.Struct):
    """What the server says of a job, or of its own start; see zygote.py."""

    reason: Literal["exit", "wall", "memory", "processes", "disk", "killed"] = "exit"
    exit_code: int = 0
    wall_ms: float = 0.0
    error: str = ""
    memory_bytes: int | None = None
    """Only in the answer to the question; the job goes on."""


class DeadBefore(SandboxError):
    """The server was dead before a job reached it."""

    def __init__(self) -> None:
        super().__init__("zygote_died", "the fork server died before the call")


class ForkServer:
    """One process of zygote.py."""

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
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tools.sandbox.zygote",
                json.dumps(settings),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                cwd=_IMPORT_ROOT,
                env=_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is for the client, who drains first
            )
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
        """It ended, or was given up; start another."""
        return self._gone or self._process.returncode is not None

    async def begin(self, kind: str, limits: Limits, fds: Sequence[int]) -> socket.socket:
        """Start a job and return its leash; the descriptors stay the caller's. Raises DeadBefore, OSError."""
        leash, far_leash = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as on_error, far_leash:
            on_error.enter_context(leash)
            leash.setblocking(False)
            packet = msgspec.json.encode({"kind": kind, "limits": limits})
            await self._send(packet, [far_leash.fileno(), *fds])
            on_error.pop_all()
        return leash

    async def end_of(self, leash: socket.socket, limit_s: float) -> JobEnd:
        """Wait until the job has ended. Raises SandboxError when the server dies, or says nothing in time."""
        try:
            async with asyncio.timeout(limit_s + GRACE_S):
                packet = await asyncio.get_running_loop().sock_recv(leash, PACKET_BYTES)
        except TimeoutError:
            self.give_up()
            raise SandboxError("no_answer", f"nothing {GRACE_S:g} s after the limit") from None
        except ConnectionResetError:
            packet = b""
        return self.decode_end(packet)

    def decode_end(self, packet: bytes) -> JobEnd:
        """What a packet on a leash says. Raises SandboxError when it says that the sandbox failed."""
        if not packet:
            self.give_up()
            raise SandboxError("zygote_died", "the fork server died during the call")
        end = msgspec.json.decode(packet, type=JobEnd)
        if end.error:
            raise SandboxError("setup_failed", end.error)
        return end

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
        """It is dead or stuck."""
        self._gone = True
        if self._process.returncode is None:
            self._process.kill()

    async def _send(self, packet: bytes, fds: list[int]) -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            while True:
                if self._gone:
                    raise DeadBefore
                try:
                    socket.send_fds(self._control, [packet], fds)
                    return
                except BrokenPipeError:
                    self.give_up()
                    raise DeadBefore from None
                except BlockingIOError:
                    writable = asyncio.Event()
                    loop.add_writer(self._control, writable.set)
                    try:
                        await writable.wait()
                    finally:
                        loop.remove_writer(self._control)
