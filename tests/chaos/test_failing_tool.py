"""A tool that always breaks its sandbox costs the trajectories that call it, and nobody else."""

from pathlib import Path

import pytest

from actors.recipe import load_recipe
from actors.verify import audit, report_text
from bench.running import RUN, start_run
from schemas.events import Admitted, Dropped, Failed, Filtered, Step, Stepped

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODULE = "tests.stalling.stalling"


async def test_the_run_lives_and_says_why() -> None:
    """Failed with the boundary that broke, replaced once, dropped whole; no reward, and no part in any batch."""
    recipe = load_recipe(
        Path("tests/stalling/recipe.toml"),
        [
            f'data.rows="{MODULE}:some_break"',
            f'tools.use=["{MODULE}:echo", "{MODULE}:crash"]',
            f'generator.script="{MODULE}:breaking_script"',
            f'scorer.reward="{MODULE}:by_member"',
            "learner.steps=12",
        ],
    )
    async with start_run(recipe) as run:
        await run.over()
        report = await audit(run.bus, RUN)
        events = [stored.event async for stored in run.log.read()]
    assert report.balanced, report_text(report)
    assert report.ended
    assert report.steps == 12
    assert report.failed_by_cause.keys() == {"sandbox.crashed"}
    broken = {e.trajectory for e in events if isinstance(e, Admitted) and e.task.startswith("b")}
    taken = {t for e in events if isinstance(e, Step | Filtered) for t in e.trajectories}
    assert broken
    assert not broken & taken
    ended = {e.trajectory for e in events if isinstance(e, Failed | Dropped)}
    assert ended <= broken
    rows = [event.metrics for event in events if isinstance(event, Stepped)]
    assert any(row["failed_by_cause"].get("sandbox.crashed") for row in rows)
    assert all(row["reward_mean"] == 0.5 for row in rows), (
        "the others are what they would have been"
    )
