"""The smallest model of the recipes: its tokenizer and chat template are what the hops need."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from actors import run_folder
from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.log import Log, open_log
from bus.provision import provision
from recipes.arithmetic import model
from schemas.events import Opened
from schemas.recipe import Policy, Recipe

AtHome = Callable[[], AbstractAsyncContextManager[tuple[Bus, Log]]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model(folder)
    return folder


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AtHome:
    """The run `test` in a folder of its own: live while the block runs, at rest then."""
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)

    @asynccontextmanager
    async def open_home() -> AsyncIterator[tuple[Bus, Log]]:
        folder = run_folder.RunFolder("test")
        server = EmbeddedServer(folder.nats)
        server.start()
        async with connect(server.endpoint, "test") as bus, open_log(bus, "test") as log:
            await provision(bus, "test", ["python"])
            await log.append_run(Opened(recipe=Recipe(policy=Policy(model="m"))))
            folder.write_endpoint(server.endpoint)
            yield bus, log
        folder.remove_endpoint()
        server.stop()

    return open_home
