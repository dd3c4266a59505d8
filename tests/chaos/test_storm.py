"""Replicas of every role killed two at a time, and the server every ten seconds, while a model learns."""

import asyncio
from pathlib import Path

import pytest

from actors.learner import NAME
from actors.recipe import load_recipe
from actors.verify import audit, report_text
from bench.running import RUN, start_run
from bench.storm import ROLES, Storm
from bus import subjects
from schemas.events import Stepped

STEPS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


async def test_a_model_learns_in_a_storm() -> None:
    """Every trajectory has one fate, and the reward rises as without a storm, which lasts until it has met all."""
    recipe = load_recipe(
        Path("recipes/arithmetic.toml"),
        ["learner.steps=100000", "learner.checkpoint_every_steps=3", "replicas.recorder=1"],
    )
    storm = Storm(RUN, seed=1, every_s=2.0, learner_every_s=15.0, at_once=2)
    async with start_run(recipe) as run:
        stepped = await run.count(subjects.learner(RUN, NAME, "stepped"))
        await run.until(stepped.at(1))
        storms = [
            asyncio.create_task(storm.rage(run.bus), name="storm"),
            asyncio.create_task(storm.rage_at(run.server, 10.0), name="storm at the server"),
        ]
        await run.until(stepped.at(STEPS))
        met_all = asyncio.Event()
        waiting = asyncio.create_task(_until_it_has_met_all(storm, met_all))
        await run.until(met_all)
        await waiting
        for task in storms:
            task.cancel()
        await asyncio.wait(storms)
        await run.stop()
        report = await audit(run.bus, RUN)
        rewards = [
            stored.event.metrics["reward_mean"]
            async for stored in run.log.read(subjects.learner(RUN, NAME, "stepped"))
            if isinstance(stored.event, Stepped)
        ]
    assert report.balanced, report_text(report)
    assert not report.fates["failed"], "a kill is nobody's failure"
    assert rewards[0] < 0.4
    assert sum(rewards[-5:]) / 5 > 0.85


async def _until_it_has_met_all(storm: Storm, met_all: asyncio.Event) -> None:
    while {what.split()[0] for what in storm.kills} != set(ROLES) or storm.server_kills < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    met_all.set()
