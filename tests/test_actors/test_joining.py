"""Commands on a run at rest: one at a time has a server on its store."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actors import joining, run_folder
from actors.errors import UserError
from actors.joining import Served, reach, serving
from actors.run_folder import RunFolder
from actors.train import begin
from bus.embedded import EmbeddedServer
from bus.errors import InUse
from schemas.recipe import Policy, Recipe

RECIPE = Recipe(policy=Policy(model="m"))


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedServer]:
    """Another command's server on the store of the run `test`, which is not alive."""
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    server = EmbeddedServer(RunFolder("test").nats, unrestricted=True)
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def served() -> AsyncIterator[asyncio.Task[Served]]:
    """What `serving` gives, which waits."""
    over = asyncio.Event()
    given: asyncio.Future[Served] = asyncio.get_running_loop().create_future()

    async def serve() -> Served:
        async with serving("test", "") as found:
            given.set_result(found)
            await over.wait()
        return found

    task = asyncio.create_task(serve())
    await asyncio.sleep(0.5)
    assert not given.done()
    yield given  # type: ignore[misc]
    over.set()
    await task


async def test_a_command_waits_for_another_s_server(other: EmbeddedServer) -> None:
    """A run that has just stopped is at rest before its server has ended."""
    async with served() as waiting:
        other.stop()
        found = await asyncio.wait_for(waiting, 30.0)
        assert found.at_rest
        assert found.logins.url != other.logins.url


async def test_a_run_that_comes_alive_meanwhile_is_joined(other: EmbeddedServer) -> None:
    """It was being started."""
    async with served() as waiting:
        RunFolder("test").write_endpoint(other.logins)
        found = await asyncio.wait_for(waiting, 30.0)
        assert not found.at_rest
        assert found.logins.url == other.logins.url


async def test_nobody_waits_for_ever(
    other: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at a run, and whoever goes on with it: the other may go on for an hour."""
    monkeypatch.setattr(joining, "_IN_USE_S", 0.2)
    with pytest.raises(InUse, match="another command has a server on this store: wait"):
        async with reach("test", ""):
            pass
    with pytest.raises(InUse, match="another command"):
        async with begin(RECIPE, "", RunFolder("test"), ""):
            pass


async def test_of_two_that_begin_a_run_one_does(other: EmbeddedServer) -> None:
    """The second finds it alive, however little later it comes."""

    async def begin_too() -> None:
        async with begin(RECIPE, "", RunFolder("test"), ""):
            pass

    beginning = asyncio.create_task(begin_too())
    await asyncio.sleep(0.5)
    RunFolder("test").write_endpoint(other.logins)
    with pytest.raises(UserError, match="run 'test' is alive already"):
        await asyncio.wait_for(beginning, 30.0)
