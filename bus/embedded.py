"""A nats-server of our own, on loopback, for one run on one machine."""

import asyncio
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import structlog

from bus.connection import Endpoint
from bus.errors import BusError, InUse
from bus.logins import UNRESTRICTED, new_logins
from bus.server_config import ACCOUNT, Server, config_text

log = structlog.get_logger()

_LOOK_S = 1.0
"""How often it is looked after; one that ends sooner than that has not started well."""
_FULL_BYTES, _ROOM_BYTES = 4 << 20, 32 << 20
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """In a child, before exec: SIGKILL comes when the parent ends, however it ends. Linux only."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_given: set[int] = set()


def free_port() -> int:
    """A TCP port on loopback that was free just now, never the same twice."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def _limit_bytes(folder: Path) -> int:
    """What it holds and three quarters of the free disk.

    A server that is told nothing takes the latter alone, so that one with much in its store might be full at once.
    """
    held_bytes = sum(block.stat().st_size for block in folder.rglob("*.blk"))
    return held_bytes + shutil.disk_usage(folder).free * 3 // 4


class EmbeddedServer:
    """A child process that dies with us; its store stays. Whoever starts it has all of its logins.

    It has its store alone: the file `lock` is locked for as long as the server or who has started it lives, since the
    server inherits it. Two servers on one store would confirm different messages by the same sequence.
    """

    def __init__(
        self, folder: Path, *, unrestricted: bool = False, analytics_sees_answers: bool = False
    ) -> None:
        """`unrestricted`: with `endpoint`, a login that may do everything, for tests and benchmarks."""
        binary = shutil.which(
            "nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        if binary is None:
            raise BusError("nats-server is not installed: `make setup` installs it")
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        """The descriptor of the locked file."""
        self._started_s = 0.0
        self._trouble = ""
        """Why it is not kept alive, as it was said."""
        self.logins = new_logins(f"nats://127.0.0.1:{free_port()}", unrestricted=unrestricted)
        self._analytics_sees_answers = analytics_sees_answers

    @property
    def endpoint(self) -> Endpoint:
        """The login that may do everything. Raises BadLogin when there is none."""
        return self.logins.of(UNRESTRICTED)

    @property
    def pid(self) -> int:
        """Of the running server. Raises BusError when it is not started."""
        if self._process is None:
            raise BusError("the embedded nats-server is not started")
        return self._process.pid

    def start(self) -> None:
        """Start it, on the same port and store each time; it accepts connections within 0.1 s or so.

        Raises InUse when another has a server on its store, and OSError when the system has no room for it.
        """
        self._started_s = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock_store()
        accounts = self._folder / "jetstream"
        if (accounts / "$G").is_dir() and not (accounts / ACCOUNT).exists():
            (accounts / "$G").rename(accounts / ACCOUNT)  # a store from before roles had logins
        config = self._folder / "nats.conf"
        server = Server(
            name=f"embedded-{os.getpid()}",
            listen=self.logins.url.removeprefix("nats://"),
            store=str(self._folder.absolute()),
            logins=self.logins,
            limit_bytes=_limit_bytes(self._folder),
            analytics_sees_answers=self._analytics_sees_answers,
        )
        new = config.with_suffix(".new")  # a full disk leaves the old one whole
        new.write_text(config_text(server))
        new.rename(config)
        with (self._folder / "nats.log").open("ab") as output:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(config)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
                start_new_session=True,
                pass_fds=[lock],
            )

    def _lock_store(self) -> int:
        """Lock it, if it is not ours already; returns what the server is to inherit. Raises InUse."""
        if self._lock is None:
            lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise InUse(self._folder) from None
            self._lock = lock
        return self._lock

    async def wait(self) -> None:
        """Until it ends."""
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    async def keep(self) -> None:
        """Start it again whenever it dies, and when its disk has room again: one that was full it writes to no more."""
        full = False
        ended = asyncio.create_task(self.wait(), name="wait for nats-server")
        while True:
            await asyncio.wait({ended}, timeout=_LOOK_S)
            try:
                if ended.done():
                    await self._start_again()
                else:
                    self._trouble = ""
                    full = self._look_for_room(full=full)
            except OSError as error:  # of the disk, or no room for a process: the next try may do
                await self._pause(str(error))
            if ended.done():
                ended = asyncio.create_task(self.wait(), name="wait for nats-server")

    async def _start_again(self) -> None:
        """Start it once it has ended; one that ended at once, not without a pause. Raises OSError."""
        if time.monotonic() - self._started_s < _LOOK_S:
            await self._pause(f"it ends as soon as it is started: see {self._folder}/nats.log")
        self.start()

    async def _pause(self, why: str) -> None:
        """Say why, once, and wait before the next try."""
        if why != self._trouble:
            self._trouble = why
            log.warning("nats-server is not kept alive; trying again", error=why)
        await asyncio.sleep(_LOOK_S)

    def _look_for_room(self, *, full: bool) -> bool:
        """Whether its disk is full now, by what it was; kills it when there is room again. Raises OSError."""
        free_bytes = shutil.disk_usage(self._folder).free
        if not full and free_bytes < _FULL_BYTES:
            log.warning("the log's disk is full; all waits for room", folder=str(self._folder))
            return True
        if full and free_bytes > _ROOM_BYTES:
            log.info("the log's disk has room again", folder=str(self._folder))
            os.kill(self.pid, signal.SIGKILL)
            return False
        return full

    def kill(self) -> None:
        """End it as a crash would; its store stays locked for the next start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it, wait, and leave its store to others."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
