"""Everything killed at a random moment, again and again, in one run that ends all the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 10
RUN = "all"
RECIPE = [
    "recipes/arithmetic.toml", "--run", RUN,
    "--set", "cold_start.steps=80", "--set", "learner.steps=60", "--set", "learner.groups_per_step=8",
    "--set", "learner.checkpoint_every_steps=4", "--set", "evaluation.limit=8",
    "--set", "replicas.recorder=1",
]  # fmt: skip


def actors(runs: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "actors", *arguments],
        env=os.environ | {"ACTORS_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rows(runs: Path) -> int:
    path = runs / RUN / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ten_ends_and_one_run(tmp_path: Path) -> None:
    """SIGKILL of the supervisor takes all with it; the run goes on from its log, and its accounts balance."""
    moments = random.Random(7)
    for _ in range(KILLS):
        before = rows(tmp_path)
        process = actors(tmp_path, "train", *RECIPE)
        deadline = time.monotonic() + 300
        while rows(tmp_path) == before and process.poll() is None:
            assert time.monotonic() < deadline, "no step in five minutes"
            time.sleep(0.05)
        time.sleep(moments.uniform(0.0, 1.5))
        assert process.poll() is None, process.communicate()[0]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    last = actors(tmp_path, "train", *RECIPE)
    output, _ = last.communicate(timeout=400)
    assert last.returncode == 0, output
    for command in ("verify", "replay"):
        check = actors(tmp_path, command, "--run", RUN)
        output, _ = check.communicate(timeout=200)
        assert check.returncode == 0, output
