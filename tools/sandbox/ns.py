"""The `ns` tier: Linux namespaces, no root and no packages needed; the asyncio client of the fork server.

Its limit of total memory is soft: a watcher looks every 0.1 s, and does not see the kernel's own buffers (pipes,
sockets). The hard line is a cgroup around the replica.
"""

import asyncio
from collections.abc import Sequence

from tools.errors import SandboxError
from tools.sandbox.calls import call
from tools.sandbox.fork_server import ForkServer
from tools.sandbox.job_session import JobSession
from tools.sandbox.jobs import DeadBefore
from tools.sandbox.sandbox import Limits, Outcome, SessionKind


class NamespaceSandbox:
    """A fork server and its calls. A server that dies takes its calls with it and is started again for the next."""

    tier = "ns"

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = tuple(imports)
        self._server: ForkServer | None = None
        self._others: dict[tuple[str, ...], NamespaceSandbox] = {}
        """With other imports."""
        self._turn = asyncio.Lock()
        self._closed = False

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Sandbox.run.

        Codes of errors: `start_failed`, `client_failed`, `setup_failed`, `zygote_died`, `no_answer`, `closed`.
        """
        limits = limits or Limits()
        server = await self._running_server()
        try:
            return await call(server, code, stdin, limits)
        except DeadBefore:  # it died idle: this call was never in it
            server = await self._running_server()
            return await call(server, code, stdin, limits)

    async def open_session(self, kind: SessionKind, limits: Limits | None = None) -> JobSession:
        """See Sandbox.open_session. Codes of errors as for `run`."""
        limits = limits or Limits()
        server = await self._running_server()
        try:
            return await JobSession.open(server, kind, limits)
        except DeadBefore:
            server = await self._running_server()
            return await JobSession.open(server, kind, limits)

    def importing(self, modules: Sequence[str]) -> "NamespaceSandbox":
        """See Sandbox.importing: each set of modules has a fork server of its own, started when it is first needed."""
        imports = tuple(modules)
        if imports == self._imports:
            return self
        return self._others.setdefault(imports, NamespaceSandbox(imports))

    async def close(self) -> None:
        """Kill every running call and session, and the server."""
        self._closed = True
        for other in self._others.values():
            await other.close()
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
