"""The `ns` tier: Linux namespaces, no root and no packages needed; the asyncio client of the fork server.

Its limit of total memory is soft: a watcher looks every 0.1 s, and does not see the kernel's own buffers (pipes,
sockets). The hard line is a cgroup around the replica.
"""

import asyncio
import contextlib
import fcntl
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
from tools.sandbox.sandbox import Limits, Outcome

PACKET_BYTES = 1 << 16
_START_S = 60.0
_STOP_S = 5.0
_GRACE_S = 30.0
"""The server ends a call at its wall limit; it is stuck if it has not answered so long after."""
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
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class _Answer(msgspec.Struct):
    """What the server says of a call, or of its own start; see zygote.py."""

    reason: Literal["exit", "wall", "memory", "killed"] = "exit"
    exit_code: int = 0
    wall_ms: float = 0.0
    error: str = ""


class NamespaceSandbox:
    """A fork server and its calls. A server that dies takes its calls with it and is started again for the next."""

    tier = "ns"

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = tuple(imports)
        self._server: _ForkServer | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Sandbox.run.

        Codes of errors: `start_failed`, `client_failed`, `setup_failed`, `zygote_died`, `no_answer`, `closed`.
        """
        limits = limits or Limits()
        server = await self._running_server()
        try:
            return await server.run(code, stdin, limits)
        except _DeadBefore:  # it died idle: this call was never in it
            server = await self._running_server()
            return await server.run(code, stdin, limits)

    async def close(self) -> None:
        """Kill every running call and the server."""
        self._closed = True
        async with self._turn:
            if self._server:
                await self._server.stop()
                self._server = None

    async def _running_server(self) -> "_ForkServer":
        async with self._turn:
            if self._closed:
                raise SandboxError("closed", "the sandbox was closed")
            if self._server and self._server.dead:
                await self._server.stop()
                self._server = None
            if self._server is None:
                self._server = await _ForkServer.start(self._imports)
            return self._server


class _DeadBefore(SandboxError):
    """The server was dead before a call reached it."""

    def __init__(self) -> None:
        super().__init__("zygote_died", "the fork server died before the call")


class _ForkServer:
    """One process of zygote.py."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._sending = asyncio.Lock()
        self._gone = False

    @classmethod
    async def start(cls, imports: Sequence[str]) -> "_ForkServer":
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
    async def _spawn(cls, imports: Sequence[str]) -> "_ForkServer":
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
        return msgspec.json.decode(packet, type=_Answer).error

    @property
    def dead(self) -> bool:
        """It ended, or was given up; start another."""
        return self._gone or self._process.returncode is not None

    async def run(self, code: str, stdin: bytes, limits: Limits) -> Outcome:
        """One call. Raises _DeadBefore, or another SandboxError when the server dies in it."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as ours:  # closing the leash, when cancelled, kills the call
            try:
                leash, output = await self._begin(ours, code, stdin, limits)
            except OSError as error:  # descriptors or memory of this process
                raise SandboxError("client_failed", str(error)) from error
            try:
                async with asyncio.timeout(limits.wall_s + _GRACE_S):
                    packet = await loop.sock_recv(leash, PACKET_BYTES)
            except TimeoutError:
                self._give_up()
                raise SandboxError(
                    "no_answer", f"nothing {_GRACE_S:g} s after the wall limit"
                ) from None
            except ConnectionResetError:
                packet = b""
            if not packet:
                self._give_up()
                raise SandboxError("zygote_died", "the fork server died during the call")
            output.read()  # no process of the call is left that could write more
        answer = msgspec.json.decode(packet, type=_Answer)
        if answer.error:
            raise SandboxError("setup_failed", answer.error)
        reason = "output" if output.full else answer.reason
        assert reason != "killed", "only a full output or a cancellation kills"
        return Outcome(
            output=bytes(output.collected),
            reason=reason,
            exit_code=answer.exit_code,
            wall_ms=answer.wall_ms,
        )

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

    def _give_up(self) -> None:
        self._gone = True
        if self._process.returncode is None:
            self._process.kill()

    async def _begin(
        self, ours: contextlib.ExitStack, code: str, stdin: bytes, limits: Limits
    ) -> "tuple[socket.socket, _Output]":
        leash, far_leash = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.enter_context(leash)
        leash.setblocking(False)
        with contextlib.ExitStack() as theirs:
            theirs.enter_context(far_leash)
            read_fd, write_fd = os.pipe()
            theirs.callback(os.close, write_fd)
            output = _Output(read_fd, limits.output_bytes, leash)
            ours.callback(output.close)
            code_fd = _sealed_file(code.encode("utf-8", "backslashreplace"))
            theirs.callback(os.close, code_fd)
            stdin_fd = _sealed_file(stdin)
            theirs.callback(os.close, stdin_fd)
            packet = msgspec.json.encode(limits)
            await self._send(packet, [far_leash.fileno(), code_fd, stdin_fd, write_fd])
        return leash, output

    async def _send(self, packet: bytes, fds: list[int]) -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            while True:
                if self._gone:
                    raise _DeadBefore
                try:
                    socket.send_fds(self._control, [packet], fds)
                    return
                except BrokenPipeError:
                    self._give_up()
                    raise _DeadBefore from None
                except BlockingIOError:
                    writable = loop.create_future()
                    loop.add_writer(self._control, writable.set_result, None)
                    try:
                        await writable
                    finally:
                        loop.remove_writer(self._control)


class _Output:
    """Collects what comes through a pipe; when there is too much, kills the call by its leash."""

    def __init__(self, fd: int, limit_bytes: int, leash: socket.socket) -> None:
        self.collected = bytearray()
        self.full = False
        self._fd = fd
        self._limit_bytes = limit_bytes
        self._leash = leash
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self.read)

    def read(self) -> None:
        """Take all that is there."""
        while not self.full:
            try:
                chunk = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                self._loop.remove_reader(self._fd)
                return
            self.collected += chunk
            if len(self.collected) > self._limit_bytes:
                self._overflow()

    def _overflow(self) -> None:
        del self.collected[self._limit_bytes :]
        self.full = True
        self._loop.remove_reader(self._fd)
        with contextlib.suppress(OSError):  # it ended by itself
            self._leash.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


def _sealed_file(content: bytes) -> int:
    """A file in memory that nobody can change: what the code could write to would escape its memory limit."""
    fd = os.memfd_create("sandbox", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
