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

NOWHERE = Endpoint(url="nats://127.0.0.1:1")


@pytest.fixture
async def nursery(tmp_path: Path) -> AsyncIterator[Nursery]:
    made = Nursery(NOWHERE, tmp_path / "nursery.log")
    yield made
    await made.close()


def order(folder: Path, *imports: str) -> Order:
    return Order(role="scorer", run="r", log=str(folder / "scorer.log"), imports=list(imports))


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
    child = await nursery.start(order(tmp_path))
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
    child = await nursery.start(order(tmp_path))
    parent = psutil.Process(child.pid).parent()
    assert parent is not None
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
    child = await nursery.start(order(tmp_path))
    parent = psutil.Process(child.pid).parent()
    assert parent is not None
    await child.wait()
    parent.suspend()
    await nursery.close()
    assert not parent.is_running()


async def test_a_signal_is_its_status(nursery: Nursery, tmp_path: Path) -> None:
    child = await nursery.start(order(tmp_path))
    child.send_signal(signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
    child.send_signal(signal.SIGKILL)  # of one that has ended nothing comes
