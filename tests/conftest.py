"""A real nats-server for each test that asks for one; it starts in about 65 ms."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.log import Log, open_log
from bus.provision import provision

RUN = "test"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    embedded = EmbeddedServer(tmp_path / "nats")
    embedded.start()
    yield embedded
    embedded.stop()


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with connect(server.endpoint, "test") as connected:
        await provision(connected, RUN, ["python"])
        yield connected


@pytest.fixture
async def log(bus: Bus) -> AsyncIterator[Log]:
    async with open_log(bus, RUN) as opened:
        yield opened
