"""The `unsafe` tier: a plain subprocess. It isolates nothing; for code that you trust as you trust yourself."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

import tools
from tools.sandbox.sandbox import Limits, Outcome

_IMPORT_ROOT = Path(tools.__file__).parent.parent
_LAUNCHER = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
from tools.sandbox.cell import run_program
del sys.path[0]
limits = json.loads(sys.argv[2])
for name, value in (
    ("AS", limits["process_memory_bytes"]),
    ("CPU", limits["cpu_s"]),
    ("FSIZE", limits["file_bytes"]),
    ("NOFILE", limits["files"]),
    ("CORE", 0),
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
with open("main.py", encoding="utf-8") as file:
    code = file.read()
exit_code = 1
try:
    exit_code = run_program(code)
finally:
    os._exit(exit_code)
"""


class UnsafeSandbox:
    """Subprocesses with a clean environment, limits of their own and a directory that is deleted.

    Not limited: total memory, number of processes, disk, files, network. What leaves its process group outlives its
    call.
    """

    tier = "unsafe"

    def __init__(self) -> None:
        self._running: set[asyncio.subprocess.Process] = set()

    async def run(self, code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Sandbox.run."""
        limits = limits or Limits()
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="unsafe-") as directory:
            process = await self._start(directory, _write_inputs(directory, code, stdin), limits)
            self._running.add(process)
            try:
                output, reason = await _collect(process, limits)
            finally:
                self._running.discard(process)
                _kill_group(process)
                exit_code = await process.wait()
        wall_ms = (time.monotonic() - started) * 1e3
        return Outcome(output=output, reason=reason, exit_code=exit_code, wall_ms=wall_ms)

    async def close(self) -> None:
        """Kill every running call; each then returns as killed."""
        for process in self._running:
            _kill_group(process)

    async def _start(
        self, directory: str, stdin_file: BinaryIO, limits: Limits
    ) -> asyncio.subprocess.Process:
        with stdin_file:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-c",
                _LAUNCHER,
                str(_IMPORT_ROOT),
                msgspec.json.encode(limits).decode(),
                stdin=stdin_file,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd=directory,
                env={"PATH": os.defpath, "HOME": directory, "LANG": "C.UTF-8"},
                start_new_session=True,
            )


def _write_inputs(directory: str, code: str, stdin: bytes) -> BinaryIO:
    Path(directory, "main.py").write_bytes(code.encode("utf-8", "backslashreplace"))
    stdin_path = Path(directory, "stdin")
    stdin_path.write_bytes(stdin)
    return stdin_path.open("rb")


async def _collect(
    process: asyncio.subprocess.Process, limits: Limits
) -> tuple[bytes, Literal["exit", "wall", "output"]]:
    assert process.stdout
    output = bytearray()
    try:
        async with asyncio.timeout(limits.wall_s):
            while chunk := await process.stdout.read(1 << 16):
                output += chunk
                if len(output) > limits.output_bytes:
                    return bytes(output[: limits.output_bytes]), "output"
            await process.wait()
    except TimeoutError:
        return bytes(output), "wall"
    return bytes(output), "exit"


def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
