"""The fork server of the `ns` tier: `python -m tools.sandbox.zygote '{"control_fd": 7, "imports": ["numpy"]}'`.

    client ──control──► server ──► template ──spawn──► init     process 1 of a world's own process namespace
       │     (packets)   │  ▲         └───────fork───► payload  process 2; makes the world around itself, stands by
       │                 │  │               ▲  │
       ├──leash──────────┘  └────stage──────┘  │    the job, or why there is no world
       ├──code, stdin─────────────────────────►│    sealed memory files; in a session they come on a channel
       └◄─output───────────────────────────────┘    a pipe

Standard library only. Invariants:
- A job is one packet on `control`: what it is and its limits, and descriptors: leash, output, and those of payload.py.
  The answer comes back on the leash, when every process of the job is gone. Closing the leash kills the job.
- The server never reads code, stdin or output, so no fork of it holds another job's data in its memory.
- A job's processes see neither the server nor other jobs. They die with their init, which the server kills when the
  payload ends, or by a limit.
- One world is always ready for the next job: making it costs no time of the call.
- A job that the host has no descriptors, processes or memory for is refused; those that run go on.
- When the client dies, its end of `control` closes and the server exits; the kernel then kills everything inside.
"""

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tools.sandbox import linux, root, watch
from tools.sandbox.networks import Networks
from tools.sandbox.payload import PACKET_BYTES
from tools.sandbox.template import Template

_WATCH_EVERY_S = 0.1
_WATCH_AFTER_S = 0.05
_WATCH_SHARE = 0.05
"""Of the processor time of one core, for looking at the memory of many processes."""
_USUAL_DISK_BYTES = 64 << 20
_MOST_DESCRIPTORS = 8
"""Of a packet. As many are kept free: to take a job that is then refused, and to look at those that run."""
_LEASH_MESSAGE_BYTES = 64


@dataclass
class _Job:
    """What runs in a world, as the server sees it."""

    leash: socket.socket
    memory_bytes: int
    started: float
    deadline: float
    reason: str = "exit"

    def answer(self, message: dict[str, Any]) -> None:
        """Tell the client, if it is still there."""
        _tell(self.leash, message | {"wall_ms": (time.monotonic() - self.started) * 1e3})


@dataclass
class _Place:
    """A world and its two processes; without a job it stands by."""

    init: int
    init_fd: int
    payload: int
    payload_fd: int
    namespace: int
    """Inode of the process namespace that all its processes are in."""
    network: int
    stage: socket.socket
    disk_bytes: int
    job: _Job | None = None
    exit_code: int = 0
    error: dict[str, Any] = field(default_factory=dict)
    """Why none of the code has run, if so."""

    def kill(self, reason: str) -> None:
        """End every process of it."""
        if self.job and self.job.reason == "exit":
            self.job.reason = reason
            self.job.deadline = float("inf")
            self.end()

    def end(self) -> None:
        """Kill init, and with it all that is left."""
        with contextlib.suppress(ProcessLookupError):  # it is killed already
            signal.pidfd_send_signal(self.init_fd, signal.SIGKILL)


@contextlib.contextmanager
def _keeping_free(descriptors: int) -> Iterator[None]:
    """Open the rest of what is allowed, at most."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(0, most - descriptors), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _tell(leash: socket.socket, message: dict[str, Any]) -> None:
    try:
        leash.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)
    except OSError:
        return  # the client has gone, or has given this job up


class Server:
    """Starts jobs, watches them, and says how they ended; one thread, one loop."""

    def __init__(self, control: socket.socket, template: Template) -> None:
        self._control = control
        self._template = template
        self._networks = Networks()
        self._running: dict[int, _Place] = {}
        """By the inode of the process namespace."""
        self._ready: _Place | None = None
        self._disk_bytes = _USUAL_DISK_BYTES
        """Of the last job, and so of the world that stands by."""
        self._lacks_world = True
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self._seen: dict[int, list[int]] = {}
        """Processes, as they were when memory was last looked at."""
        self._next_watch = 0.0
        self._next_look = 0.0
        """When limits are looked at: seldom, since many may run."""
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._listen(control.fileno(), self._accept)
        self._listen(template.channel.fileno(), lambda: os._exit(1))  # it has died

    def serve(self) -> NoReturn:
        """Until the client goes."""
        while True:
            events = self._epoll.poll(0 if self._lacks_world else self._sleep_s())
            if not events and self._lacks_world:
                self._stock_up()
            for fd, _ in sorted(events, key=lambda event: event[0] == self._control.fileno()):
                # control comes last: a new job may take the descriptor numbers of one that has just ended
                if handler := self._handlers.get(fd):
                    handler()
            self._enforce(time.monotonic())

    def _listen(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        # explicitly, since a fork that has not closed its copy yet would keep it on the epoll
        if self._handlers.pop(fd, None):
            self._epoll.unregister(fd)

    def _sleep_s(self) -> float:
        return max(0.0, self._next_look - time.monotonic()) if self._running else -1

    # -- starting ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        self._stock_up()  # before the descriptors of the packet take the room for it
        packet, fds = linux.receive_fds(self._control, PACKET_BYTES, _MOST_DESCRIPTORS)
        if not packet:
            os._exit(0)
        leash = socket.socket(fileno=fds[0])
        try:
            self._start(packet, leash, fds[1:])
        except OSError as error:  # no memory or descriptors for one more; those that run go on
            facts = f"{len(self._running)} jobs run, RLIMIT_NOFILE is {self._descriptors}"
            _tell(leash, {"error": f"no room for a job: {error} ({facts})", "wall_ms": 0.0})
            leash.close()
        finally:
            for fd in fds[1:]:
                os.close(fd)

    def _start(self, packet: bytes, leash: socket.socket, fds: list[int]) -> None:
        started = time.monotonic()
        if leash.fileno() >= self._descriptors - _MOST_DESCRIPTORS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        description = json.loads(packet)
        limits = description["limits"]
        wall_s = limits["wall_s" if description["kind"] == "call" else "session_s"]
        place = self._occupy(self._take_place(limits["disk_bytes"]), packet, fds)
        place.job = _Job(leash, limits["memory_bytes"], started, started + wall_s)
        self._running[place.namespace] = place
        self._next_look = min(self._next_look, started + min(wall_s, _WATCH_AFTER_S))
        self._listen(leash.fileno(), lambda: self._hear(place))

    def _occupy(self, place: _Place, packet: bytes, fds: list[int]) -> _Place:
        """Hand a job to it; to a new one, if somebody has killed it while it stood by."""
        try:
            socket.send_fds(place.stage, [packet], fds)
        except OSError:
            place.end()
            place = self._make_place(place.disk_bytes)
            try:
                socket.send_fds(place.stage, [packet], fds)
            except OSError:
                place.end()
                raise
        return place

    def _take_place(self, disk_bytes: int) -> _Place:
        self._disk_bytes, self._lacks_world = disk_bytes, True
        place, self._ready = self._ready, None
        if place and place.disk_bytes == disk_bytes:
            return place
        if place:
            place.end()
        return self._make_place(disk_bytes)

    def _stock_up(self) -> None:
        self._lacks_world = False
        if self._ready is None:
            try:
                self._ready = self._make_place(self._disk_bytes)
            except OSError:
                return  # the next job tries again, and tells its client

    def _make_place(self, disk_bytes: int) -> _Place:
        with _keeping_free(_MOST_DESCRIPTORS), contextlib.ExitStack() as undo:
            stage, far_stage = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(stage.close)
            with far_stage:
                network = self._networks.take()
                undo.callback(os.close, network)
                made = self._template.make(disk_bytes, far_stage, network)
            undo.callback(made.end)
            init_fd = os.pidfd_open(made.init)
            undo.callback(os.close, init_fd)
            payload_fd = os.pidfd_open(made.payload)
            undo.pop_all()
        place = _Place(
            init=made.init,
            init_fd=init_fd,
            payload=made.payload,
            payload_fd=payload_fd,
            namespace=made.namespace,
            network=network,
            stage=stage,
            disk_bytes=disk_bytes,
        )
        self._listen(place.payload_fd, lambda: self._payload_ended(place))
        self._listen(place.init_fd, lambda: self._init_ended(place))
        return place

    # -- ending --------------------------------------------------------------------------------------------

    def _hear(self, place: _Place) -> None:
        job = place.job
        assert job
        try:
            message = job.leash.recv(_LEASH_MESSAGE_BYTES)
        except OSError:
            message = b""
        if message == b"interrupt":
            with contextlib.suppress(ProcessLookupError):  # it is not a program yet, or no longer
                os.killpg(place.payload or place.init, signal.SIGINT)
            _tell(job.leash, {"interrupted": True})
        elif message == b"memory":
            taken_bytes = watch.proportional_bytes(self._processes(place))
            taken_bytes += watch.files_in_memory_bytes(place.payload)
            _tell(job.leash, {"memory_bytes": taken_bytes})
        else:
            self._forget(job.leash.fileno())
            place.kill("killed")

    def _payload_ended(self, place: _Place) -> None:
        _, status = os.waitpid(place.payload, 0)
        self._forget(place.payload_fd)
        os.close(place.payload_fd)
        place.payload = 0
        place.exit_code = os.waitstatus_to_exitcode(status)
        try:
            word = place.stage.recv(PACKET_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            word = b""  # it had not even read the job
        if word:
            place.error = json.loads(word)
        elif place.job and place.job.reason == "exit":  # no limit of the job has ended it
            why = f"ended with {place.exit_code} before the code began"
            place.error = {"error": why, "dead_before": True}
        if self._ready is place:
            self._ready = None
        place.end()

    def _init_ended(self, place: _Place) -> None:
        if self._ready is place:
            self._ready = None
        self._forget(place.init_fd)
        os.close(place.init_fd)
        place.stage.close()
        self._networks.give_back(place.network)
        if job := place.job:
            del self._running[place.namespace]
            self._forget(job.leash.fileno())
            job.answer({"exit_code": place.exit_code, "reason": job.reason} | place.error)
            job.leash.close()

    def _enforce(self, now: float) -> None:
        if now < self._next_look or not self._running:
            return
        young = True
        first_deadline = float("inf")
        for place in self._running.values():
            assert place.job
            if now >= place.job.deadline:
                place.kill("wall")
            young = young and now - place.job.started < _WATCH_AFTER_S
            first_deadline = min(first_deadline, place.job.deadline)
        if not young and now >= self._next_watch:
            self._watch_memory()
            took_s = time.monotonic() - now
            self._next_watch = now + max(_WATCH_EVERY_S, took_s / _WATCH_SHARE)
        self._next_look = min(first_deadline, max(self._next_watch, now + _WATCH_AFTER_S))

    def _processes(self, place: _Place) -> list[int]:
        if place.namespace not in self._seen:  # it is new
            self._seen = watch.processes_by_namespace()
        return self._seen.get(place.namespace, [])

    def _watch_memory(self) -> None:
        self._seen = watch.processes_by_namespace()
        for namespace, pids in self._seen.items():
            watched = self._running.get(namespace)
            limit = watched.job.memory_bytes if watched and watched.job else None
            if watched and limit is not None and watch.uses_more_than(limit, pids):
                watched.kill("memory")


def main() -> None:
    """Become the server, say so on `control`, and serve."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=settings["control_fd"])
    control.set_inheritable(False)
    os.umask(0o022)
    sys.path.pop(0)  # the directory that holds this package
    try:
        root.enter()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        server = Server(control, Template(settings["imports"], _USUAL_DISK_BYTES))
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        raise SystemExit(1) from None
    control.send(b"{}")
    server.serve()


if __name__ == "__main__":
    main()
