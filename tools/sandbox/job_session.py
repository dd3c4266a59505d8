"""A session as its client sees it; session_cells.py and shell.py are its other end."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from tools.errors import SandboxError
from tools.sandbox import shell
from tools.sandbox.figures import whole_figures
from tools.sandbox.jobs import GRACE_S, PACKET_BYTES, DeadBefore, JobEnd, JobServer
from tools.sandbox.sandbox import Limits, Outcome, Reason, SessionKind
from tools.sandbox.streams import Answer, Answers, Output, sealed_file, write_all

_INTERRUPT_S = 2.0
"""How long interrupted code may take to give in."""
_ATTEMPTS = {"bash": 4, "python": 2}
"""Bash takes a signal that comes between two programs of a loop as meant for one of them; Python ignores one that comes
before its cell begins."""
_OPEN_S = 60.0


class JobSession:
    """See Session."""

    def __init__(self, server: JobServer, kind: SessionKind, limits: Limits) -> None:
        self.kind: SessionKind = kind
        self._server = server
        self._limits = limits
        self._news = asyncio.Event()
        self._end: JobEnd | None = None
        self._failure: SandboxError | None = None
        self._memory: asyncio.Future[int] | None = None
        self._runs = 0
        self._begun = 0
        """The last run that may be interrupted."""
        self._signals_asked = self._signals_sent = 0
        self._running = False
        self._closed = False
        self._idle_since = time.monotonic()

    @classmethod
    async def open(cls, server: JobServer, kind: SessionKind, limits: Limits) -> "JobSession":
        """Start one and wait until it takes its first run. Raises DeadBefore or another SandboxError."""
        session = cls(server, kind, limits)
        try:
            await session._begin()
        except OSError as error:
            raise SandboxError("client_failed", str(error)) from error
        try:
            await session._take_up()
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
        """See Session. A server that does not answer is given up, and its sessions with it."""
        if not self.alive:
            return 0
        if self._memory is None:
            self._memory = asyncio.get_running_loop().create_future()
            with contextlib.suppress(OSError):  # it has just ended, which answers too
                self._leash.send(b"memory")
        try:
            async with asyncio.timeout(GRACE_S):
                return await asyncio.shield(self._memory)
        except TimeoutError:
            self._server.give_up()
            self._failure = SandboxError("no_answer", f"not measured within {GRACE_S:g} s")
            self._news.set()
            if not self._running:  # else the run closes it
                await self.close()
            return 0

    async def close(self) -> None:
        """See Session. Returns when its processes are gone."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.suppress(SandboxError):  # then all its processes are gone too
                await self._kill()
        finally:
            self._settle_memory(0)
            self._resources.close()

    async def _take_up(self) -> None:
        """Wait until it takes its first run. Raises SandboxError."""
        try:
            async with asyncio.timeout(_OPEN_S):
                if self.kind == "bash":
                    with contextlib.suppress(BrokenPipeError):  # its end is told by the leash
                        await write_all(self._lines_fd, shell.READY_LINE)
                await self._answer_to(0)
        except TimeoutError:
            raise SandboxError("no_answer", f"no session within {_OPEN_S:g} s") from None
        except SandboxError as error:
            if self._server.dead:
                raise DeadBefore(error.code, error.detail) from error
            raise
        if self._end:
            raise DeadBefore("setup_failed", f"the session ended at once: {self._end}")

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
                answer, images = await self._answer_to(self._runs, lambda: self._output.full)
        except TimeoutError:
            reason = "wall"
        if answer is None and not self._end:
            reason = "output" if self._output.full else reason
            answer = await self._interrupt()
        full = self._output.full
        output = self._output.take()
        self._output.rest()
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
            images=whole_figures(images),
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
        with contextlib.ExitStack() as files:
            fds = []
            for content in (text.encode("utf-8", "backslashreplace"), stdin):
                fds.append(sealed_file(content))
                files.callback(os.close, fds[-1])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # likewise
                socket.send_fds(self._channel, [msgspec.json.encode(request)], fds)
                self._begun = self._runs

    async def _answer_to(
        self, run: int, enough: Callable[[], bool] = lambda: False
    ) -> tuple[Answer | None, list[bytes]]:
        """The answer, or none when the session has ended or there is no need to wait any more."""
        while True:
            self._news.clear()
            while found := self._answers.take():
                if found[0].begun:
                    self._begun = found[0].run
                elif found[0].run == run:  # an earlier one came after its interruption
                    return found
            if self._failure:
                raise self._failure
            if self._end or enough():
                return None, []
            if self._answers.garbled:
                await self._kill()
            else:
                await self._news.wait()

    async def _interrupt(self) -> Answer | None:
        """End the run and keep the session, if the code lets us; else kill it."""
        run, attempts = self._runs, _ATTEMPTS[self.kind]
        for _ in range(attempts):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERRUPT_S / attempts):
                    answer, _ = await self._answer_to(run, lambda: self._begun == run)
                    if answer or self._end:
                        return answer
            if self._begun < run:
                continue
            await self._signal()
            with contextlib.suppress(TimeoutError, BrokenPipeError):
                async with asyncio.timeout(_INTERRUPT_S / attempts):
                    if self.kind == "bash":
                        await write_all(self._lines_fd, shell.interrupted_line(run))
                    answer, _ = await self._answer_to(run)
                    return answer
        await self._kill()
        return None

    async def _signal(self) -> None:
        """Returns when the signal is sent: one that came later would meet the next run. Raises SandboxError."""
        self._signals_asked += 1
        with contextlib.suppress(OSError):  # it has just ended
            self._leash.send(b"interrupt")
        await self._hear_that(lambda: self._signals_sent == self._signals_asked, "interrupted")

    async def _kill(self) -> None:
        """End every process and wait for it. Raises SandboxError."""
        with contextlib.suppress(OSError):  # it ended by itself
            self._leash.shutdown(socket.SHUT_WR)
        await self._hear_that(lambda: False, "killed")

    async def _hear_that(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for the server's word, or the session's end. Raises SandboxError."""
        try:
            async with asyncio.timeout(GRACE_S):
                while not (self._end or is_so()):
                    if self._failure:
                        raise self._failure
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            self._server.give_up()
            raise SandboxError("no_answer", f"not {what} within {GRACE_S:g} s") from None

    # -- its resources -------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            read_fd, write_fd = _pipe(theirs)
            self._output = Output(read_fd, self._limits.output_bytes, self._news.set)
            ours.callback(self._output.close)
            fds = [write_fd]
            if self.kind == "python":
                self._channel, far = socket.socketpair()
                theirs.enter_context(far)
                ours.enter_context(self._channel)
                self._channel.setblocking(False)
                answers_fd = os.dup(self._channel.fileno())
                fds.append(far.fileno())
            else:
                lines_fd, self._lines_fd = os.pipe()
                theirs.callback(os.close, lines_fd)
                ours.callback(os.close, self._lines_fd)
                os.set_blocking(self._lines_fd, False)
                answers_fd, write_fd = _pipe(theirs)
                fds += [lines_fd, write_fd]
            self._answers = Answers(answers_fd, self._news.set)
            ours.callback(self._answers.close)
            self._leash = await self._server.begin(self.kind, self._limits, fds)
            ours.enter_context(self._leash)
            loop.add_reader(self._leash, self._hear)
            ours.callback(loop.remove_reader, self._leash)
            self._resources = ours.pop_all()

    def _hear(self) -> None:
        """The server says that the session has ended, that a signal is sent, or how much memory it takes."""
        try:
            packet = self._leash.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            return  # it has ended and not heard our last word; its own is still to be read
        try:
            end = self._server.decode_end(packet)
        except SandboxError as error:
            self._failure = error
        else:
            if end.memory_bytes is not None:
                self._settle_memory(end.memory_bytes)
                return
            if end.interrupted:
                self._signals_sent += 1
                self._news.set()
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
