"""Forks replicas from a process that has imported what they need: a restart takes milliseconds, not torch's seconds.

One for each supervisor. It has one thread, no event loop and no connection, so what it forks is clean; it dies with
its supervisor, and its replicas die with it. It speaks JSON lines over a socket pair: orders in, what happened out.
"""

import asyncio
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
from msgspec.structs import replace
from setproctitle import setproctitle

from actors.ranks import Group, lead
from actors.replica import serve
from bus.connection import Endpoint
from bus.embedded import die_with_parent
from schemas.messages import RoleName

log = structlog.get_logger()

_END_S = 5.0


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Start a replica."""

    role: RoleName
    run: str
    endpoint: Endpoint
    """The role's own login."""
    log: str
    """The file for its output."""
    imports: list[str]
    """Modules that stay imported for all that come later."""
    group: Group | None = None
    """For a learner of several processes."""
    scratch: str = ""
    """Its folder for temporary files, which goes when it ends, however it ends. Set by `Nursery.start`."""


class Born(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An order was carried out."""

    pid: int


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica has ended."""

    pid: int
    status: int
    """Its exit status; negative: the signal that killed it."""


# -- in the supervisor -----------------------------------------------------------------------------


class Child:
    """A replica that was started."""

    def __init__(self, pid: int, order: Order) -> None:
        self.pid = pid
        self.role = order.role
        self._scratch = order.scratch
        self.born_s = time.monotonic()
        self.hung = ""
        """Why its supervisor killed it."""
        self.killed_s = 0.0
        """When it did."""
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        """Until it has ended: its exit status, negative for the signal that killed it."""
        return await asyncio.shield(self._status)

    def ended(self, status: int) -> None:
        """Tell all who wait, and clear up."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        if not self._status.done():
            self._status.set_result(status)

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing when it has ended."""
        if not self._status.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Nursery:
    """Starts replicas. Starts the process that forks them when it is first needed, and again when that was killed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.patience_s = 120.0
        """How long it may take to carry out an order; the first one that needs torch waits for its import."""
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1",  # torch's own setting wins where a recipe gives more
            "TOKENIZERS_PARALLELISM": "false",
            "SPT_NOENV": "1",  # setproctitle leaves the environment readable
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # importing must not initialise CUDA before a fork
        }
        self._opening = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ordered: asyncio.Queue[tuple[Order, asyncio.Future[Child]]] = asyncio.Queue()
        self._children: dict[int, Child] = {}

    async def start(self, order: Order) -> Child:
        """A new replica. Raises ConnectionResetError when the nursery dies meanwhile."""
        born: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        order = replace(order, scratch=tempfile.mkdtemp(prefix="actors-"))
        os.chmod(order.scratch, 0o711)  # who is made nobody in a sandbox finds his own folder in it
        async with self._opening:
            writer = self._writer = self._writer or await self._open()
            self._ordered.put_nowait((order, born))
            writer.write(msgspec.json.encode(order) + b"\n")
        await asyncio.wait({born}, timeout=self.patience_s)
        if not born.done():
            self.kill()
        return await born

    def kill(self) -> None:
        """End a nursery that hangs, and all its replicas with it; the next order starts another."""
        if self._process is not None and self._process.returncode is None:
            log.warning("nursery hangs; killing it", pid=self._process.pid)
            self._process.kill()

    async def _open(self) -> asyncio.StreamWriter:
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as output:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "actors.nursery",
                str(theirs.fileno()),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the supervisor's to handle
                preexec_fn=die_with_parent,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        self._listening = asyncio.create_task(self._listen(reader, process), name="nursery")
        return writer

    async def _listen(
        self, reader: asyncio.StreamReader, process: asyncio.subprocess.Process
    ) -> None:
        """Take what happened to whom, until the nursery ends; its replicas have ended with it."""
        with suppress(ConnectionResetError):  # it was killed with an order unread
            while line := await reader.readline():
                self._hear(msgspec.json.decode(line, type=Born | Gone))
        await process.wait()
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        while not self._ordered.empty():
            order, born = self._ordered.get_nowait()
            shutil.rmtree(order.scratch, ignore_errors=True)
            born.set_exception(ConnectionResetError("the nursery died"))
        for child in self._children.values():
            child.ended(-signal.SIGKILL)
        self._children.clear()

    def _hear(self, news: Born | Gone) -> None:
        if isinstance(news, Born):
            order, born = self._ordered.get_nowait()
            child = self._children[news.pid] = Child(news.pid, order)
            born.set_result(child)
        else:
            self._children.pop(news.pid).ended(news.status)

    async def close(self) -> None:
        """End the nursery, and with it whatever it forked."""
        if self._writer is not None and self._listening is not None:
            self._writer.close()
            await asyncio.wait({self._listening}, timeout=_END_S)
            self.kill()
            await self._listening


# -- in the nursery --------------------------------------------------------------------------------


def main() -> None:
    """The entry point of the nursery."""
    link = socket.socket(fileno=int(sys.argv[1]))
    wakeup, alarm = socket.socketpair()
    for end in (wakeup, alarm):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
    setproctitle("actors nursery")
    for order in _orders(link, wakeup):
        for module in order.imports:
            with suppress(ImportError):  # the replica meets it again, and says so in its own log
                importlib.import_module(module)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for inherited in (link, wakeup, alarm):
                inherited.close()
            _become(order)
        _tell(link, Born(pid=pid))


def _orders(link: socket.socket, wakeup: socket.socket) -> Iterator[Order]:
    """Orders as they come, until the supervisor closes its end; tells of the dead meanwhile."""
    from selectors import EVENT_READ, DefaultSelector

    selector = DefaultSelector()
    selector.register(link, EVENT_READ)
    selector.register(wakeup, EVENT_READ)
    unread = b""
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if wakeup in ready:
            with suppress(BlockingIOError):
                wakeup.recv(4096)
            _reap(link)
        if link in ready:
            data = link.recv(1 << 16)
            if not data:
                return
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                yield msgspec.json.decode(line, type=Order)


def _reap(link: socket.socket) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _tell(link, Gone(pid=pid, status=os.waitstatus_to_exitcode(status)))


def _tell(link: socket.socket, news: Born | Gone) -> None:
    link.sendall(msgspec.json.encode(news) + b"\n")


def _become(order: Order) -> None:
    """Turn a forked process into the replica; does not return."""
    nursery = os.getppid()
    die_with_parent()
    if os.getppid() != nursery:
        os._exit(1)  # it died between the fork and the line before
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    setproctitle(f"actors {order.role} {order.run}")
    os.environ["TMPDIR"] = tempfile.tempdir = order.scratch
    with Path(order.log).open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if order.group is not None:
        lead(order.run, order.endpoint, order.group)
    serve(order.role, order.run, order.endpoint)


if __name__ == "__main__":
    main()
