"""Child processes for blocking work on what the policy or the web sent: a late one is killed.

    parent                          child: `serve`
    length, msgpack(arguments)  →   function(**arguments)
                                ←   length, msgpack(what it returned)

The event loop is never blocked. A child keeps nothing between calls but its imports; it has no environment and a limit
of memory, and dies with its parent. It is no sandbox: only our own functions run in it.
"""

import asyncio
import contextlib
import ctypes
import importlib
import os
import resource
import signal
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

import tools
from tools.errors import ToolError

_IMPORT_ROOT = Path(tools.__file__).parent.parent
_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1
_ENDING_S = 1.0
_CRASHES = {
    -signal.SIGSEGV,
    -signal.SIGBUS,
    -signal.SIGILL,
    -signal.SIGFPE,
    -signal.SIGABRT,
}
"""Ends that a library brings upon itself; whoever kills from outside uses others."""
_LAUNCHER = """
import sys
sys.path.insert(0, sys.argv[1])
from tools.workers import serve
serve(sys.argv[2], int(sys.argv[3]))
"""


class Late(Exception):
    """A child did not answer in time, and was killed."""


class Crashed(ToolError):
    """A child died of what it was given: a library's own fault, or memory that it did not get."""


class Workers:
    """Children that run one function; each takes one call at a time, and waits for the next."""

    def __init__(self, function: str, *, count: int = 4, memory_bytes: int = 1 << 30) -> None:
        """`function`: `module:name`; called with keyword arguments, it returns what msgpack can hold."""
        self._function = function
        self._memory_bytes = memory_bytes
        self._free = asyncio.Semaphore(count)
        self._idle: list[asyncio.subprocess.Process] = []
        self._all: set[asyncio.subprocess.Process] = set()

    async def call(self, within_s: float, /, **arguments: Any) -> Any:
        """What the function returns. The wait for a free child does not count.

        Raises Late; Crashed; ToolError if the child dies of something else.
        """
        request = msgspec.msgpack.encode(arguments)
        async with self._free:
            child = await self._take()
            try:
                async with asyncio.timeout(within_s):
                    reply = await _exchange(child, request)
            except TimeoutError:
                await self._end(child)
                raise Late from None
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                # it has closed its pipe; let it say how it ends
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ENDING_S):
                        await child.wait()
                await self._end(child)
                detail = f"a child process for {self._function} ended with {child.returncode}"
                kind = Crashed if child.returncode in _CRASHES else ToolError
                raise kind("worker_died", detail) from error
            except asyncio.CancelledError:  # it may still be writing: no use for the next call
                await self._end(child)
                raise
            self._idle.append(child)
        return msgspec.msgpack.decode(reply)

    async def close(self) -> None:
        """Kill all."""
        for child in list(self._all):
            await self._end(child)
        self._idle.clear()

    async def _take(self) -> asyncio.subprocess.Process:
        while self._idle:
            child = self._idle.pop()
            if child.returncode is None:
                return child
            await self._end(child)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-c",
            _LAUNCHER,
            str(_IMPORT_ROOT),
            self._function,
            str(self._memory_bytes),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/nonexistent"},
            start_new_session=True,
        )
        self._all.add(child)
        return child

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        self._all.discard(child)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


@asynccontextmanager
async def open_workers(
    function: str, *, count: int = 4, memory_bytes: int = 1 << 30
) -> AsyncIterator[Workers]:
    """Workers for as long as the block runs."""
    workers = Workers(function, count=count, memory_bytes=memory_bytes)
    try:
        yield workers
    finally:
        await workers.close()


async def _exchange(child: asyncio.subprocess.Process, request: bytes) -> bytes:
    assert child.stdin
    assert child.stdout
    child.stdin.write(_LENGTH.pack(len(request)) + request)
    await child.stdin.drain()
    (length,) = _LENGTH.unpack(await child.stdout.readexactly(_LENGTH.size))
    return await child.stdout.readexactly(length)


def serve(function: str, memory_bytes: int) -> None:
    """A child's life: calls from standard input, until it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    while header := requests.read(_LENGTH.size):
        (length,) = _LENGTH.unpack(header)
        reply = msgspec.msgpack.encode(call(**msgspec.msgpack.decode(requests.read(length))))
        _write(replies, reply)


def _write(replies: BinaryIO, reply: bytes) -> None:
    replies.write(_LENGTH.pack(len(reply)) + reply)
    replies.flush()
