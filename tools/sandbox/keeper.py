"""The keeper of one job where there are no namespaces: `python -m tools.sandbox.keeper '{"fds": [7, 8, 9], …}'`.

    client ──leash──► keeper ──fork──► payload ──► whatever the code starts
                         ▲                              │
                         └───── orphans come here ◄─────┘

The same job and leash as those of zygote.py, for a single job. Standard library only. The keeper collects every
descendant of the code, so that it can kill all of them: first the payload, then orphan after orphan. It watches what
the kernel does not limit without namespaces: total memory, the number of processes, and the job's own directory, which
is its only writable one.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time
from typing import Any

from tools.sandbox import linux, root, scratch, seccomp, shell, watch
from tools.sandbox.payload import BEGUN, do, seed_random

LEAST_LANDLOCK_ABI = 6
"""It keeps signals inside; before it, code could kill other processes of the same user."""
_WATCH_EVERY_S = 0.1
_LEASH_MESSAGE_BYTES = 64
_MORE_PROCESSES = 256
"""On top of what the user runs already: a fork bomb must not go far in the time between two looks."""


class Keeper:
    """One job, from its start to its last process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        leash_fd, *self._fds = settings["fds"]
        self._leash = socket.socket(fileno=leash_fd)
        self._job: dict[str, Any] = settings["job"]
        self._confined: bool = settings["confined"]
        if self._confined:
            _keep_signals_inside()
        self._directory = tempfile.mkdtemp(prefix="sandbox-")
        self._reason = "exit"
        self._payload = 0
        self._exit_code: int | None = None

    def keep(self) -> None:
        """Run the job and say how it ended."""
        started = time.monotonic()
        read_fd, write_fd = os.pipe()
        try:
            self._payload = os.fork()
            if self._payload == 0:
                self._run_payload(write_fd)
            os.close(write_fd)
            for fd in self._fds:
                os.close(fd)
            self._watch(started)
        finally:
            self._kill_all()
            with contextlib.suppress(OSError):  # a mount of unconfined code may be in it
                scratch.remove(self._directory)
        wall_ms = (time.monotonic() - started) * 1e3
        end = {"exit_code": self._exit_code, "reason": self._reason, "wall_ms": wall_ms}
        if word := os.read(read_fd, 1 << 12):
            end |= json.loads(word)
        elif self._reason == "exit":  # no limit of the job has ended it
            end["error"] = f"ended with {self._exit_code} before the code began"
        try:
            self._leash.send(json.dumps(end).encode())
        except OSError:
            return  # the client has gone

    def _run_payload(self, status_fd: int) -> None:
        exit_code = 1
        try:
            try:
                self._become_a_program(status_fd)
                os.write(status_fd, BEGUN)
            except OSError as error:
                os.write(status_fd, json.dumps({"error": str(error)}).encode())
                return
            os.close(status_fd)
            exit_code = do(self._job, self._fds[1:], f"{self._directory}/.session.bashrc")
        finally:
            os._exit(exit_code)

    def _become_a_program(self, status_fd: int) -> None:
        os.setsid()
        output_fd, *others = self._fds
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        os.close(output_fd)
        null_fd = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null_fd, 0)
        linux.close_all_but({0, 1, 2, status_fd, *others})
        os.chdir(self._directory)
        os.environ |= {"HOME": self._directory, "TMPDIR": self._directory}
        tempfile.tempdir = None  # the code's is not where the keeper's own is
        if self._job["kind"] == "bash":
            path = f"{self._directory}/.session.bashrc"
            linux.write_file(path, shell.start_up_file(path))
        self._limit(self._job["limits"])
        if self._confined:
            _confine(self._directory)
        seed_random()

    def _limit(self, limits: dict[str, Any]) -> None:
        cpu_s = limits["cpu_s"] if self._job["kind"] == "call" else limits["session_cpu_s"]
        _, allowed = resource.getrlimit(resource.RLIMIT_NPROC)
        of_user = sum(map(_is_mine, watch.pids())) + _MORE_PROCESSES
        if allowed != resource.RLIM_INFINITY:
            of_user = min(of_user, allowed)
        for name, value in (
            ("AS", limits["process_memory_bytes"]),
            ("FSIZE", limits["file_bytes"]),
            ("NOFILE", limits["files"]),
            ("NPROC", of_user),
            ("CORE", 0),
        ):
            linux.limit(name, value, value)
        hard = cpu_s + 1 if self._job["kind"] == "call" else cpu_s
        linux.limit("CPU", cpu_s, hard)

    # -- while it runs -------------------------------------------------------------------------------------

    def _watch(self, started: float) -> None:
        limits = self._job["limits"]
        wall_s = limits["wall_s" if self._job["kind"] == "call" else "session_s"]
        payload_fd = os.pidfd_open(self._payload)
        poll = select.poll()
        poll.register(payload_fd, select.POLLIN)
        poll.register(self._leash, select.POLLIN)
        while self._exit_code is None:
            left_s = min(_WATCH_EVERY_S, max(0.0, started + wall_s - time.monotonic()))
            ready = {fd for fd, _ in poll.poll(left_s * 1e3)}
            if payload_fd in ready:
                break
            if self._leash.fileno() in ready:
                self._hear()
            elif time.monotonic() - started >= wall_s:
                self._end("wall")
            else:
                self._enforce(limits)

    def _hear(self) -> None:
        try:
            message = self._leash.recv(_LEASH_MESSAGE_BYTES)
        except OSError:
            message = b""
        if message == b"interrupt":
            os.killpg(self._payload, signal.SIGINT)
            self._tell({"interrupted": True})
        elif message == b"memory":
            self._tell({"memory_bytes": watch.proportional_bytes(self._descendants())})
        else:
            self._end("killed")

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the client has gone, which the leash tells next
            self._leash.send(json.dumps(message).encode())

    def _enforce(self, limits: dict[str, Any]) -> None:
        descendants = self._descendants()
        if len(descendants) > limits["processes"]:
            self._end("processes")
        elif watch.uses_more_than(limits["memory_bytes"], descendants):
            self._end("memory")
        elif scratch.takes_more_than(limits["disk_bytes"], self._directory, descendants):
            self._end("disk")

    def _end(self, reason: str) -> None:
        self._reason = reason
        self._exit_code = -signal.SIGKILL

    def _descendants(self) -> list[int]:
        return watch.descendants(os.getpid())

    def _kill_all(self) -> None:
        """Until there is none left: what is killed leaves its children to the keeper."""
        while True:
            # all at once where the kernel keeps our signals inside: what forks and ends is never found by its pid
            for pid in [-1] if self._confined else self._descendants():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return
            if pid == self._payload and self._exit_code is None:
                self._exit_code = os.waitstatus_to_exitcode(status)


def _keep_signals_inside() -> None:
    """Raises OSError where they are not: killing all that may be signalled would kill all of this user's processes."""
    linux.keep_signals_inside()
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return
    raise OSError("Landlock does not keep signals inside")


def _confine(directory: str) -> None:
    linux.drop_capabilities()
    rights = {os.open(directory, os.O_PATH | os.O_CLOEXEC): linux.LANDLOCK_ANY}
    for path in root.visible_paths():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights[fd] = linux.LANDLOCK_READ if os.path.isdir(path) else linux.LANDLOCK_READ_FILE
    for name in root.DEVICES:
        fd = os.open(f"/dev/{name}", os.O_PATH | os.O_CLOEXEC)
        rights[fd] = linux.LANDLOCK_READ_FILE | linux.LANDLOCK_WRITE_FILE
    linux.landlock(rights)
    for fd in rights:
        os.close(fd)
    linux.install_seccomp(seccomp.program(linux.machine(), namespaces=False))


def _is_mine(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except OSError:
        return False  # it has just ended


def main() -> None:
    """Keep the job that the arguments say."""
    settings = json.loads(sys.argv[1])
    sys.path.pop(0)  # the directory that holds this package
    linux.collect_orphans()
    Keeper(settings).keep()


if __name__ == "__main__":
    main()
