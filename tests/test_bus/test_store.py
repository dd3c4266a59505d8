"""Buckets, objects, policies and leases against a real server."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from bus import blobs, policy, private, store
from bus.connection import Bus, Endpoint, connect
from bus.embedded import EmbeddedServer, free_port
from bus.errors import Conflict, Corrupt, Missing, Unreachable
from bus.lease import Lease
from schemas.messages import WeightsPointer

LARGE_BYTES = 96 << 20
WRITER = f"""
import asyncio, os, msgspec
from bus import store
from bus.connection import Endpoint, connect

async def main():
    endpoint = msgspec.json.decode(os.environ["ENDPOINT"], type=Endpoint)
    async with connect(endpoint, "writer") as bus:
        send = store._send

        async def slowly(bus, subject, chunks):  # or it might be over before anybody looks
            for first in range(0, len(chunks), 8):
                await send(bus, subject, chunks[first : first + 8])
                await asyncio.sleep(0.02)

        store._send = slowly
        await store.put_object(bus, "weights", "test", bytes({LARGE_BYTES}))

asyncio.run(main())
"""


def start_writer(server: EmbeddedServer) -> subprocess.Popen[bytes]:
    """A process that uploads a large object."""
    endpoint = msgspec.json.encode(server.endpoint).decode()
    return subprocess.Popen(
        [sys.executable, "-c", WRITER],
        env=os.environ | {"ENDPOINT": endpoint},
        cwd=Path(__file__).parents[2],
    )


async def chunks(bus: Bus, bucket: str = "weights") -> dict[str, int]:
    """Subject → chunks, of all that a bucket holds, named or not."""
    query = json.dumps({"subjects_filter": f"$O.{bucket}.C.*"}).encode()
    answer = await bus.request(f"$JS.API.STREAM.INFO.OBJ_{bucket}", query)
    return json.loads(answer.data)["state"].get("subjects") or {}


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await is_so():  # noqa: ASYNC110 - what is waited for is at the server
            await asyncio.sleep(0.002)


async def until_only(counts: list[int], bus: Bus) -> None:
    """What was cleared has a message in its place, for a second or so."""

    async def is_so() -> bool:
        return list((await chunks(bus)).values()) == counts

    await until(is_so)


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
    name = await store.put_object(bus, "weights", "test", data)
    before = await chunks(bus)
    assert await store.put_object(bus, "weights", "test", data) == name
    assert await chunks(bus) == before
    assert await store.get_object(bus, "weights", "test", name) == data


async def test_a_missing_object_is_missing(bus: Bus) -> None:
    with pytest.raises(Missing):
        await store.get_object(bus, "weights", "test", "0" * 64)


async def test_an_object_with_other_bytes_is_refused(bus: Bus) -> None:
    """The name is the hash: a chunk that was changed or lost is never taken for the whole.

    Putting it again mends it.
    """
    data = os.urandom(1 << 20)
    name = await store.put_object(bus, "weights", "test", data)
    await store.purge(bus, "OBJ_weights", "$O.weights.C.>")
    with pytest.raises(Corrupt):
        await store.get_object(bus, "weights", "test", name)
    await store.put_object(bus, "weights", "test", data)
    assert await store.get_object(bus, "weights", "test", name) == data


async def test_a_follower_hears_of_each_new_policy(bus: Bus) -> None:
    """Version 0 first, then what comes; any version can be asked for later."""
    assets = await policy.publish_assets(bus, "test", {"config.json": b"{}"})
    pointers = [
        WeightsPointer(policy_version=v, weights_sha256="", assets_sha256=assets) for v in (0, 1)
    ]
    following = policy.follow(bus, "test")
    for pointer in pointers:
        data = os.urandom(10)
        name = await store.put_object(bus, "weights", "test", data)
        pointer = WeightsPointer(
            policy_version=pointer.policy_version, weights_sha256=name, assets_sha256=assets
        )
        await policy.publish_policy(bus, "test", pointer, data)
        found = await asyncio.wait_for(anext(following), 30.0)
        assert found == pointer
        assert await policy.load_weights(bus, "test", found) == data
    assert (await policy.load_assets(bus, "test", pointers[0])).files == {"config.json": b"{}"}
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
    await asyncio.wait_for(standby.acquire(), 30.0)
    third = Lease(bus, "test", "dispatcher", "three")
    await asyncio.wait_for(third.acquire(), 30.0)


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


# -- what is deleted, and what is not --------------------------------------------------------------


async def is_silent(bus: Bus) -> bool:
    """Nothing is on its way any more of what a writer sent."""
    before = await chunks(bus)
    await asyncio.sleep(0.2)
    return await chunks(bus) == before


async def test_what_a_killed_writer_left_is_deleted(server: EmbeddedServer, bus: Bus) -> None:
    """SIGKILL in the middle of an upload: its chunks go when they have not grown for long enough, and not before.

    An object that has its name stays.
    """
    name = await store.put_object(bus, "weights", "test", b"whole")
    writer = start_writer(server)

    async def is_half_done() -> bool:
        return sum((await chunks(bus)).values()) > 4

    await until(is_half_done)
    writer.send_signal(signal.SIGSTOP)
    assert await store.delete_orphans(bus, "weights", older_s=60.0) == 0
    writer.kill()
    writer.wait()
    await until(lambda: is_silent(bus))
    left = await chunks(bus)
    assert len(left) == 2, "the whole one and the half one"
    assert await store.delete_orphans(bus, "weights", older_s=60.0) == 0
    assert await store.delete_orphans(bus, "weights", older_s=0.0) == sum(left.values()) - 1
    await until_only([1], bus)
    assert await store.get_object(bus, "weights", "test", name) == b"whole"


async def test_a_writer_that_was_taken_for_dead_begins_again(
    server: EmbeddedServer, bus: Bus
) -> None:
    """Stopped for so long that its chunks were deleted, it still leaves a whole object, or none."""
    writer = start_writer(server)

    async def is_half_done() -> bool:
        return sum((await chunks(bus)).values()) > 4

    await until(is_half_done)
    writer.send_signal(signal.SIGSTOP)
    await until(lambda: is_silent(bus))
    assert await store.delete_orphans(bus, "weights", older_s=0.0) > 0
    writer.send_signal(signal.SIGCONT)
    assert await asyncio.to_thread(writer.wait, 60) == 0
    data = bytes(LARGE_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    assert await store.get_object(bus, "weights", "test", sha256) == data
    await store.delete_orphans(bus, "weights", older_s=0.0)
    await until_only([LARGE_BYTES >> 19], bus)


async def test_what_a_second_writer_replaced_is_an_orphan(bus: Bus) -> None:
    """Two that put the same bytes at once leave one object; the other's chunks can go."""
    data = os.urandom(1 << 20)
    names = await asyncio.gather(*(store.put_object(bus, "blobs", "test", data) for _ in range(2)))
    assert len(set(names)) == 1
    assert len(await chunks(bus, "blobs")) == 2
    assert await store.delete_orphans(bus, "blobs", older_s=0.0) == 2
    assert await blobs.get_blob(bus, "test", names[0]) == data


async def publish(bus: Bus, version: int, weights: bytes, run: str = "test") -> WeightsPointer:
    pointer = WeightsPointer(
        policy_version=version,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        assets_sha256=await policy.publish_assets(bus, run, {"config.json": b"{}"}),
    )
    await policy.publish_policy(bus, run, pointer, weights)
    return pointer


async def test_old_versions_go_and_what_others_name_stays(bus: Bus) -> None:
    """Weights that a kept version shares, the assets, and another run's equal weights are not deleted."""
    pointers = [await publish(bus, v, b"even" if v % 2 == 0 else b"odd %d" % v) for v in range(6)]
    other = await publish(bus, 1, b"odd 1", run="other")
    assert sorted(await policy.delete_versions(bus, "test", {0, 4, 5})) == [1, 2, 3]
    for version in (0, 4, 5):
        found = await policy.version(bus, "test", version)
        assert found == pointers[version]
        await policy.load_weights(bus, "test", found)
        await policy.load_assets(bus, "test", found)
    for version in (1, 2, 3):
        assert await policy.version(bus, "test", version) is None
    for version in (1, 3):
        with pytest.raises(Missing):
            await policy.load_weights(bus, "test", pointers[version])
    assert await policy.load_weights(bus, "other", other) == b"odd 1"
    assert await policy.current(bus, "test") == pointers[5]
    assert await store.delete_orphans(bus, "weights", older_s=0.0) == 0


async def test_who_is_behind_deletes_no_version(bus: Bus) -> None:
    """Of what its answers do not know nothing would be named: neither pointers nor weights go."""
    for version in range(4):
        await publish(bus, version, b"%d" % version)
    assert await policy.delete_versions(bus, "test", {0, 5}) == []
    assert await policy.delete_versions(bus, "test", {0, 4}) == [1, 2, 3]


async def test_who_is_behind_deletes_no_chunks(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an object whose name it does not see, though who leads has it."""
    name = await store.put_object(bus, "weights", "test", b"whole")

    async def none(_bus: Bus, _bucket: str) -> list[store.Object]:
        return []

    with monkeypatch.context() as patch:
        patch.setattr(store, "objects", none)
        assert await store.delete_orphans(bus, "weights", older_s=0.0) == 0
    assert await store.get_object(bus, "weights", "test", name) == b"whole"


async def test_a_reader_that_comes_too_late_gets_the_newest(bus: Bus) -> None:
    """Between the pointer and the weights the version may go: the next one is there by then."""
    old = await publish(bus, 1, b"old")
    new = await publish(bus, 2, b"new")
    await policy.delete_versions(bus, "test", {2})
    assert await policy.load_newest(bus, "test", old) == (new, b"new")
    for found in await store.objects(bus, "weights", "test"):
        await store.delete_object(bus, "weights", found)
    with pytest.raises(Missing):
        await policy.load_newest(bus, "test", old)


async def test_a_reader_of_what_is_deleted_meanwhile_misses_it(bus: Bus) -> None:
    """However far it has come: never other bytes, never half of them."""
    data = os.urandom(20 << 20)
    for attempt in range(5):
        name = await store.put_object(bus, "weights", "test", data)
        (found,) = await store.objects(bus, "weights", "test")
        reading = asyncio.create_task(store.get_object(bus, "weights", "test", name))
        await asyncio.sleep(0.01 * attempt)
        await store.delete_object(bus, "weights", found)
        with suppress(Missing):
            assert await reading == data
