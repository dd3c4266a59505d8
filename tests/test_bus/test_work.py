"""Work queues against a real server: one taker each, redelivery, draining, the size limit."""

import asyncio
import json

import pytest

from bus import subjects
from bus.codec import decode
from bus.connection import Bus
from bus.embedded import EmbeddedServer
from bus.errors import BadMessage
from bus.provision import delete_consumers, provision
from bus.work import (
    STATE_LIMIT_BYTES,
    Queue,
    backlog,
    open_queue,
    publish_work,
    work_message,
)
from schemas.events import Admitted, Turn
from schemas.messages import Work
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory


def fresh(member: int = 0, seq: int = 1) -> Trajectory:
    event = Admitted(
        trajectory=f"g0-{member}-0", task="t", public=PublicPart(messages=[]), private_key=""
    )
    return Trajectory(admitted=event, seq=seq)


async def test_each_message_goes_to_one_replica(bus: Bus) -> None:
    """Two replicas of a stage share its queue, and both get some of it."""
    for member in range(200):
        await publish_work(bus, "test", fresh(member))
    got: dict[int, list[str]] = {0: [], 1: []}

    async with (
        open_queue(bus, "gen", "test", slots=8) as one,
        open_queue(bus, "gen", "test", slots=8) as two,
    ):

        async def take(index: int) -> None:
            queue = (one, two)[index]
            while sum(map(len, got.values())) < 200:
                delivery = await queue.take()
                got[index].append(delivery.work().trajectory)
                await delivery.done()

        takers = [asyncio.create_task(take(index)) for index in (0, 1)]
        await asyncio.wait(takers, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        for taker in takers:
            taker.cancel()
    assert sorted(got[0] + got[1]) == sorted(f"g0-{member}-0" for member in range(200))
    assert got[0]
    assert got[1]


async def test_a_queue_takes_no_more_than_its_slots(bus: Bus) -> None:
    """What a replica has no room for stays for the others."""
    for member in range(10):
        await publish_work(bus, "test", fresh(member))
    async with open_queue(bus, "gen", "test", slots=3) as queue:
        held = [await queue.take() for _ in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.5)
        await held[0].done()
        await asyncio.wait_for(queue.take(), 30.0)
        assert len(queue.held) == 3


async def test_what_a_replica_holds_when_it_leaves_comes_again(bus: Bus) -> None:
    """Leaving hands back at once, marked as delivered before."""
    await publish_work(bus, "test", fresh())
    async with open_queue(bus, "gen", "test", slots=1) as queue:
        assert not (await queue.take()).redelivered
    async with open_queue(bus, "gen", "test", slots=1) as queue:
        delivery = await asyncio.wait_for(queue.take(), 30.0)
        assert delivery.redelivered
        await delivery.done()


async def test_an_echo_is_damped_and_a_sweep_is_not(bus: Bus) -> None:
    """Two replicas that publish the same hop leave one message; the sweep's comes all the same."""
    for _ in range(3):
        await publish_work(bus, "test", fresh())
    await publish_work(bus, "test", fresh(), again=True)
    async with open_queue(bus, "gen", "test", slots=8) as queue:
        for _ in range(2):
            await (await asyncio.wait_for(queue.take(), 30.0)).done()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.5)


async def test_a_large_state_stays_in_the_log() -> None:
    """Above the limit a work message carries the sequence only."""
    tokens = Tokens.given(range(STATE_LIMIT_BYTES // 8))
    state = Trajectory(
        admitted=fresh().admitted, turns=[Turn(trajectory="g0-0-0", tokens=tokens, text="")], seq=7
    )
    work: Work = decode(work_message(state), Work)
    assert (work.trajectory, work.seq, work.state) == ("g0-0-0", 7, None)


async def test_bytes_that_are_no_message_name_the_path(bus: Bus) -> None:
    """A taker can put them aside with a reason."""
    await bus.store(subjects.work("gen", "test"), b"\x81\xaatrajectory\x07")
    async with open_queue(bus, "gen", "test", slots=1) as queue:
        delivery = await queue.take()
        with pytest.raises(BadMessage, match=r"Expected `str`, got `int` - at `\$\.trajectory`"):
            delivery.work()
        await delivery.done()


async def test_a_queue_goes_on_after_the_server_was_restarted(
    server: EmbeddedServer, bus: Bus
) -> None:
    """Its standing request is gone with the server; it asks again by itself."""
    async with open_queue(bus, "gen", "test", slots=4) as queue:
        await publish_work(bus, "test", fresh(0))
        await (await queue.take()).done()
        server.stop()
        server.start()
        await publish_work(bus, "test", fresh(1))
        delivery = await asyncio.wait_for(queue.take(), 30.0)
        assert delivery.work().trajectory == "g0-1-0"
        await delivery.done()


async def test_a_queue_that_is_not_there_is_asked_for_once_a_second(bus: Bus) -> None:
    """The server refuses at once; whoever asks does not do so for ever in a circle, and works when there is one."""
    await delete_consumers(bus, "test")
    async with open_queue(bus, "gen", "test", slots=4) as queue:
        sent = bus.client.stats["out_msgs"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 3.0)
        assert bus.client.stats["out_msgs"] - sent < 12, "with the watchdog's, one a second too"
        await provision(bus, "test", ["python"])
        await publish_work(bus, "test", fresh())
        await (await asyncio.wait_for(queue.take(), 30.0)).done()


async def test_a_backlog_counts_what_waits_and_what_was_taken(bus: Bus) -> None:
    """By queue: the sweep waits for a message that may still lie there, and the watchdog for one to move."""
    names = ("gen", "score", "tool.python")
    assert await backlog(bus, "test", ["python"]) == dict.fromkeys(names, Queue(0, 0))
    await publish_work(bus, "test", fresh(0))
    await publish_work(bus, "test", fresh(1))
    assert (await backlog(bus, "test", ["python"]))["gen"] == Queue(2, 0)
    async with open_queue(bus, "gen", "test", slots=1) as queue:
        await (await queue.take()).done()
        await (await queue.take()).done()
        assert (await backlog(bus, "test", ["python"]))["gen"] == Queue(0, 2)


async def test_done_is_confirmed_by_the_server(bus: Bus) -> None:
    """After `done` the queue is empty: the message is not delivered again."""
    await publish_work(bus, "test", fresh())
    async with open_queue(bus, "gen", "test", slots=1) as queue:
        await (await queue.take()).done()
        async with asyncio.timeout(30.0):  # the server answers before it deletes
            while await messages_in(bus, "GEN"):  # noqa: ASYNC110 - a stream of the server's
                await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.5)


async def messages_in(bus: Bus, stream: str) -> int:
    answer = await bus.request(f"$JS.API.STREAM.INFO.{stream}", b"")
    return int(json.loads(answer.data)["state"]["messages"])
