"""Streams where there can be none: said in one line, by the command too."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from bus.connection import Bus, Endpoint, connect
from bus.errors import BusError, Unavailable, Unreachable
from bus.provision import delete_consumers, provision

RECIPE = Path(__file__).parents[1] / "stalling" / "recipe.toml"


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[Bus]:
    """To a server that has just been started."""
    async with AsyncExitStack() as stack, asyncio.timeout(60.0):
        while True:
            with suppress(Unreachable):
                bus = await stack.enter_async_context(connect(endpoint, "test"))
                break
        yield bus


@pytest.mark.parametrize(
    "blocks",
    ["", 'jetstream { store_dir: "%s" }\naccounts { A { users: [ { user: a, password: b } ] } }'],
    ids=["server", "account"],
)
async def test_a_server_without_jetstream_is_one_clear_error(
    plain_servers, tmp_path: Path, blocks: str
) -> None:
    """Of the server, or of the account alone."""
    server = plain_servers("plain", blocks.replace("%s", str(tmp_path / "store")))
    login = {"user": "a", "password": "b"} if blocks else {}
    async with connected(Endpoint(url=server.url, **login)) as bus:
        with pytest.raises(BusError, match=rf"the server at {server.url} has no JetStream: start"):
            await provision(bus, "test", [])
        with pytest.raises(BusError, match="has no JetStream"):
            await delete_consumers(bus, "test")


async def test_a_server_that_does_not_answer_is_one_clear_error(
    plain_servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has ended meanwhile: whatever the client says of it, it is one of the bus's own errors."""
    monkeypatch.setattr("bus.connection._ELECTION_S", 1.0)
    server = plain_servers("plain", f'jetstream {{ store_dir: "{tmp_path / "store"}" }}')
    async with connected(Endpoint(url=server.url)) as bus:
        server.kill()
        with pytest.raises(Unavailable):
            await provision(bus, "test", [])


def test_the_command_says_so_in_one_line(plain_servers, tmp_path: Path, machine_at) -> None:
    """And ends with exit status 2, as where no server is."""
    server = plain_servers("plain", "")
    machine = machine_at(tmp_path / "runs")
    train = machine.start("train", str(RECIPE), "--run", "none", "--nats", server.url)
    output, _ = train.communicate(timeout=100)
    assert train.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("actors: ")]
    assert f"the server at {server.url} has no JetStream: start it with -js" in line
    assert "Traceback" not in output
