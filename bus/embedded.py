"""A nats-server of our own, on loopback, for one run on one machine."""

import asyncio
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import structlog

from bus.connection import Endpoint
from bus.errors import BusError

log = structlog.get_logger()

_CONFIG = """\
listen: "127.0.0.1:{port}"
server_name: "{name}"
max_payload: 8MB
jetstream {{ store_dir: "{store}", sync_interval: "5s" }}
authorization {{ users: [ {{ user: "{user}", password: "{password}" }} ] }}
"""
_LOOK_S = 1.0
_FULL_BYTES, _ROOM_BYTES = 4 << 20, 32 << 20
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """In a child, before exec: SIGKILL comes when the parent ends, however it ends. Linux only."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port on loopback that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedServer:
    """A child process that dies with us; its store stays."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which(
            "nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        if binary is None:
            raise BusError("nats-server is not installed: `make setup` installs it")
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = Endpoint(
            url=f"nats://127.0.0.1:{free_port()}", user="actors", password=secrets.token_urlsafe(24)
        )

    @property
    def pid(self) -> int:
        """Of the running server. Raises BusError when it is not started."""
        if self._process is None:
            raise BusError("the embedded nats-server is not started")
        return self._process.pid

    def start(self) -> None:
        """Start it, on the same port and store each time; it accepts connections within 0.1 s or so."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "nats.conf"
        config.touch(mode=0o600)
        config.write_text(
            _CONFIG.format(
                port=self.endpoint.url.rsplit(":", 1)[1],
                name=f"embedded-{os.getpid()}",
                store=self._folder.absolute(),
                user=self.endpoint.user,
                password=self.endpoint.password,
            )
        )
        with (self._folder / "nats.log").open("ab") as output:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(config)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )

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
            free_bytes = shutil.disk_usage(self._folder).free
            if ended.done():
                self.start()
                ended = asyncio.create_task(self.wait(), name="wait for nats-server")
            elif not full and free_bytes < _FULL_BYTES:
                full = True
                log.warning("the log's disk is full; all waits for room", folder=str(self._folder))
            elif full and free_bytes > _ROOM_BYTES:
                full = False
                log.info("the log's disk has room again", folder=str(self._folder))
                os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it and wait."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
