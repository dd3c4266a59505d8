"""A link to a server that hangs, dies and comes back."""

import asyncio
import os
import signal
from unittest.mock import AsyncMock

import pytest

from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.errors import TooLarge, Unavailable


async def test_a_server_that_hangs_is_left_and_found_again(
    bus: Bus, server: EmbeddedServer
) -> None:
    """Stopped for longer than a ping may take, twice; its late answers break nothing, what is stored is stored once."""
    for number in range(2):
        os.kill(server.pid, signal.SIGSTOP)
        storing = asyncio.create_task(
            bus.store("score.test", b"x", {"Nats-Msg-Id": f"hung.{number}"})
        )
        await asyncio.sleep(6)
        os.kill(server.pid, signal.SIGCONT)
        assert await storing == number + 1
    assert not bus.closed.is_set()


async def test_a_server_that_is_killed_is_found_again(bus: Bus, server: EmbeddedServer) -> None:
    """SIGKILL, and the same port and store a second later."""
    assert await bus.store("score.test", b"before") == 1
    server.kill()
    storing = asyncio.create_task(bus.store("score.test", b"after", {"Nats-Msg-Id": "1"}))
    await asyncio.sleep(1)
    server.start()
    assert await storing == 2


async def test_who_waits_when_the_link_is_lost_is_told_at_once(
    bus: Bus, server: EmbeddedServer
) -> None:
    """Nobody answers over another link; what is stored is tried again, and stored once."""
    os.kill(server.pid, signal.SIGSTOP)
    os.waitpid(server.pid, os.WUNTRACED)  # noqa: ASYNC222 - until all its threads stand still
    asking = asyncio.create_task(bus.request("$JS.API.INFO", b"", timeout_s=90))
    storing = asyncio.create_task(bus.store("score.test", b"x", {"Nats-Msg-Id": "lost"}))
    await asyncio.sleep(0.1)
    server.kill()
    server.start()
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable, match="Reconnecting"):
            await asking
        assert await storing == 1


@pytest.mark.parametrize("pause_s", [None, 0.0, 0.3, 0.6])
async def test_who_leaves_while_the_server_dies_has_left(
    server: EmbeddedServer, pause_s: float | None
) -> None:
    """Without an error, and without a link that goes on looking for the server; before it is back, or after."""
    for _ in range(3):
        before = asyncio.all_tasks()
        async with connect(server.endpoint, "test") as bus:
            await bus.subscribe("heard", AsyncMock())
            server.kill()
            if pause_s is not None:
                await asyncio.sleep(pause_s)
                server.start()
        if pause_s is None:
            server.start()
        left = asyncio.all_tasks() - before
        if left:
            await asyncio.wait(left, timeout=10)
        assert not [task for task in left if not task.done()]


async def test_a_cancellation_that_comes_with_the_answer_is_not_lost(bus: Bus) -> None:
    """`wait_for` of Python 3.11, which nats-py waits with, swallows one that comes just then."""

    async def ask_on() -> None:
        while True:
            await bus.store("score.test", b"x")
            await bus.request("$JS.API.INFO", b"")

    for number in range(20):
        asking = [asyncio.create_task(ask_on()) for _ in range(20)]
        await asyncio.sleep(0.02 + number / 1000)
        for task in asking:
            task.cancel()
        _, pending = await asyncio.wait(asking, timeout=5)
        assert not pending


async def test_more_than_a_message_holds_is_refused_at_once(bus: Bus) -> None:
    """By its size and the limit, headers included: for those the server would cut the link, again and again."""
    limit_bytes = bus.client.max_payload
    size = rf"score\.test: {limit_bytes + 1} bytes; a message of the bus holds {limit_bytes}"
    large = bytes(limit_bytes + 1)
    for sending in (
        bus.store("score.test", large),
        bus.publish("score.test", large),
        bus.request("score.test", large),
        # "NATS/1.0", the header and an empty line: 10 + 18 + 2 bytes
        bus.store("score.test", large[:-30], {"Nats-Msg-Id": "one"}),
    ):
        async with asyncio.timeout(30):
            with pytest.raises(TooLarge, match=size):
                await sending
    assert await bus.store("score.test", large[:-31], {"Nats-Msg-Id": "one"}) == 1
    assert bus.client.stats["reconnects"] == 0
