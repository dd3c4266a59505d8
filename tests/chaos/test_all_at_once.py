"""Everything killed at a random moment, again and again, in one run that ends all the same."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 10
RUN = "all"
RECIPE = [
    "recipes/arithmetic.toml", "--run", RUN,
    "--set", "cold_start.steps=80", "--set", "learner.steps=120", "--set", "learner.groups_per_step=8",
    "--set", "learner.checkpoint_every_steps=4", "--set", "evaluation.limit=8",
    "--set", "replicas.recorder=1",
]  # fmt: skip


def test_ten_ends_and_one_run(tmp_path: Path, machine_at) -> None:
    """SIGKILL of the supervisor takes all with it; the run goes on from its log, and its accounts balance."""
    machine = machine_at(tmp_path)
    moments = random.Random(7)
    for _ in range(KILLS):
        before = len(machine.rows(RUN))
        process = machine.start("train", *RECIPE)
        machine.until(
            lambda known=before, run=process: (
                len(machine.rows(RUN)) > known or run.poll() is not None
            ),
            "a new step",
        )
        time.sleep(moments.uniform(0.0, 1.5))
        assert process.poll() is None, process.communicate()[0]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    machine.say("train", *RECIPE, timeout_s=700)
    machine.say("verify", "--run", RUN)
    machine.say("replay", "--run", RUN, timeout_s=700)
