"""A link to a server that hangs, dies and comes back."""

import asyncio
import os
import signal

import pytest

from bus.connection import Bus
from bus.embedded import EmbeddedServer


# nats-py leaves the writer of an attempt that timed out to the garbage collector
@pytest.mark.filterwarnings("ignore:.*StreamWriter:pytest.PytestUnraisableExceptionWarning")
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
    os.kill(server.pid, signal.SIGKILL)
    await server.wait()
    storing = asyncio.create_task(bus.store("score.test", b"after"))
    await asyncio.sleep(1)
    server.start()
    assert await storing == 2
