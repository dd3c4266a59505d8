"""A generator follows the newest weights, or ends by name: it must not stay with old ones in silence."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from actors.heartbeat import Vitals
from actors.process import Process
from actors.roles import _follow_policy, serve_generator
from actors.weights import Versions
from bus import policy
from bus.connection import Bus
from bus.log import Log
from bus.store import put_object
from bus.work import publish_work
from engines.errors import EngineError
from schemas.events import Admitted, Turn
from schemas.messages import WeightsPointer
from schemas.recipe import Deadlines, Policy, Recipe
from schemas.task import ChatMessage, PublicPart
from schemas.trajectory import Trajectory

WAIT_S = 60.0
RECIPE = Recipe(policy=Policy(model="m", max_turn_tokens=2))

Publish = Callable[[int, bytes], Awaitable[None]]


def generator(bus: Bus, log: Log, recipe: Recipe) -> Process:
    vitals = Vitals(run=log.run, role="generator", replica="generator-h-1")
    return Process(bus, log, recipe, "", vitals, asyncio.Event())


@pytest.fixture
def publish(bus: Bus, log: Log, model_folder: Path) -> Publish:
    """A version of the model."""
    files = [path for path in model_folder.iterdir() if path.suffix != ".safetensors"]

    async def one(version: int, weights: bytes) -> None:
        assets = await policy.publish_assets(
            bus, log.run, {path.name: path.read_bytes() for path in files}
        )
        name = await put_object(bus, policy.BUCKET, log.run, weights)
        pointer = WeightsPointer(policy_version=version, weights_sha256=name, assets_sha256=assets)
        await policy.publish_policy(bus, log.run, pointer, weights)

    return one


async def until_a_turn(log: Log) -> None:
    async for found in log.follow(poll_s=0.05):
        if any(isinstance(stored.event, Turn) for stored in found):
            return


async def test_weights_that_do_not_fit_end_the_replica(
    bus: Bus, log: Log, publish: Publish, model_folder: Path
) -> None:
    """They come while it samples; the error is the engine's."""
    await publish(0, (model_folder / "model.safetensors").read_bytes())
    served = asyncio.create_task(serve_generator(generator(bus, log, RECIPE)))
    messages = [ChatMessage(role="user", content="What is 47 * 86?")]
    event = Admitted(
        trajectory="g0-0-0", task="t", public=PublicPart(messages=messages), private_key=""
    )
    state = Trajectory(admitted=event, seq=await log.append(event, 0))
    await publish_work(bus, log.run, state)
    async with asyncio.timeout(WAIT_S):
        await until_a_turn(log)
        await publish(1, save({"another": torch.zeros(1)}))
        with pytest.RaisesGroup(pytest.RaisesExc(EngineError, match="engine.bad_weights")):
            await served


async def test_an_engine_that_never_takes_its_weights_ends_the_replica(
    bus: Bus, log: Log, publish: Publish
) -> None:
    """After twice the deadline of a turn, which it may have to wait for."""

    async def never(_weights: bytes, _policy_version: int) -> None:
        await asyncio.Event().wait()

    await publish(3, b"weights")
    recipe = Recipe(policy=Policy(model="m"), deadlines=Deadlines(gen_s=0.05))
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineError, match=r"weights_not_taken: version 3: not within 0\.1 s"):
            await _follow_policy(generator(bus, log, recipe), Versions(bus, log.run), never)
