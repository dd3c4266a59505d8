"""The comparison with one process, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path("recipes/arithmetic.toml")
SMALL = {
    "groups_per_step = 16": "groups_per_step = 4",
    "limit = 128": "limit = 8",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_step_is_measured_in_one_process_and_in_many(tmp_path: Path) -> None:
    """The program ends with one JSON line that holds both runs, their ratio and the CPU of each process."""
    text = RECIPE.read_text()
    for old, new in SMALL.items():
        assert old in text
        text = text.replace(old, new)
    recipe = tmp_path / "small.toml"
    recipe.write_text(text)
    command = [sys.executable, "-m", "bench.loop", "--steps", "1", "--recipe", str(recipe)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(ran.stdout.splitlines()[-1])
    peer = figures["single_process"]
    assert figures["trajectories_per_s"] > 0
    assert figures["ratio_to_single_process"] == pytest.approx(
        figures["trajectories_per_s"] / peer["trajectories_per_s"], abs=0.01
    )
    assert {"reward_first", "reward_last5", "held_out"} <= figures.keys() & peer.keys()
    assert {"generator", "learner", "toolbox", "nats-server"} <= figures[
        "cpu_ms_per_trajectory"
    ].keys()
