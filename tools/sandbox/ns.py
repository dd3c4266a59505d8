"""The `ns` tier: Linux namespaces, no root and no packages needed; the asyncio client of the fork server.

Its limit of total memory is soft: a watcher looks every 0.1 s, and does not see the kernel's own buffers (pipes,
sockets). The hard line is a cgroup around the replica.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

from tools.errors import SandboxError
from tools.sandbox.fork_server import DeadBefore, ForkServer
from tools.sandbox.ns_session import NamespaceSession
from tools.sandbox.sandbox import Limits, Outcome, SessionKind
from tools.sandbox.streams import Answers, Output, sealed_file


class NamespaceSandbox:
    """A fork server and its calls. A server that dies takes its calls with it and is started again for the next."""

    tier = "ns"

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = tuple(imports)
        self._server: ForkServer | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Sandbox.run.

        Codes of errors: `start_failed`, `client_failed`, `setup_failed`, `zygote_died`, `no_answer`, `closed`.
        """
        limits = limits or Limits()
        server = await self._running_server()
        try:
            return await _call(server, code, stdin, limits)
        except DeadBefore:  # it died idle: this call was never in it
            server = await self._running_server()
            return await _call(server, code, stdin, limits)

    async def open_session(self, kind: SessionKind, limits: Limits | None = None) -> NamespaceSession:
        """See Sandbox.open_session. Codes of errors as for `run`."""
        limits = limits or Limits()
        server = await self._running_server()
        try:
            return await NamespaceSession.open(server, kind, limits)
        except DeadBefore:
            server = await self._running_server()
            return await NamespaceSession.open(server, kind, limits)

    async def close(self) -> None:
        """Kill every running call and session, and the server."""
        self._closed = True
        async with self._turn:
            if self._server:
                await self._server.stop()
                self._server = None

    async def _running_server(self) -> ForkServer:
        async with self._turn:
            if self._closed:
                raise SandboxError("closed", "the sandbox was closed")
            if self._server and self._server.dead:
                await self._server.stop()
                self._server = None
            if self._server is None:
                self._server = await ForkServer.start(self._imports)
            return self._server


async def _call(server: ForkServer, code: str, stdin: bytes, limits: Limits) -> Outcome:
    """One call. Raises DeadBefore, or another SandboxError when the server dies in it."""
    with contextlib.ExitStack() as ours:  # closing the leash, when cancelled, kills the call
        try:
            leash, output, answers = await _begin(server, ours, code, stdin, limits)
        except OSError as error:  # descriptors or memory of this process
            raise SandboxError("client_failed", str(error)) from error
        end = await server.end_of(leash, limits.wall_s)
        # no process of the call is left that could write more
        full = output.full
        collected = output.take()
        full = full or output.full
        images = _images(answers) if answers else []
    return Outcome(
        output=collected,
        reason="output" if full or end.reason == "killed" else end.reason,
        exit_code=end.exit_code,
        wall_ms=end.wall_ms,
        images=images,
    )


async def _begin(
    server: ForkServer, ours: contextlib.ExitStack, code: str, stdin: bytes, limits: Limits
) -> tuple[socket.socket, Output, Answers | None]:
    leashes: list[socket.socket] = []

    def kill() -> None:
        for leash in leashes:
            with contextlib.suppress(OSError):  # it ended by itself
                leash.shutdown(socket.SHUT_WR)

    with contextlib.ExitStack() as theirs:
        read_fd, write_fd = os.pipe()
        theirs.callback(os.close, write_fd)
        output = Output(read_fd, limits.output_bytes, kill)
        ours.callback(output.close)
        fds = [write_fd]
        for content in (code.encode("utf-8", "backslashreplace"), stdin):
            fds.append(sealed_file(content))
            theirs.callback(os.close, fds[-1])
        answers = None
        if limits.image_bytes:
            read_fd, write_fd = os.pipe()
            theirs.callback(os.close, write_fd)
            answers = Answers(read_fd, lambda: None)
            answers.image_limit_bytes = limits.image_bytes
            ours.callback(answers.close)
            fds.append(write_fd)
        leash = await server.begin("call", limits, fds)
        ours.enter_context(leash)
        leashes.append(leash)
        if output.full:  # while the job waited to be sent? it cannot have been: nothing ran
            kill()
    return leash, output, answers


def _images(answers: Answers) -> list[bytes]:
    answers.drain()
    answer = answers.take()
    return answer[1] if answer else []
