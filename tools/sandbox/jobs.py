"""A job is one call or session; zygote.py and keeper.py are the servers that start jobs."""

import asyncio
import json
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import msgspec

import tools
from tools.errors import SandboxError
from tools.sandbox.sandbox import Limits

PACKET_BYTES = 1 << 16
GRACE_S = 30.0
"""The server ends a job at its limit; it is stuck if it has not answered so long after."""
IMPORT_ROOT = Path(tools.__file__).parent.parent
ENVIRONMENT = {
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
"""Of the code: nothing of the process that runs the sandbox."""


async def spawn(
    module: str, settings: dict[str, object], fds: Sequence[int]
) -> asyncio.subprocess.Process:
    """A server of jobs as a process that knows its settings and has the descriptors; what it says goes to stderr."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        json.dumps(settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        cwd=IMPORT_ROOT,
        env=ENVIRONMENT,
        pass_fds=fds,
        start_new_session=True,  # a Ctrl-C is for the client, who drains first
    )


class JobEnd(msgspec.Struct):
    """What the server says of a job, or of its own start; see zygote.py."""

    reason: Literal["exit", "wall", "memory", "processes", "disk", "killed"] = "exit"
    exit_code: int = 0
    wall_ms: float = 0.0
    error: str = ""
    dead_before: bool = False
    """With the error: what was to run the code ended before that; another may do it."""
    memory_bytes: int | None = None
    """Only in the answer to the question; the job goes on."""
    interrupted: bool = False
    """The signal that was asked for has been sent; the job goes on."""


class DeadBefore(SandboxError):
    """What was to run a job died before any of its code ran: it may be tried once more."""


class JobServer(ABC):
    """Starts jobs."""

    died: ClassVar[str]
    """The code of the error when it dies during a job."""

    @property
    @abstractmethod
    def dead(self) -> bool:
        """It ended, or was given up: its jobs are gone."""

    @abstractmethod
    async def begin(self, kind: str, limits: Limits, fds: Sequence[int]) -> socket.socket:
        """Start a job and return its leash; the descriptors stay the caller's. Raises DeadBefore, OSError."""

    @abstractmethod
    def give_up(self) -> None:
        """It is dead or stuck."""

    @abstractmethod
    async def stop(self) -> None:
        """End it and every job."""

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
        """What a packet on a leash says. Raises DeadBefore, or another SandboxError, when the sandbox has failed."""
        if not packet:
            self.give_up()
            raise SandboxError(self.died, "the server of the call died during it")
        end = msgspec.json.decode(packet, type=JobEnd)
        if end.dead_before:
            raise DeadBefore("setup_failed", end.error)
        if end.error:
            raise SandboxError("setup_failed", end.error)
        return end
