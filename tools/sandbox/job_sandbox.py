"""Calls and sessions of the tiers whose server needs no start of its own."""

from collections.abc import Sequence

from tools.errors import SandboxError
from tools.sandbox.calls import call
from tools.sandbox.job_session import JobSession
from tools.sandbox.jobs import JobServer
from tools.sandbox.sandbox import Limits, Outcome, SessionKind


class JobSandbox:
    """A sandbox whose calls and sessions are jobs of one server."""

    tier: str

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self._closed = False

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Sandbox.run. Codes of errors: `client_failed`, `setup_failed`, `no_answer`, `closed`, the server's."""
        self._check_open()
        return await call(self._server, code, stdin, limits or Limits())

    async def open_session(self, kind: SessionKind, limits: Limits | None = None) -> JobSession:
        """See Sandbox.open_session. Codes of errors as for `run`."""
        self._check_open()
        return await JobSession.open(self._server, kind, limits or Limits())

    def importing(self, modules: Sequence[str]) -> "JobSandbox":
        """See Sandbox.importing: every start is cold here."""
        del modules
        return self

    async def close(self) -> None:
        """Kill every running call and session."""
        self._closed = True
        await self._server.stop()

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxError("closed", "the sandbox was closed")
