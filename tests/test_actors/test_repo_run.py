"""A whole run of software engineers: examples/calculator.toml."""

from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "examples" / "calculator.toml"


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute, and much more when the machine is busy
def test_the_example_is_mended_and_learned_from(tmp_path: Path, machine_at) -> None:
    """Every trajectory looks, edits, tries and submits; the right ones score."""
    machine = machine_at(tmp_path)
    machine.say("train", str(RECIPE), "--run", "repo")
    (metrics, *_) = machine.rows("repo")
    assert 0 < metrics["reward_mean"] < 1
    assert metrics["failed_by_cause"] == {}
    shown = machine.say("show", "g0-0-0", "--run", "repo")
    assert [shown.count(f"'function': '{name}'") for name in ("view", "edit", "run", "submit")] == (
        [1, 1, 1, 1]
    )
