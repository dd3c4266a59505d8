"""Runs inside a container, beside the code: carries a job's descriptors over the container's one stream each way.

Standard library only; docker.py sends it in, with the modules that it needs. Frames are a JSON line and the bytes that
it announces: `{"of": "output", "size": 12}`.

    stdin   →   "job" (first, JSON), "go", "channel" (a request, its code and stdin: `sizes`), "lines", "interrupt"
    stdout  ←   "begun", "output", "answers", "interrupted", "end" (JSON: the exit code)

None of the code runs until "begun" is answered by "go": a container that ends without it has failed, not the code.
The code's process is of the same user and can disturb all this; it harms itself alone, since the other end believes
nothing that comes from here.
"""

import json
import os
import resource
import select
import signal
import socket
from typing import Any

from tools.sandbox import linux, seccomp
from tools.sandbox.payload import do
from tools.sandbox.shell import start_up_file

_CHUNK_BYTES = 1 << 16
_RC_PATH = "/tmp/.session.bashrc"


class Relay:
    """One job."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        self._poll = select.poll()
        self._sources: dict[int, str] = {}
        self._channel: socket.socket | None = None
        self._lines_fd = -1
        self._go_fd = -1
        self._payload = 0

    def serve(self) -> None:
        """Until the job ends."""
        _, content = self._read_frame()
        self._start(json.loads(content[0]))
        payload_fd = os.pidfd_open(self._payload)
        self._poll.register(payload_fd, select.POLLIN)
        self._poll.register(0, select.POLLIN)
        while True:
            ready = {fd for fd, _ in self._poll.poll()}
            for fd in [fd for fd in self._sources if fd in ready]:
                self._forward(fd)
            if payload_fd in ready:
                break
            if 0 in ready:
                self._obey()
        for fd in list(self._sources):
            while self._forward(fd):
                pass
        _, status = os.waitpid(self._payload, 0)
        end = json.dumps({"exit_code": os.waitstatus_to_exitcode(status)})
        self._send("end", end.encode())

    def _start(self, job: dict[str, Any]) -> None:
        kind, limits = job["kind"], job["limits"]
        output_fd = self._source("output")
        if kind == "python":
            self._channel, theirs = socket.socketpair()
            self._watch(os.dup(self._channel.fileno()), "answers")
            fds = [theirs.detach()]
        elif kind == "bash":
            lines_fd, self._lines_fd = os.pipe()
            fds = [lines_fd, self._source("answers")]
        else:
            fds = [_file(content) for content in self._read_frame()[1]]
            fds += [self._source("answers")] if limits["image_bytes"] else []
        status_fd, ready_fd = os.pipe()
        wait_fd, self._go_fd = os.pipe()
        self._payload = os.fork()
        if self._payload == 0:
            _run_payload(job, output_fd, fds, (ready_fd, wait_fd))
        for fd in (output_fd, *fds, ready_fd, wait_fd):
            os.close(fd)
        if os.read(status_fd, 1):
            self._send("begun", b"")
        os.close(status_fd)

    def _source(self, name: str) -> int:
        read_fd, write_fd = os.pipe()
        self._watch(read_fd, name)
        return write_fd

    def _watch(self, fd: int, name: str) -> None:
        os.set_blocking(fd, False)
        self._sources[fd] = name
        self._poll.register(fd, select.POLLIN)

    def _forward(self, fd: int) -> bool:
        try:
            chunk = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self._poll.unregister(fd)
            del self._sources[fd]
            return False
        name = self._sources[fd]
        if name == "answers":  # what was printed before comes before
            for other in [other for other, of in self._sources.items() if of == "output"]:
                while self._forward(other):
                    pass
        self._send(name, chunk)
        return True

    def _obey(self) -> None:
        header, content = self._read_frame()
        if header["of"] == "go":
            os.write(self._go_fd, b".")
        elif header["of"] == "interrupt":
            os.killpg(self._payload, signal.SIGINT)
            self._send("interrupted", b"")
        elif header["of"] == "lines":
            os.write(self._lines_fd, content[0])
        elif self._channel:
            request, *files = content
            fds = [_file(one) for one in files]
            socket.send_fds(self._channel, [request], fds)
            for fd in fds:
                os.close(fd)

    def _read_frame(self) -> tuple[dict[str, Any], list[bytes]]:
        # nothing is read ahead, so that poll(2) tells of every frame; headers are short
        line = bytearray()
        while not line.endswith(b"\n"):
            line += _read(1)
        header = json.loads(line)
        return header, [_read(size) for size in header["sizes"]]

    def _send(self, of: str, content: bytes) -> None:
        frame = json.dumps({"of": of, "size": len(content)}).encode() + b"\n" + content
        while frame:
            frame = frame[os.write(self._out, frame) :]


def _read(size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        chunk = os.read(0, size - len(content))
        if not chunk:
            os._exit(0)  # the other end has gone
        content += chunk
    return bytes(content)


def _file(content: bytes) -> int:
    fd = os.memfd_create("relay")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _run_payload(
    job: dict[str, Any], output_fd: int, fds: list[int], ready_wait: tuple[int, int]
) -> None:
    exit_code = 1
    try:
        os.setsid()
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        null_fd = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null_fd, 0)
        keep = {0, 1, 2, *fds, *ready_wait}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    continue  # the listing's own
        os.chdir("/tmp")
        limits = job["limits"]
        cpu_s = limits["cpu_s"] if job["kind"] == "call" else limits["session_cpu_s"]
        hard = cpu_s + 1 if job["kind"] == "call" else cpu_s
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, hard))
        resource.setrlimit(resource.RLIMIT_AS, (limits["process_memory_bytes"],) * 2)
        with open(_RC_PATH, "w", encoding="utf-8") as file:
            file.write(start_up_file(_RC_PATH))
        # docker's own list allows what is few for the whole machine
        linux.install_seccomp(seccomp.program(linux.machine()))
        ready_fd, wait_fd = ready_wait
        os.write(ready_fd, b".")
        os.close(ready_fd)
        told_to_go = os.read(wait_fd, 1)
        os.close(wait_fd)
        if told_to_go:
            exit_code = do(job, fds, _RC_PATH)
    finally:
        os._exit(exit_code)


def main() -> None:
    """Relay the job that comes first."""
    Relay().serve()


if __name__ == "__main__":
    main()
