"""Replicas as forks of a process that has the imports."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from actors.nursery import Nursery, Order
from bus.connection import Endpoint

NOBODY = Endpoint(url="nats://127.0.0.1:1")
"""A replica looks for it for five seconds."""
NOWHERE = Endpoint(url="nats://127.0.0.1:none")
"""A replica ends at once."""


@pytest.fixture
async def nursery(tmp_path: Path) -> AsyncIterator[Nursery]:
    made = Nursery(tmp_path / "nursery.log")
    yield made
    await made.close()


def order(folder: Path, *imports: str, endpoint: Endpoint = NOWHERE) -> Order:
    log = str(folder / "scorer.log")
    return Order(role="scorer", run="r", endpoint=endpoint, log=log, imports=list(imports))


async def test_a_replica_ends_with_its_own_status_and_log(nursery: Nursery, tmp_path: Path) -> None:
    """With no server it ends with the status for a lost link, and says why."""
    child = await nursery.start(order(tmp_path))
    assert await child.wait() == 75
    assert "no NATS server" in (tmp_path / "scorer.log").read_text()


async def test_imports_are_made_once(nursery: Nursery, tmp_path: Path) -> None:
    """What one order imported is in memory for the next; a module that is not there stops nobody."""
    first = await nursery.start(order(tmp_path, "wave", "there_is_no_such_module"))
    await first.wait()
    second = await nursery.start(order(tmp_path, "wave"))
    assert await second.wait() == 75


async def test_a_killed_nursery_ends_its_replicas_and_is_replaced(
    nursery: Nursery, tmp_path: Path
) -> None:
    child = await nursery.start(order(tmp_path, endpoint=NOBODY))
    process = psutil.Process(child.pid)
    parent = process.parent()
    assert parent is not None
    while process.cmdline()[0].split() != ["actors", "scorer", "r"]:  # noqa: ASYNC110 (it sends none)
        await asyncio.sleep(0.001)
    os.kill(child.pid, signal.SIGSTOP)  # so that it is still there
    os.kill(parent.pid, signal.SIGKILL)
    assert await asyncio.wait_for(child.wait(), 10) == -signal.SIGKILL
    assert await asyncio.wait_for((await nursery.start(order(tmp_path))).wait(), 30) == 75


async def test_a_nursery_that_hangs_is_killed_and_replaced(
    nursery: Nursery, tmp_path: Path
) -> None:
    """An order that it does not carry out in time ends it; the next one starts another."""
    child = await nursery.start(order(tmp_path, endpoint=NOBODY))
    parent = psutil.Process(child.pid).parent()
    assert parent is not None
    child.send_signal(signal.SIGKILL)
    await child.wait()
    parent.suspend()
    nursery.patience_s = 1.0
    with pytest.raises(ConnectionResetError):
        await nursery.start(order(tmp_path))
    assert not parent.is_running()
    nursery.patience_s = 60.0
    assert await (await nursery.start(order(tmp_path))).wait() == 75


async def test_a_nursery_that_hangs_can_be_closed(nursery: Nursery, tmp_path: Path) -> None:
    """It does not keep whoever leaves."""
    child = await nursery.start(order(tmp_path, endpoint=NOBODY))
    parent = psutil.Process(child.pid).parent()
    assert parent is not None
    child.send_signal(signal.SIGKILL)
    await child.wait()
    parent.suspend()
    await nursery.close()
    assert not parent.is_running()


async def test_what_a_killed_replica_leaves_is_cleared_up(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporary files are in a folder of its own."""
    scratch = tmp_path / "scratch"
    os.mkdir(scratch)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    child = await nursery.start(order(tmp_path, endpoint=NOBODY))
    (folder,) = os.listdir(scratch)
    (scratch / folder / "file").write_text("left")
    child.send_signal(signal.SIGKILL)
    await child.wait()
    assert not os.listdir(scratch)


async def test_a_signal_is_its_status(nursery: Nursery, tmp_path: Path) -> None:
    child = await nursery.start(order(tmp_path, endpoint=NOBODY))
    child.send_signal(signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
    child.send_signal(signal.SIGKILL)  # of one that has ended nothing comes
