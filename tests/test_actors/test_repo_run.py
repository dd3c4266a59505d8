"""A whole run of software engineers: examples/calculator.toml."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "examples" / "calculator.toml"


@pytest.mark.slow
@pytest.mark.timeout(300)  # half a minute, and much more when the machine is busy
def test_the_example_is_mended_and_learned_from(tmp_path: Path) -> None:
    """Every trajectory looks, edits, tries and submits; the right ones score."""
    environment = os.environ | {"ACTORS_RUNS": str(tmp_path), "COLUMNS": "200"}

    def actors(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "actors", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    actors("train", str(RECIPE), "--run", "repo")
    metrics = json.loads((tmp_path / "repo/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < metrics["reward_mean"] < 1
    assert metrics["failed_by_cause"] == {}
    shown = actors("show", "g0-0-0", "--run", "repo")
    assert [shown.count(f"'function': '{name}'") for name in ("view", "edit", "run", "submit")] == (
        [1, 1, 1, 1]
    )
