"""A learner that dies after its last checkpoint: what was published stays, and what it leaves is the last version."""

import asyncio
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from actors import run_folder
from actors.process import join
from actors.training import Training
from bus import policy
from bus.connection import connect
from bus.embedded import EmbeddedServer
from schemas.algorithm import Correction
from schemas.recipe import Asynchrony, Learner, Policy, Recipe, Tools

RUN = "recovered"
STEPS = 6
RECIPE = Recipe(
    policy=Policy(model="recipes.arithmetic:model", max_tokens=32),
    tools=Tools(tier="unsafe"),  # the reward `exact` runs no code
    learner=Learner(
        steps=STEPS,
        groups_per_step=1,
        group_size=2,
        weights_kept=2,
        checkpoint_every_steps=100,  # one at the beginning, one at the end
        correction=Correction(token="none", sequence="none"),  # or none of the tokens would count
    ),
    asynchrony=Asynchrony(max_staleness=STEPS),
)


@pytest.fixture(scope="module")
def learned(learn) -> Path:
    """The folder for runs, with a finished one in it."""
    return learn(RUN, RECIPE, {f"g{number}": ["42", "7"] for number in range(STEPS)})


async def test_steps_trained_again_take_nothing_away(runs: Path) -> None:
    """From the checkpoint of version 0, on a log that has all steps and the run's end.

    Versions that are newer than the step that is trained again may be in use, and are the run's newest.
    """
    folder = run_folder.RunFolder(RUN).path
    trained = load_file(folder / "checkpoint" / "model.safetensors")
    shutil.rmtree(folder / "checkpoint")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")
    server = EmbeddedServer(folder / "nats", unrestricted=True)
    server.start()
    try:
        async with connect(server.endpoint, "test") as bus:

            async def versions() -> list[int]:
                found = [await policy.version(bus, RUN, number) for number in range(STEPS + 1)]
                for pointer in filter(None, found):
                    await policy.load_weights(bus, RUN, pointer)
                return [number for number, pointer in enumerate(found) if pointer is not None]

            before = await versions()
            assert before == [0, STEPS - 1, STEPS]
            async with asyncio.timeout(90):
                async with join(server.endpoint, RUN, "learner", asyncio.Event()) as process:
                    await Training(process).serve()
            assert await versions() == before
    finally:
        server.stop()
    again = load_file(folder / "checkpoint" / "model.safetensors")
    assert again.keys() == trained.keys()
    assert all(again[name].equal(tensor) for name, tensor in trained.items())
