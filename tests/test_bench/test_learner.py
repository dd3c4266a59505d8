"""The learner's bench runs, and compares like with like."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_last_line_is_its_figures() -> None:
    """A small batch of the tiny model: every kind takes its steps, our gradient has the norm of TRL's."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.learner", "--quick", "--steps", "1"],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    table, last = done.stdout.strip().rsplit("\n", 1)
    figures = json.loads(last)
    assert {"vs_trl", "vs_floor", "peak_mb"} < figures.keys()
    assert all(figure > 0 for figure in figures.values())
    rows = [line.split()[0] for line in table.splitlines() if line.startswith("  ")]
    assert rows == ["ours", "trl", "floor"]
