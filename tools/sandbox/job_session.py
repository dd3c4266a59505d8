"""A session as its client sees it; session_cells.py and shell.py are its other end."""

import asyncio
import contextlib
import os
import socket
import time
from typing import Literal

import msgspec

from tools.errors import SandboxError
from tools.sandbox import shell
from tools.sandbox.jobs import GRACE_S, PACKET_BYTES, JobEnd, JobServer
from tools.sandbox.sandbox import Limits, Outcome, Reason, SessionKind
from tools.sandbox.streams import Answer, Answers, Output, sealed_file, write_all

_INTERRUPT_S = 2.0
"""How long interrupted code may take to give in."""
_OPEN_S = 60.0


class JobSession:
    """See Session."""

    def __init__(self, server: JobServer, kind: SessionKind, limits: Limits) -> None:
        self.kind: SessionKind = kind
        self._server = server
        self._limits = limits
        self._news = asyncio.Event()
        self._resources = contextlib.ExitStack()
        self._end: JobEnd | None = None
        self._failure: SandboxError | None = None
        self._memory: asyncio.Future[int] | None = None
        self._runs = 0
        self._running = False
        self._closed = False
        self._idle_since = time.monotonic()

    @classmethod
    async def open(cls, server: JobServer, kind: SessionKind, limits: Limits) -> "JobSession":
        """Start one and wait until it takes its first run. Raises DeadBefore or another SandboxError."""
        session = cls(server, kind, limits)
        try:
            await session._begin()
            async with asyncio.timeout(_OPEN_S):
                if kind == "bash":
                    await write_all(session._lines_fd, shell.READY_LINE)
                await session._answer_to(0)
            if session._end:
                raise SandboxError("setup_failed", f"the session ended at once: {session._end}")
        except TimeoutError:
            await session.close()
            raise SandboxError("no_answer", f"no session within {_OPEN_S:g} s") from None
        except OSError as error:
            await session.close()
            raise SandboxError("client_failed", str(error)) from error
        except BaseException:  # cancelled, or the sandbox failed
            await session.close()
            raise
        return session

    @property
    def alive(self) -> bool:
        """See Session."""
        return not (self._closed or self._end or self._failure or self._server.dead)

    @property
    def idle_s(self) -> float:
        """See Session."""
        return 0.0 if self._running else time.monotonic() - self._idle_since

    async def run(self, text: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """See Session.run.

        Codes of errors: `zygote_died`, `keeper_died`, `no_answer`, `client_failed`, `session_over`.
        """
        if stdin and self.kind == "bash":
            raise ValueError("stdin is for Python; bash has here-documents")
        if self._running:
            raise ValueError("one run at a time")
        if self._failure:
            raise self._failure
        if self._closed:
            raise SandboxError("session_over", "the session has ended before")
        self._running = True
        try:
            return await self._run(text, stdin, limits or self._limits)
        except OSError as error:
            await self.close()
            raise SandboxError("client_failed", str(error)) from error
        except BaseException:  # cancelled, or the sandbox failed: what state it is in nobody knows
            await self.close()
            raise
        finally:
            self._running = False
            self._idle_since = time.monotonic()

    async def memory_bytes(self) -> int:
        """See Session."""
        if not self.alive:
            return 0
        if self._memory is None:
            self._memory = asyncio.get_running_loop().create_future()
            self._leash.send(b"memory")
        return await asyncio.shield(self._memory)

    async def close(self) -> None:
        """See Session. Returns when its processes are gone."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(SandboxError):  # then all its processes are gone too
            await self._kill()
        self._settle_memory(0)
        self._resources.close()

    # -- one run -------------------------------------------------------------------------------------------

    async def _run(self, text: str, stdin: bytes, limits: Limits) -> Outcome:
        begun = time.monotonic()
        self._output.limit(limits.output_bytes)
        self._answers.image_limit_bytes = limits.image_bytes
        self._runs += 1
        reason: Reason = "exit"
        answer: Answer | None = None
        images: list[bytes] = []
        try:
            async with asyncio.timeout(limits.wall_s):
                if not self._end:
                    await self._send(text, stdin, limits)
                answer, images = await self._answer_to(self._runs, stop_when_full=True)
        except TimeoutError:
            reason = "wall"
        if answer is None and not self._end:
            reason = "output" if self._output.full else reason
            answer = await self._interrupt()
        full = self._output.full
        output = self._output.take()
        if self.kind == "bash":
            output = shell.without_noise(output)
        if full and reason == "exit":
            reason = "output"
        exit_code = answer.exit_code if answer else -9
        kept: Literal["kept", "restarted", "ended"] = "kept"
        if self._end:
            kept = "ended"
            exit_code = self._end.exit_code
            if reason == "exit" and self._end.reason != "killed":
                reason = self._end.reason
            await self.close()
        elif answer and answer.restarted:
            kept = "restarted"
        wall_ms = (time.monotonic() - begun) * 1e3
        return Outcome(
            output=output,
            reason=reason,
            exit_code=exit_code,
            wall_ms=wall_ms,
            images=images,
            session=kept,
        )

    async def _send(self, text: str, stdin: bytes, limits: Limits) -> None:
        if self.kind == "bash":
            with contextlib.suppress(BrokenPipeError):  # it has just ended, which the leash tells
                await write_all(self._lines_fd, shell.command_line(self._runs, text))
            return
        request = {
            "run": self._runs,
            "cpu_s": limits.cpu_s,
            "image_bytes": limits.image_bytes,
        }
        fds = [sealed_file(text.encode("utf-8", "backslashreplace")), sealed_file(stdin)]
        try:
            socket.send_fds(self._channel, [msgspec.json.encode(request)], fds)
        except (BrokenPipeError, ConnectionResetError):
            return  # likewise
        finally:
            for fd in fds:
                os.close(fd)

    async def _answer_to(
        self, run: int, *, stop_when_full: bool = False
    ) -> tuple[Answer | None, list[bytes]]:
        """The answer, or none when the session has ended or, if that is asked for, the output is full."""
        while True:
            self._news.clear()
            while found := self._answers.take():
                if found[0].run == run:  # an earlier one came after its interruption
                    return found
            if self._failure:
                raise self._failure
            if self._end or (stop_when_full and self._output.full):
                return None, []
            if self._answers.garbled:
                await self._kill()
            else:
                await self._news.wait()

    async def _interrupt(self) -> Answer | None:
        """End the run and keep the session, if the code lets us; else kill it."""
        # bash takes a signal that comes between two programs of a loop as meant for one of them: ask again
        attempts = 4 if self.kind == "bash" else 1
        for _ in range(attempts):
            with contextlib.suppress(OSError):  # it has just ended
                self._leash.send(b"interrupt")
            try:
                async with asyncio.timeout(_INTERRUPT_S / attempts):
                    if self.kind == "bash":
                        with contextlib.suppress(BrokenPipeError):
                            await write_all(self._lines_fd, shell.interrupted_line(self._runs))
                    answer, _ = await self._answer_to(self._runs)
                    return answer
            except TimeoutError:
                continue
        await self._kill()
        return None

    async def _kill(self) -> None:
        """End every process and wait for it. Raises SandboxError."""
        with contextlib.suppress(OSError):  # it ended by itself
            self._leash.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(GRACE_S):
                while not self._end:
                    if self._failure:
                        raise self._failure
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            self._server.give_up()
            raise SandboxError("no_answer", f"alive {GRACE_S:g} s after it was killed") from None

    # -- its resources -------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as theirs:
            read_fd, write_fd = _pipe(theirs)
            self._output = Output(read_fd, self._limits.output_bytes, self._news.set)
            self._resources.callback(self._output.close)
            fds = [write_fd]
            if self.kind == "python":
                self._channel, far = socket.socketpair()
                theirs.enter_context(far)
                self._resources.enter_context(self._channel)
                self._channel.setblocking(False)
                answers_fd = os.dup(self._channel.fileno())
                fds.append(far.fileno())
            else:
                self._lines_fd = self._write_end(theirs, fds)
                answers_fd, write_fd = _pipe(theirs)
                fds.append(write_fd)
            self._answers = Answers(answers_fd, self._news.set)
            self._resources.callback(self._answers.close)
            self._leash = await self._server.begin(self.kind, self._limits, fds)
        self._resources.enter_context(self._leash)
        loop.add_reader(self._leash, self._hear)
        self._resources.callback(loop.remove_reader, self._leash)

    def _write_end(self, theirs: contextlib.ExitStack, fds: list[int]) -> int:
        read_fd, write_fd = os.pipe()
        theirs.callback(os.close, read_fd)
        self._resources.callback(os.close, write_fd)
        os.set_blocking(write_fd, False)
        fds.append(read_fd)
        return write_fd

    def _hear(self) -> None:
        """The server says that the session has ended, or how much memory it takes."""
        try:
            packet = self._leash.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            packet = b""
        try:
            end = self._server.decode_end(packet)
        except SandboxError as error:
            self._failure = error
        else:
            if end.memory_bytes is not None:
                self._settle_memory(end.memory_bytes)
                return
            self._end = end
        asyncio.get_running_loop().remove_reader(self._leash)
        self._settle_memory(0)
        self._news.set()

    def _settle_memory(self, memory_bytes: int) -> None:
        if self._memory and not self._memory.done():
            self._memory.set_result(memory_bytes)
        self._memory = None


def _pipe(theirs: contextlib.ExitStack) -> tuple[int, int]:
    """The write end is for the other side."""
    read_fd, write_fd = os.pipe()
    theirs.callback(os.close, write_fd)
    return read_fd, write_fd
