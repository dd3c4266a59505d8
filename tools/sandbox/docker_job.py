"""One job of the `docker` tier: its descriptors here, and what goes over the one stream of its container.

relay.py is the other end. Nothing that comes from there is believed.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import msgspec

from tools.sandbox import linux
from tools.sandbox.sandbox import Limits

_CHUNK_BYTES = 1 << 16
_FRAME_BYTES = 1 << 20
_CALL_DESCRIPTORS = 8


class DockerJob:
    """The descriptors of one job, and both ends of what goes over the container's stream."""

    def __init__(self, kind: str, limits: Limits, leash: socket.socket, fds: list[int]) -> None:
        self.limits = limits
        self.leash = leash
        self._kind = kind
        self._output_fd, *self._fds = fds
        self._killed = asyncio.Event()
        self._reason = "exit"
        self._begun = False
        self.measure: Callable[[], int] = int
        """Called in a thread."""
        self._answering: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Let the leash and the descriptors go: their readers see the end."""
        self.leash.close()
        for fd in (self._output_fd, *self._fds):
            os.close(fd)

    async def relay(self, stream: socket.socket) -> dict[str, Any]:
        """Carry everything both ways until the job ends; how it did."""
        loop = asyncio.get_running_loop()
        end: dict[str, Any] = {"exit_code": -9}
        wall_s = self.limits.wall_s if self._kind == "call" else self.limits.session_s
        with stream:
            try:
                async with asyncio.timeout(wall_s):
                    await self._send_job(stream)
                    loop.add_reader(self.leash, self._killed_or, stream)
                    async with asyncio.TaskGroup() as tasks:
                        pump = tasks.create_task(self._pump_out(stream))
                        requests = tasks.create_task(self._pump_in(stream))
                        killed = tasks.create_task(self._killed.wait())
                        await asyncio.wait({pump, killed}, return_when=asyncio.FIRST_COMPLETED)
                        if pump.done():
                            end = pump.result()
                        for task in (pump, requests, killed):
                            task.cancel()
            except* TimeoutError:
                self._reason = "wall"
            except* OSError as errors:  # descriptors or memory of this process
                end = {"error": str(errors.exceptions[0])}
            finally:
                loop.remove_reader(self.leash)
        if not self._begun and self._reason == "exit" and "error" not in end:
            end = {"error": "the container ended before the code began"}
        return end | {"reason": self._reason}

    async def _send_job(self, stream: socket.socket) -> None:
        job = {"kind": self._kind, "limits": msgspec.to_builtins(self.limits)}
        await _send(stream, "job", msgspec.json.encode(job))
        if self._kind == "call":
            await _send(stream, "files", *map(_content, self._fds[:2]))

    def _killed_or(self, stream: socket.socket) -> None:
        try:
            message = self.leash.recv(64)
        except OSError:
            message = b""
        if message == b"interrupt":
            frame = json.dumps({"of": "interrupt", "sizes": []}).encode() + b"\n"
            with contextlib.suppress(OSError):  # it is just ending
                stream.send(frame)
        elif message == b"memory":
            self._answering = asyncio.create_task(self._answer_memory())
        else:
            self._reason = "killed"
            self._killed.set()
            asyncio.get_running_loop().remove_reader(self.leash)

    async def _answer_memory(self) -> None:
        answer = {"memory_bytes": await asyncio.to_thread(self.measure)}
        with contextlib.suppress(OSError):  # it has ended meanwhile, which answers too
            self.leash.send(json.dumps(answer).encode())

    async def _pump_in(self, stream: socket.socket) -> None:
        """Requests of a session."""
        loop = asyncio.get_running_loop()
        if self._kind == "call":
            return
        fd = self._fds[0]
        os.set_blocking(fd, False)
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            while True:
                await ready.wait()
                ready.clear()
                try:
                    content = (
                        _request(fd) if self._kind == "python" else [os.read(fd, _CHUNK_BYTES)]
                    )
                except BlockingIOError:
                    continue  # it has been read
                if not content[0]:
                    return
                await _send(stream, "channel" if self._kind == "python" else "lines", *content)
        finally:
            loop.remove_reader(fd)

    async def _pump_out(self, stream: socket.socket) -> dict[str, Any]:
        """Output and answers; returns how the job ended. Nothing that comes is believed."""
        answers_fd = self._fds[-1]
        async for of, content in _frames(stream):
            if of == "output":
                await _write(self._output_fd, content)
            elif of == "answers" and (self._kind != "call" or len(self._fds) > 2):
                await _write(answers_fd, content)
            elif of == "begun":
                self._begun = True
                await _send(stream, "go")
            elif of == "interrupted":
                with contextlib.suppress(OSError):  # the client has gone, or is sent too many
                    self.leash.send(b'{"interrupted": true}')
            elif of == "end":
                with contextlib.suppress(*_GARBAGE):
                    exit_code = msgspec.json.decode(content, type=_End).exit_code
                    return {"exit_code": max(-64, min(exit_code, 255))}
        return {"exit_code": -9}


async def _frames(stream: socket.socket) -> AsyncIterator[tuple[str, bytes]]:
    """What the relay sends, out of what docker makes of its stdout; ends where it is not that."""
    reader, writer = await asyncio.open_unix_connection(sock=stream.dup())
    received = bytearray()
    try:
        while True:
            head = await reader.readexactly(8)
            kind, size = struct.unpack(">BxxxI", head)
            content = await reader.readexactly(size)
            if kind != 1:
                continue  # its stderr: a relay that fails
            received += content
            while b"\n" in received[:_CHUNK_BYTES]:
                line, _, rest = received.partition(b"\n")
                try:
                    header = msgspec.json.decode(line, type=_Header)
                except _GARBAGE:
                    return
                if header.size > _FRAME_BYTES or len(rest) < header.size:
                    break
                yield header.of, bytes(rest[: header.size])
                received = rest[header.size :]
            if len(received) > 2 * _FRAME_BYTES:
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


_GARBAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises: the code may write anything there."""


class _End(msgspec.Struct):
    exit_code: int


class _Header(msgspec.Struct):
    of: str
    size: Annotated[int, msgspec.Meta(ge=0)] = 0


async def _send(stream: socket.socket, of: str, *content: bytes) -> None:
    header = json.dumps({"of": of, "sizes": [len(one) for one in content]}).encode()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just ended
        await loop.sock_sendall(stream, b"".join([header, b"\n", *content]))


async def _write(fd: int, content: bytes) -> None:
    """To a pipe or socket that this process reads itself, so it is never full for long."""
    rest = memoryview(content)
    os.set_blocking(fd, False)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            await asyncio.sleep(0)  # its reader runs in this loop
        except OSError:
            return  # nobody reads any more


def _request(channel_fd: int) -> list[bytes]:
    """A message and what is in its files."""
    with socket.socket(fileno=os.dup(channel_fd)) as channel:
        message, fds = linux.receive_fds(channel, _CHUNK_BYTES, _CALL_DESCRIPTORS)
    content = [message, *map(_content, fds)]
    for fd in fds:
        os.close(fd)
    return content


def _content(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()
