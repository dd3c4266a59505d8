"""Toolboxes killed between `started` and `result`: no letter is sent twice, and its trajectory says why it failed."""

import os
from collections import Counter
from pathlib import Path

import pytest

from actors.recipe import load_recipe
from actors.verify import audit, report_text
from bench.running import RUN, start_run
from schemas.events import Dropped, Expired, Failed, Result, Started, Turn
from tests.chaos.effects import FOLDER_VARIABLE, KILLS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OVERRIDES = [
    'data.rows="tests.stalling.stalling:rows"',
    'tools.use=["tests.chaos.effects:post"]',
    "tools.tags={}",
    'generator.script="tests.chaos.effects:script"',
    'scorer.reward="tests.stalling.stalling:by_member"',
    "policy.max_turn_tokens=64",
    "policy.max_tokens=400",
    "learner.steps=5",
    "replicas.toolbox=2",
]


async def test_no_effect_happens_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before or after it has acted: redelivered, and failed with the one cause that there is."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    recipe = load_recipe(Path("tests/stalling/recipe.toml"), OVERRIDES)
    async with start_run(recipe) as run:
        await run.over()
        report = await audit(run.bus, RUN)
        events = [stored.event async for stored in run.log.read()]
    assert report.balanced, report_text(report)
    assert set(report.failed_by_cause) == {"tool.outcome_unknown"}
    kills = {f"{when}.{number}" for when in ("before", "after") for number in range(KILLS)}
    assert set(os.listdir(tmp_path)) == {"letters", *kills}, "all of them happened"
    letters = Counter((tmp_path / "letters").read_text().split())
    texts = {
        event.trajectory: event.calls[0].arguments["text"]
        for event in events
        if isinstance(event, Turn) and event.calls
    }
    started = Counter(event.trajectory for event in events if isinstance(event, Started))
    finished = {event.trajectory for event in events if isinstance(event, Result)}
    failed = {event.trajectory for event in events if isinstance(event, Failed)}
    # a member that waits for its turn again is dropped with its group, when both attempts of another have failed
    closed = {event.trajectory for event in events if isinstance(event, Dropped | Expired)}
    unfinished = set(started) - finished
    assert set(started.values()) == {1}
    assert failed <= unfinished <= failed | closed
    assert all(letters[texts[name]] == 1 for name in finished)
    assert sum(letters[texts[name]] for name in unfinished) >= KILLS
    assert all(letters[texts[name]] <= 1 for name in unfinished)
