"""The fork server of the `ns` tier: `python -m tools.sandbox.zygote '{"control_fd": 7, "imports": ["numpy"]}'`.

    client ──control──► server ──fork──► init ──fork──► payload
       │     (packets)  process 1 of     process 1      the code,
       │                its own world    of its own     process 2
       ├──leash──► server     the answer comes back on it; closing it, or its way here, kills the call
       ├──code, stdin──► payload      sealed memory files
       └◄─output─── payload           a pipe

Standard library only. Invariants:
- A call is one packet on `control`: its limits, and four descriptors (leash, code, stdin, output).
- The server never reads code, stdin or output, so no fork of it holds another call's data in its memory.
- A call's processes see neither the server nor other calls. They die with their init, which ends when the payload
  ends or by SIGKILL.
- When the client dies, its end of `control` closes and the server exits; the kernel then kills everything inside.
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from tools.sandbox import linux, root, seccomp
from tools.sandbox.cell import run_cell

PACKET_BYTES = 1 << 16
_WATCH_EVERY_S = 0.1
_WATCH_AFTER_S = 0.05
_SHARED_MEMORY_BYTES = 16 << 20
_TMP_FILES = 8192
_SETUP_FAILED = 97
_PAGE_BYTES = resource.getpagesize()


@dataclass
class _Call:
    """One running call, as the server sees it."""

    init: int
    init_fd: int
    namespace: int
    """Inode of the process namespace that all its processes are in."""
    leash: socket.socket
    status_fd: int
    """Init writes here how the payload ended, or why there was none."""
    memory_bytes: int
    started: float
    deadline: float
    reason: str = "exit"

    def kill(self, reason: str) -> None:
        """End every process of the call."""
        if self.reason == "exit":
            self.reason = reason
            self.deadline = float("inf")
            signal.pidfd_send_signal(self.init_fd, signal.SIGKILL)

    def answer(self, message: dict[str, Any]) -> None:
        """Tell the client, if it is still there."""
        _tell(self.leash, message | {"wall_ms": (time.monotonic() - self.started) * 1e3})


def _tell(leash: socket.socket, message: dict[str, Any]) -> None:
    try:
        leash.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)
    except OSError:
        return  # the client has gone, or has given this call up


class Server:
    """Starts calls, watches them, and says how they ended; one thread, one loop."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._namespace_fd = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self._world = World()
        self._calls: dict[int, _Call] = {}
        """By the descriptor of init and by that of the leash."""
        self._next_watch = 0.0
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)

    def serve(self) -> NoReturn:
        """Until the client goes."""
        while True:
            events = dict(self._epoll.poll(self._sleep_s()))
            accept = events.pop(self._control.fileno(), 0)
            for fd in events:
                if call := self._calls.get(fd):
                    self._finish(call) if fd == call.init_fd else self._give_up(call)
            if (
                accept
            ):  # last: a new call may take the descriptor numbers of one that has just ended
                self._accept()
            self._enforce(time.monotonic())

    def _sleep_s(self) -> float:
        if not self._calls:
            return -1
        first = min(call.deadline for call in self._calls.values())
        return max(0.0, min(first - time.monotonic(), _WATCH_EVERY_S))

    def _accept(self) -> None:
        packet, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 4)
        if not packet:
            os._exit(0)
        leash = socket.socket(fileno=fds[0])
        try:
            self._start(json.loads(packet), leash, fds[1:])
        except OSError as error:  # no memory or descriptors for one more; those that run go on
            _tell(leash, {"error": str(error), "wall_ms": 0.0})
            leash.close()
        finally:
            for fd in fds[1:]:
                os.close(fd)

    def _start(self, limits: dict[str, Any], leash: socket.socket, fds: list[int]) -> None:
        started = time.monotonic()
        status_fd, init_status_fd = os.pipe()
        linux.unshare(linux.CLONE_NEWPID)
        try:
            init = os.fork()
            if init == 0:
                self._world.run(limits, fds, init_status_fd)
            namespace = os.stat("/proc/self/ns/pid_for_children").st_ino
        finally:
            linux.setns(self._namespace_fd, linux.CLONE_NEWPID)
            os.close(init_status_fd)
        call = _Call(
            init=init,
            init_fd=os.pidfd_open(init),
            namespace=namespace,
            leash=leash,
            status_fd=status_fd,
            memory_bytes=limits["memory_bytes"],
            started=started,
            deadline=started + limits["wall_s"],
        )
        for fd in (call.init_fd, leash.fileno()):
            self._calls[fd] = call
            self._epoll.register(fd, select.EPOLLIN)

    def _give_up(self, call: _Call) -> None:
        self._forget(call.leash.fileno())
        call.kill("killed")

    def _forget(self, fd: int) -> None:
        # explicitly, since a fork that has not closed its copy yet would keep it on the epoll
        if self._calls.pop(fd, None):
            self._epoll.unregister(fd)

    def _finish(self, call: _Call) -> None:
        _, wait_status = os.waitpid(call.init, 0)
        report = os.read(call.status_fd, PACKET_BYTES)
        if report:
            message = json.loads(report)
        elif os.WIFSIGNALED(wait_status):
            message = {"exit_code": -os.WTERMSIG(wait_status)}
        else:
            message = {"error": f"init ended with {os.waitstatus_to_exitcode(wait_status)}"}
        call.answer(message | {"reason": call.reason})
        self._forget(call.init_fd)
        self._forget(call.leash.fileno())
        call.leash.close()
        os.close(call.init_fd)
        os.close(call.status_fd)

    def _enforce(self, now: float) -> None:
        running = {call.namespace: call for call in self._calls.values()}
        for call in running.values():
            if now >= call.deadline:
                call.kill("wall")
        if now < self._next_watch or all(
            now - call.started < _WATCH_AFTER_S for call in running.values()
        ):
            return
        self._next_watch = now + _WATCH_EVERY_S
        for namespace, pids in _processes_by_namespace().items():
            call_or_none = running.get(namespace)
            if call_or_none and _uses_more_than(call_or_none.memory_bytes, pids):
                call_or_none.kill("memory")


def _processes_by_namespace() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                namespace = os.stat(f"/proc/{name}/ns/pid").st_ino
            except OSError:
                continue  # it has just ended, or is an init
            found.setdefault(namespace, []).append(int(name))
    return found


def _uses_more_than(limit_bytes: int, pids: list[int]) -> bool:
    """Compare the resident memory first: cheap, and never less than the proportional one."""
    if sum(map(_resident_bytes, pids)) <= limit_bytes:
        return False
    return sum(map(_proportional_bytes, pids)) > limit_bytes


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0  # it has just ended


def _proportional_bytes(pid: int) -> int:
    """Pages shared by n processes count 1/n: a fork's copy-on-write pages are not counted again."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return 0  # it has just ended
    fields = (line.split() for line in lines)
    return sum(int(field[1]) << 10 for field in fields if field[0] in (b"Pss:", b"SwapPss:"))


class World:
    """Makes one call's world, in init, and runs the code there."""

    def __init__(self) -> None:
        self._filter = seccomp.program(linux.machine())
        self._below_tmp = [path for path in root.visible_paths() if path.startswith("/tmp/")]

    def run(self, limits: dict[str, Any], fds: list[int], status_fd: int) -> NoReturn:
        """Be init: make the world, fork the payload, report how it ended."""
        code_fd, stdin_fd, output_fd = fds
        try:
            # process 1 ignores signals from inside but those it has a handler for
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.dup2(stdin_fd, 0)
            os.dup2(output_fd, 1)
            os.dup2(output_fd, 2)
            linux.close_all_but({0, 1, 2, status_fd, code_fd})
            self._mount(limits)
            self._confine(limits)
            payload = os.fork()
            if payload == 0:
                _run_payload(code_fd, status_fd)
            exit_code = _wait_for(payload)
            os.write(status_fd, json.dumps({"exit_code": exit_code}).encode())
            os._exit(0)
        except OSError as error:
            os.write(status_fd, json.dumps({"error": str(error)}).encode())
        finally:
            os._exit(_SETUP_FAILED)

    def _mount(self, limits: dict[str, Any]) -> None:
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET)
        below_tmp = {path: os.open(path, os.O_PATH) for path in self._below_tmp}
        flags = linux.MS_NOSUID | linux.MS_NODEV
        size = f"size={limits['disk_bytes']},nr_inodes={_TMP_FILES},mode=1777"
        linux.mount("tmpfs", "/tmp", "tmpfs", flags, size)
        size = f"size={_SHARED_MEMORY_BYTES},nr_inodes=64,mode=1777"
        linux.mount("tmpfs", "/dev/shm", "tmpfs", flags, size)
        for path, fd in below_tmp.items():
            root.bind(fd, path)
            os.close(fd)
        root.mount_proc()
        os.chdir("/tmp")

    def _confine(self, limits: dict[str, Any]) -> None:
        linux.write_file("/proc/self/oom_score_adj", "1000")  # before anyone outside
        # a user namespace of its own, after the mounts: they belong to the server's, and processes are counted apart
        linux.unshare(linux.CLONE_NEWUSER)
        linux.map_user(root.NOBODY, root.NOBODY, root.NOBODY)
        linux.drop_capabilities()
        cpu_s = limits["cpu_s"]
        for limit, soft, hard in (
            (resource.RLIMIT_AS, limits["process_memory_bytes"], None),
            (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
            (resource.RLIMIT_FSIZE, limits["file_bytes"], None),
            (resource.RLIMIT_NOFILE, limits["files"], None),
            (resource.RLIMIT_NPROC, limits["processes"] + 1, None),  # init is one
            (resource.RLIMIT_CORE, 0, None),
        ):
            resource.setrlimit(limit, (soft, soft if hard is None else hard))
        linux.set_dumpable(False)  # the payload may not write init's report
        linux.install_seccomp(self._filter)


def _run_payload(code_fd: int, status_fd: int) -> NoReturn:
    exit_code = 1
    try:
        os.close(status_fd)
        os.setsid()
        linux.set_dumpable(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if random := sys.modules.get("numpy.random"):
            random.seed()  # as `random` does by itself: a fork must not repeat another's numbers
        with open(code_fd, encoding="utf-8") as file:
            source = file.read()
        exit_code = run_cell(source)
    finally:
        os._exit(exit_code)


def _wait_for(payload: int) -> int:
    while True:
        pid, status = os.wait()  # orphans come here too
        if pid == payload:
            return os.waitstatus_to_exitcode(status)


def _prepare(imports: list[str]) -> None:
    sys.path.pop(0)  # the directory that holds this package
    root.enter()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    for name in imports:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise ImportError(f"importing {', '.join(imports)} started threads; forks of it would hang")
    gc.collect()
    gc.freeze()  # no collection touches, and so copies, what the forks share


def main() -> None:
    """Become the server, say so on `control`, and serve."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=settings["control_fd"])
    os.umask(0o022)
    try:
        _prepare(settings["imports"])
        server = Server(control)
    except (OSError, ImportError) as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise SystemExit(1) from None
    control.send(b"{}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
        del sys.modules[name]  # not the code's business
    server.serve()


if __name__ == "__main__":
    main()
