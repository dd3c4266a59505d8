"""What a sandbox is: hostile Python in, what it printed and how it ended out."""

from typing import Literal, Protocol

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one call may use; each is enforced on the whole process tree unless it says otherwise."""

    wall_s: float = 10.0
    cpu_s: int = 10
    """Of each process."""
    memory_bytes: int = 512 << 20
    """In total; a watcher kills what goes above."""
    process_memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 64
    file_bytes: int = 64 << 20
    """Of one file."""
    files: int = 256
    """Open at once, of each process."""
    disk_bytes: int = 64 << 20
    """/tmp, which lives as long as the call."""
    output_bytes: int = 1 << 20
    """Of stdout and stderr together; what comes after is cut."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one call ended."""

    output: bytes
    """stdout and stderr as they were interleaved."""
    reason: Literal["exit", "wall", "memory", "output"]
    """`exit`: by itself, or killed by a limit of its own process; else the limit that ended it."""
    exit_code: int
    """As subprocess.Popen.returncode gives it: negative for a signal."""
    wall_ms: float


class Sandbox(Protocol):
    """Runs many calls at once, each in a world of its own that dies with it."""

    tier: str
    """`ns`, …, `unsafe`."""

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run Python code as `__main__`; the value of a last expression is printed as a notebook does.

        Raises SandboxError when the sandbox, not the code, fails.
        """
        ...

    async def close(self) -> None:
        """Kill every running call and free everything."""
        ...
