"""What the client of a sandbox reads from its code and hands to it: never trusted, never waited for without end."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Annotated

import msgspec

_CHUNK_BYTES = 1 << 16
_HEADER_BYTES = 1 << 12


class Output:
    """Collects what comes through a pipe, up to a limit; `on_full` is called once when there is more."""

    def __init__(self, fd: int, limit_bytes: int, on_full: Callable[[], None]) -> None:
        self.full = False
        self._collected = bytearray()
        self._fd = fd
        self._limit_bytes = limit_bytes
        self._on_full = on_full
        self._resting = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self.read)

    def read(self) -> None:
        """Take all that is there; what is over the limit is thrown away."""
        while True:
            try:
                chunk = os.read(self._fd, _CHUNK_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                self._loop.remove_reader(self._fd)
                return
            self._collected += chunk
            if len(self._collected) > self._limit_bytes:
                del self._collected[self._limit_bytes :]
                if not self.full:
                    self.full = True
                    self._on_full()
                if self._resting:
                    self._loop.remove_reader(self._fd)
                return  # others have their turn; this may go on without end

    def take(self) -> bytes:
        """What has come since the last time; more may come then."""
        self.read()
        taken = bytes(self._collected)
        self._collected.clear()
        self.full = False
        return taken

    def limit(self, limit_bytes: int) -> None:
        """A run begins: collect so much, of what was printed before it at most half."""
        self._limit_bytes = limit_bytes
        del self._collected[limit_bytes // 2 :]
        self.full = False
        self._resting = False
        self._loop.add_reader(self._fd, self.read)

    def rest(self) -> None:
        """No run is on: who prints more than the limit meanwhile has to wait for the next one."""
        self._resting = True

    def close(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


class Answer(msgspec.Struct):
    """How one run ended, as the code's own process says it; see session_cells.py, shell.py and payload.py."""

    run: int = 0
    begun: bool = False
    """Of a run of bash: it was read whole, and can be interrupted. Its answer is to come."""
    exit_code: Annotated[int, msgspec.Meta(ge=-64, le=255)] = 0
    images: list[int] = []
    """Sizes in bytes of what follows the header."""
    restarted: bool = False


class Answers:
    """Takes answers from a descriptor: a JSON header in one line, then the images it names."""

    def __init__(self, fd: int, on_news: Callable[[], None]) -> None:
        self.image_limit_bytes = 0
        self.garbled = False
        """The code has written something else there: nobody will listen to it any more."""
        self._received = bytearray()
        self._awaited_bytes = 0
        """Until there are so many of them nothing is looked at again: they may come one by one."""
        self._fd = fd
        self._on_news = on_news
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            chunk = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self._loop.remove_reader(self._fd)
            return
        self._received += chunk
        if len(self._received) > self.image_limit_bytes + _HEADER_BYTES:
            self._give_up()
        self._on_news()

    def _give_up(self) -> None:
        self.garbled = True
        self._loop.remove_reader(self._fd)
        self._received.clear()
        self._awaited_bytes = 0

    def take(self) -> tuple[Answer, list[bytes]] | None:
        """The next answer, when it is complete."""
        if len(self._received) < self._awaited_bytes:
            return None
        header_bytes = self._received.find(b"\n", 0, _HEADER_BYTES) + 1
        if not header_bytes:
            if len(self._received) >= _HEADER_BYTES:
                self._give_up()
            return None
        header = self._received[:header_bytes]
        try:
            answer = msgspec.json.decode(header, type=Answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the code wrote it
            self._give_up()
            return None
        if any(size < 0 for size in answer.images) or sum(answer.images) > self.image_limit_bytes:
            self._give_up()
            return None
        self._awaited_bytes = header_bytes + sum(answer.images)
        if len(self._received) < self._awaited_bytes:
            return None
        with memoryview(self._received) as received:
            ends = list(accumulate(answer.images, initial=header_bytes))
            images = [bytes(received[first:end]) for first, end in pairwise(ends)]
        del self._received[: self._awaited_bytes]
        self._awaited_bytes = 0
        return answer, images

    def drain(self) -> None:
        """Take what is there, after the last writer has gone."""
        while not self.garbled:
            before = len(self._received)
            with contextlib.suppress(BlockingIOError):
                self._received += os.read(self._fd, _CHUNK_BYTES)
            if len(self._received) == before:
                return
            if before > self.image_limit_bytes + _HEADER_BYTES:
                self._give_up()

    def close(self) -> None:
        """Listen no more."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


async def write_all(fd: int, content: bytes) -> None:
    """Write to a pipe that does not block, as fast as it is read. Raises BrokenPipeError."""
    loop = asyncio.get_running_loop()
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(fd, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(fd)


def sealed_file(content: bytes) -> int:
    """A file in memory that nobody can change: what the code could write to would escape its memory limit."""
    if not content:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.memfd_create("sandbox", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with contextlib.ExitStack() as on_error:  # no memory for it
        on_error.callback(os.close, fd)
        written = 0
        while written < len(content):
            written += os.write(fd, content[written:] if written else content)
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        on_error.pop_all()
    return fd
