"""A Python session: cells that share one `__main__`. Standard library only.

A request is one message on the channel, `{"run": 3, "cpu_s": 10, "image_bytes": 0}`, with the cell in a memory file
and stdin in another. The answer is `{"run": 3, "exit_code": 0, "images": [1042]}`, a newline, and the figures. SIGINT
ends a cell with KeyboardInterrupt; between cells it is ignored.
"""

import functools
import json
import os
import resource
import signal
import socket
import sys
from types import FrameType, ModuleType
from typing import Any

from tools.sandbox import cell, linux

_INTERRUPTED = 130
_MESSAGE_BYTES = 1 << 12


class ProcessorTimeExceeded(BaseException):
    """The cell has used its processor time."""

    __module__ = "builtins"  # a traceback names it without this file


def serve_cells(channel_fd: int) -> None:
    """Until the channel closes."""
    channel = socket.socket(fileno=channel_fd)
    main = cell.new_main()
    owner = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, _refuse_more_time)
    _answer(channel, 0, 0, [])
    while True:
        packet, fds = linux.receive_fds(channel, _MESSAGE_BYTES, 2)
        if not packet:
            return
        message = json.loads(packet)
        images: list[bytes] = []
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            exit_code = _run(message, fds, main, images)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # it came just as the cell ended
            exit_code = _INTERRUPTED
        if os.getpid() != owner:
            os._exit(exit_code)  # the cell has forked
        _answer(channel, message["run"], exit_code, images)


def _run(message: dict[str, Any], fds: list[int], main: ModuleType, images: list[bytes]) -> int:
    code_fd, stdin_fd = fds
    source = cell.read_file(code_fd).decode()
    os.dup2(stdin_fd, 0)
    os.close(stdin_fd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one may be at its end
    file_name = f"<cell {message['run']}>"
    used = resource.getrusage(resource.RUSAGE_SELF)
    _allow_time(used.ru_utime + used.ru_stime + message["cpu_s"])
    exit_code = cell.run_cell(source, main, file_name)
    if message["image_bytes"]:
        take = functools.partial(_take_figures, message["image_bytes"], images)
        exit_code = cell.guard(take, file_name) or exit_code
    exit_code = cell.guard(cell.flush, file_name) or exit_code
    _allow_time(resource.RLIM_INFINITY)
    return exit_code


def _take_figures(limit_bytes: int, images: list[bytes]) -> None:
    images += cell.take_figures(limit_bytes)


def _allow_time(until_s: float) -> None:
    """Up to the session's own, hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = hard if until_s == resource.RLIM_INFINITY else min(int(until_s) + 1, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _refuse_more_time(_: int, __: FrameType | None) -> None:
    _allow_time(resource.RLIM_INFINITY)
    raise ProcessorTimeExceeded("this cell has used its processor time")


def _answer(channel: socket.socket, run: int, exit_code: int, images: list[bytes]) -> None:
    sizes = [len(image) for image in images]
    header = json.dumps({"run": run, "exit_code": exit_code, "images": sizes}).encode()
    channel.sendall(b"".join([header, b"\n", *images]))
