"""The smallest model of the recipes: its tokenizer and chat template are what the hops need."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from math import log as ln
from pathlib import Path

import pytest

from actors import run_folder
from actors.process import join
from bus import private
from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.log import Log, open_log
from bus.provision import provision
from recipes.arithmetic import model
from schemas.events import (
    Admitted,
    AnyTrajectoryEvent,
    Ended,
    Opened,
    Scored,
    Stepped,
    Turn,
)
from schemas.recipe import Policy, Recipe
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens

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
        server = EmbeddedServer(folder.nats, unrestricted=True)
        server.start()
        async with connect(server.endpoint, "test") as bus, open_log(bus, "test") as log:
            await provision(bus, "test", ["python"])
            await log.append_run(Opened(recipe=Recipe(policy=Policy(model="m"))))
            folder.write_endpoint(server.logins)
            yield bus, log
        folder.remove_endpoint()
        server.stop()

    return open_home


# -- a run whose trajectories are written here, and whose learner is real --------------------------

UNIFORM = -ln(32)
"""Near what an untrained model says of any token of a vocabulary so small."""

Learn = Callable[[str, Recipe, Mapping[str, Sequence[str]]], Path]


def _life(name: str, text: str, number: int) -> list[AnyTrajectoryEvent]:
    """A trajectory that answered `text`; 42 is right."""
    tokens = Tokens.given([1, 2, 3]) + Tokens.sampled([4 + number, 5, 6], [UNIFORM] * 3, [0] * 3)
    return [
        Admitted(
            trajectory=name,
            task=name.partition("-")[0],
            public=PublicPart(messages=[ChatMessage(role="user", content="What is 6 * 7?")]),
            private_key=name.partition("-")[0],
        ),
        Turn(trajectory=name, tokens=tokens, text=text, last=True),
        Scored(trajectory=name, reward=float(text == "42"), parts={"answered": 1.0}),
    ]


@pytest.fixture(scope="session")
def learn(tmp_path_factory: pytest.TempPathFactory) -> Learn:
    """Writes a run's log, of groups with their members' answers, and lets a learner train on it to its end.

    Returns a folder for runs with that one in it.
    """

    async def write(log: Log, bus: Bus, groups: Mapping[str, Sequence[str]]) -> None:
        for group, texts in groups.items():
            await private.put_private(bus, log.run, group, {"answer": "42"})
            for member, text in enumerate(texts):
                seq = 0
                for event in _life(f"{group}-{member}-0", text, member):
                    seq = await log.append(event, seq)

    async def end(log: Log, steps: int) -> None:
        async for found in log.follow():
            if any(isinstance(s.event, Stepped) and s.event.step == steps for s in found):
                await log.append_run(Ended(reason="all steps done"))
                return

    async def learn_all(run: str, recipe: Recipe, groups: Mapping[str, Sequence[str]]) -> None:
        from actors.training import Training

        server = EmbeddedServer(run_folder.RunFolder(run).nats, unrestricted=True)
        server.start()
        try:
            async with connect(server.endpoint, "test") as bus, open_log(bus, run) as log:
                await provision(bus, run, [])
                await log.append_run(Opened(recipe=recipe))
                await write(log, bus, groups)
                async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
                    tasks.create_task(end(log, recipe.learner.steps))
                    async with join(server.endpoint, run, "learner", asyncio.Event()) as process:
                        await Training(process).serve()
        finally:
            server.stop()

    def learn_in_a_folder(run: str, recipe: Recipe, groups: Mapping[str, Sequence[str]]) -> Path:
        runs = tmp_path_factory.mktemp("runs")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_folder, "RUNS", runs)
            asyncio.run(learn_all(run, recipe, groups))
        return runs

    return learn_in_a_folder


@pytest.fixture
def runs(learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, for one test, of what the module's fixture `learned` has from `learn`."""
    copy = tmp_path / "runs"
    shutil.copytree(learned, copy)
    monkeypatch.setattr(run_folder, "RUNS", copy)
    return copy
