"""What a sandbox is: hostile code in, what it printed and how it ended out; once, or again and again in a session."""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

SessionKind = Literal["python", "bash"]
Reason = Literal["exit", "wall", "memory", "output", "processes", "disk"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one call may use; each is enforced on the whole process tree unless it says otherwise.

    Of a session, the times, the output and the images are of each run, and all else is of the whole session.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    """Of each process. In a session: of the code that a Python run executes itself."""
    memory_bytes: int = 512 << 20
    """In total; a watcher kills what goes above."""
    process_memory_bytes: int = 1 << 30
    """Address space of each process, on top of what the preloaded modules take."""
    processes: int = 64
    file_bytes: int = 64 << 20
    """Of one file."""
    files: int = 256
    """Open at once, of each process."""
    disk_bytes: int = 64 << 20
    """/tmp, which lives as long as the call or the session."""
    output_bytes: int = 1 << 20
    """Of stdout and stderr together; what comes after is cut."""
    image_bytes: int = 0
    """Of the open matplotlib figures as PNG, together; the figure that does not fit and those after it are left out."""
    session_s: float = 3600.0
    """How long a session may live."""
    session_cpu_s: int = 600
    """Of each process of a session."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one call, or one run in a session, ended."""

    output: bytes
    """stdout and stderr as they were interleaved."""
    reason: Reason
    """`exit`: by itself, or killed by a limit of its own process; else the limit that ended it."""
    exit_code: int
    """As subprocess.Popen.returncode gives it: negative for a signal."""
    wall_ms: float
    images: list[bytes] = []
    """The figures that were open at the end, as PNG."""
    session: Literal["none", "kept", "restarted", "ended"] = "none"
    """Of a run in a session (`none`: of a call). `restarted`: a new shell in the same world; files, directory and
    environment are kept, functions and other variables are not. `ended`: nothing is kept, and nothing more runs."""


class Session(Protocol):
    """Code run piece by piece in one world that keeps its variables, files and processes.

    One run at a time. A run that reaches a limit is interrupted (as by Ctrl-C) and the session kept; only where
    that does not help within two seconds is the session killed. What runs in the background when a run ends goes
    on, and its output is part of a later run's.
    """

    kind: SessionKind

    @property
    def alive(self) -> bool:
        """Whether another run is possible."""
        ...

    @property
    def idle_s(self) -> float:
        """How long ago the last run ended; 0 while one is running."""
        ...

    async def run(self, text: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run a cell of Python (see Sandbox.run) or a piece of a bash script.

        `limits` replaces the session's own for this run; of them only what is of a run (see Limits) counts. `stdin`
        is for Python; bash has here-documents. What ended the session between two runs (its limit of time or of
        memory) is the outcome of the second. Cancelling a run closes the session. Raises SandboxError when the
        sandbox, not the code, fails, and for a session that is not alive.
        """
        ...

    async def memory_bytes(self) -> int:
        """What its processes take now, and its files where they are in memory; 0 when it is not alive.

        Memory shared with n others counts 1/n.
        """
        ...

    async def close(self) -> None:
        """End every process of it. Safe to call twice."""
        ...


class Sandbox(Protocol):
    """Runs many calls and sessions at once, each in a world of its own that dies with it."""

    tier: str
    """`ns`, …, `unsafe`."""

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run Python code as `__main__`; the value of a last expression is printed as a notebook does.

        Raises SandboxError when the sandbox, not the code, fails.
        """
        ...

    async def open_session(self, kind: SessionKind, limits: Limits | None = None) -> Session:
        """Start a session; `limits` are those of the session and of each run in it. Raises SandboxError."""
        ...

    def importing(self, modules: Sequence[str]) -> "Sandbox":
        """This sandbox, but its Python code finds just these modules already imported, where the tier can do that.

        It closes with this one.
        """
        ...

    async def close(self) -> None:
        """Kill every running call and session and free everything."""
        ...
