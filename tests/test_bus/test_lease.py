"""Leases against a real server: what frees one, and what does not."""

import asyncio
import json

import pytest

from bus import store
from bus.connection import Bus
from bus.errors import Unavailable
from bus.lease import Lease

KEY = "test.dispatcher"


def lease(bus: Bus, replica: str) -> Lease:
    return Lease(bus, "test", "dispatcher", replica)


async def let_read(bus: Bus, *, allowed: bool) -> None:
    """Whether the server answers for keys of leases."""
    info = json.loads((await bus.request("$JS.API.STREAM.INFO.KV_lease", b"")).data)
    config = info["config"] | {"allow_direct": allowed}
    answer = await bus.request("$JS.API.STREAM.UPDATE.KV_lease", json.dumps(config).encode())
    assert "error" not in json.loads(answer.data), answer.data


async def moved(bus: Bus, seq: int) -> int:
    """The key's revision, once it is no more that one."""
    async with asyncio.timeout(30.0):
        while True:
            held = await store.get(bus, "lease", KEY)
            if held is not None and held.seq != seq:
                return held.seq
            await asyncio.sleep(0.05)


async def test_a_holder_outlasts_a_server_that_does_not_answer(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its renewal was stored and not confirmed, and who holds the lease cannot be read now: it looks again."""
    monkeypatch.setattr("bus.connection._ELECTION_S", 0.5)
    holder = lease(bus, "one")
    await holder.acquire()
    keeping = asyncio.create_task(holder.keep())
    await let_read(bus, allowed=False)
    with pytest.raises(Unavailable):
        await store.get(bus, "lease", KEY)
    seq = await store.put(bus, "lease", KEY, b"one")
    done, _ = await asyncio.wait({keeping}, timeout=3.0)
    assert not done
    await let_read(bus, allowed=True)
    await moved(bus, seq)  # it is renewed
    await store.put(bus, "lease", KEY, b"two")
    await asyncio.wait_for(keeping, 30.0)


async def test_a_lease_that_was_released_is_free_at_once(bus: Bus) -> None:
    """Before its last sign has expired, too."""
    await store.put(bus, "lease", KEY, b"")
    await asyncio.wait_for(lease(bus, "one").acquire(), 30.0)
    held = await store.get(bus, "lease", KEY)
    assert held is not None
    assert held.data == b"one"
