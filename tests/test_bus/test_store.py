"""Buckets, objects, policies and leases against a real server."""

import asyncio
import os

import pytest

from bus import policy, private, store
from bus.connection import Bus, Endpoint, connect
from bus.embedded import EmbeddedServer, free_port
from bus.errors import Conflict, Corrupt, Missing, Unreachable
from bus.lease import Lease
from schemas.messages import WeightsPointer


async def test_a_key_moves_only_from_the_revision_expected(bus: Bus) -> None:
    """Compare and set; 0 means that it must not exist."""
    first = await store.put(bus, "policy", "k", b"1", expected_seq=0)
    with pytest.raises(Conflict):
        await store.put(bus, "policy", "k", b"2", expected_seq=0)
    await store.put(bus, "policy", "k", b"2", expected_seq=first)
    value = await store.get(bus, "policy", "k")
    assert value is not None
    assert value.data == b"2"
    assert await store.get(bus, "policy", "other") is None


@pytest.mark.parametrize("size", [0, 1, 512 << 10, (3 << 20) + 5])
async def test_an_object_comes_back_byte_for_byte(bus: Bus, size: int) -> None:
    """Whatever the number of chunks; put twice it is stored once."""
    data = os.urandom(size)
    name = await store.put_object(bus, "weights", data)
    assert await store.put_object(bus, "weights", data) == name
    assert await store.get_object(bus, "weights", name) == data


async def test_a_missing_object_is_missing(bus: Bus) -> None:
    with pytest.raises(Missing):
        await store.get_object(bus, "weights", "0" * 64)


async def test_an_object_with_other_bytes_is_refused(bus: Bus) -> None:
    """The name is the hash: a chunk that was changed or lost is never taken for the whole."""
    name = await store.put_object(bus, "weights", os.urandom(1 << 20))
    await bus.client.jetstream().purge_stream("OBJ_weights", subject="$O.weights.C.>")
    with pytest.raises(Corrupt):
        await store.get_object(bus, "weights", name)


async def test_a_follower_hears_of_each_new_policy(bus: Bus) -> None:
    """Version 0 first, then what comes; any version can be asked for later."""
    assets = await policy.publish_assets(bus, {"config.json": b"{}"})
    pointers = [
        WeightsPointer(policy_version=v, weights_sha256="", assets_sha256=assets) for v in (0, 1)
    ]
    following = policy.follow(bus, "test")
    for pointer in pointers:
        data = os.urandom(10)
        name = await store.put_object(bus, "weights", data)
        pointer = WeightsPointer(
            policy_version=pointer.policy_version, weights_sha256=name, assets_sha256=assets
        )
        await policy.publish_policy(bus, "test", pointer, data)
        found = await asyncio.wait_for(anext(following), 5.0)
        assert found == pointer
        assert await policy.load_weights(bus, found) == data
    assert (await policy.load_assets(bus, pointers[0])).files == {"config.json": b"{}"}
    old = await policy.version(bus, "test", 0)
    assert old is not None
    assert old.policy_version == 0


async def test_answers_are_kept_apart(bus: Bus) -> None:
    await private.put_private(bus, "test", "g0", {"answer": 42})
    assert await private.get_private(bus, "test", "g0") == {"answer": 42}
    with pytest.raises(Missing):
        await private.get_private(bus, "test", "g1")


async def test_a_lease_passes_on_when_it_is_not_renewed(bus: Bus) -> None:
    """One holder at a time; a standby gets in after the holder falls silent, or at once after a release."""
    holder, standby = (Lease(bus, "test", "dispatcher", name) for name in ("one", "two"))
    await holder.acquire()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(standby.acquire(), 1.5)
    await holder.release()
    await asyncio.wait_for(standby.acquire(), 4.0)
    third = Lease(bus, "test", "dispatcher", "three")
    await asyncio.wait_for(third.acquire(), 10.0)


async def test_no_server_is_one_clear_error() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match=url):
        async with connect(Endpoint(url=url), "test"):
            pass


async def test_wrong_credentials_are_one_clear_error(server: EmbeddedServer) -> None:
    """The reason is the server's, not a time-out."""
    endpoint = Endpoint(url=server.endpoint.url, user="actors", password="wrong")
    with pytest.raises(Unreachable, match=r"(?i)authorization"):
        async with connect(endpoint, "test"):
            pass
