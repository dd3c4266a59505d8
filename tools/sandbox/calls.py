"""One call: code in, output and figures out."""

import contextlib
import os
import socket

from tools.errors import SandboxError
from tools.sandbox.figures import whole_figures
from tools.sandbox.jobs import JobServer
from tools.sandbox.sandbox import Limits, Outcome
from tools.sandbox.streams import Answers, Output, sealed_file


async def call(server: JobServer, code: str, stdin: bytes, limits: Limits) -> Outcome:
    """One call. Raises DeadBefore, or another SandboxError when the server dies in it."""
    with contextlib.ExitStack() as ours:  # closing the leash, when cancelled, kills the call
        try:
            leash, output, answers = await _begin(server, ours, code, stdin, limits)
        except OSError as error:  # descriptors or memory of this process
            raise SandboxError("client_failed", str(error)) from error
        end = await server.end_of(leash, limits.wall_s)
        # no process of the call is left that could write more
        full = output.full
        collected = output.take()
        full = full or output.full
        images = _images(answers) if answers else []
    return Outcome(
        output=collected,
        reason="output" if full or end.reason == "killed" else end.reason,
        exit_code=end.exit_code,
        wall_ms=end.wall_ms,
        images=images,
    )


async def _begin(
    server: JobServer, ours: contextlib.ExitStack, code: str, stdin: bytes, limits: Limits
) -> tuple[socket.socket, Output, Answers | None]:
    leashes: list[socket.socket] = []

    def kill() -> None:
        for leash in leashes:
            with contextlib.suppress(OSError):  # it ended by itself
                leash.shutdown(socket.SHUT_WR)

    with contextlib.ExitStack() as theirs:
        read_fd, write_fd = os.pipe()
        theirs.callback(os.close, write_fd)
        output = Output(read_fd, limits.output_bytes, kill)
        ours.callback(output.close)
        fds = [write_fd]
        for content in (code.encode("utf-8", "backslashreplace"), stdin):
            fds.append(sealed_file(content))
            theirs.callback(os.close, fds[-1])
        answers = None
        if limits.image_bytes:
            read_fd, write_fd = os.pipe()
            theirs.callback(os.close, write_fd)
            answers = Answers(read_fd, lambda: None)
            answers.image_limit_bytes = limits.image_bytes
            ours.callback(answers.close)
            fds.append(write_fd)
        leash = await server.begin("call", limits, fds)
        ours.enter_context(leash)
        leashes.append(leash)
    return leash, output, answers


def _images(answers: Answers) -> list[bytes]:
    answers.drain()
    answer = answers.take()
    return whole_figures(answer[1]) if answer else []
