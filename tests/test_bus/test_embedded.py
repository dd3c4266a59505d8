"""The nats-server of our own: alone on its store, and started again for as long as it takes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from bus.connection import connect
from bus.embedded import EmbeddedServer
from bus.errors import InUse, Unreachable

ABANDON = """
import bus.embedded, os, pathlib, sys
bus.embedded.die_with_parent = lambda: None  # as where no system ends it with its parent
server = bus.embedded.EmbeddedServer(pathlib.Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
os._exit(0)
"""


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not is_so():  # noqa: ASYNC110 (of a process, which tells nobody)
            await asyncio.sleep(0.05)


async def answers(server: EmbeddedServer) -> None:
    """Until it does."""
    async with asyncio.timeout(60.0):
        while True:
            with suppress(Unreachable):
                async with connect(server.endpoint, "test") as bus:
                    await bus.request("$JS.API.INFO", b"")
                return


# -- one server on a store -------------------------------------------------------------------------


def test_a_second_server_on_a_store_is_refused(server: EmbeddedServer, tmp_path: Path) -> None:
    """Both would confirm other messages by the same sequences; when the first has stopped the store is free."""
    second = EmbeddedServer(tmp_path / "nats")
    with pytest.raises(InUse, match=r"nats: another command has a server on this store: wait"):
        second.start()
    with pytest.raises(InUse):
        second.start()
    server.stop()
    second.start()
    with pytest.raises(InUse):
        server.start()
    second.stop()


async def test_between_death_and_restart_nobody_gets_the_store(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    """Who has started it has the store, too; it starts it again as often as it likes."""
    for _ in range(2):
        server.kill()
        with pytest.raises(InUse):
            EmbeddedServer(tmp_path / "nats").start()
        server.start()
    await answers(server)


async def test_a_server_that_outlives_its_starter_keeps_its_store(tmp_path: Path) -> None:
    """Whoever resumes the run waits for its end."""
    abandon = [sys.executable, "-c", ABANDON, str(tmp_path)]
    pid = int(await asyncio.to_thread(subprocess.check_output, abandon))
    try:
        server = EmbeddedServer(tmp_path)
        with pytest.raises(InUse):
            server.start()
    finally:
        os.kill(pid, signal.SIGKILL)

    def starts() -> bool:
        with suppress(InUse):
            server.start()
            return True
        return False

    await until(starts)
    server.stop()


# -- kept alive ------------------------------------------------------------------------------------


@asynccontextmanager
async def kept(server: EmbeddedServer) -> AsyncIterator[None]:
    keeper = asyncio.create_task(server.keep())
    try:
        yield
    finally:
        assert not keeper.done()
        keeper.cancel()
        await asyncio.wait({keeper})
        server.stop()  # a thread waits for its end


async def killed(server: EmbeddedServer) -> None:
    server.kill()


def troubles(said: Sequence[MutableMapping[str, Any]], part: str = "") -> list[str]:
    """The warnings that have it, by their reasons."""
    reasons = [entry["error"] for entry in said if "not kept alive" in entry["event"]]
    return [reason for reason in reasons if part in reason]


def starts(folder: Path) -> int:
    return (folder / "nats.log").read_text().count("Starting nats-server")


async def test_one_that_ends_at_once_is_started_at_leisure(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    """Its port is taken: it is said once, with the file that says why, and when the port is free it is there."""
    await answers(server)
    host, _, port = server.logins.url.removeprefix("nats://").partition(":")
    await killed(server)
    with socket.socket() as other, capture_logs() as said:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((host, int(port)))
        other.listen()
        async with kept(server):
            before = starts(tmp_path / "nats")
            await asyncio.sleep(3.5)
            tried = starts(tmp_path / "nats") - before
            assert 1 <= tried <= 5
            other.close()
            await answers(server)
    why = f"it ends as soon as it is started: see {tmp_path / 'nats' / 'nats.log'}"
    assert set(troubles(said)) == {why}
    assert len(troubles(said)) <= max(1, tried - 1), "not each time"


async def test_what_cannot_be_started_is_tried_again(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    """Its configuration cannot be written; the former one stays whole."""
    await answers(server)
    before = (tmp_path / "nats" / "nats.conf").read_text()
    obstacle = tmp_path / "nats" / "nats.new"
    obstacle.mkdir()
    with capture_logs() as said:
        async with kept(server):
            await killed(server)
            await until(lambda: bool(troubles(said, "Is a directory")))
            await asyncio.sleep(2.5)
            assert (tmp_path / "nats" / "nats.conf").read_text() == before
            obstacle.rmdir()
            await answers(server)
    assert len(troubles(said, "Is a directory")) == 1


@pytest.fixture
def small_disk(tmp_path: Path, make_small_disk: Callable[[Path, int], Path]) -> Path:
    """A file system of 64 MB."""
    return make_small_disk(tmp_path / "small", 64)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


async def test_a_server_that_dies_on_a_full_disk_comes_back(small_disk: Path) -> None:
    """When there is room; until then its configuration is the whole one that it had."""
    server = EmbeddedServer(small_disk / "nats", unrestricted=True)
    server.start()
    await answers(server)
    config = small_disk / "nats" / "nats.conf"
    before = config.read_text()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        fill(ballast)
    with capture_logs() as said:
        async with kept(server):
            await killed(server)
            await until(lambda: bool(troubles(said, "No space")))
            assert config.read_text() == before
            ballast.unlink()
            await answers(server)
