"""A whole run whose learner is two processes, each of which is killed once: it begins again, and loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = Path(__file__).parent / "stalling" / "recipe.toml"
RUN = "ranks"
STEPS = 16
ARGUMENTS = [
    "train", str(RECIPE), "--run", RUN,
    "--set", "learner.ranks=2", "--set", "learner.zero_stage=2",
    "--set", f"learner.steps={STEPS}", "--set", "learner.checkpoint_every_steps=3",
    "--set", "learner.learning_rate=1e-3", "--set", "learner.correction.token=none",
    "--set", "learner.correction.sequence=none", "--set", "deadlines.hang_s=120",
]  # fmt: skip
PATIENCE_S = 400.0
"""For what takes seconds on a machine that is not busy."""


class Machine:
    def __init__(self, runs: Path) -> None:
        self.folder = runs / RUN
        self._environment = os.environ | {"ACTORS_RUNS": str(runs), "COLUMNS": "200"}
        self._marker = str(runs)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "actors", *arguments],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def say(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output
        return output

    def rows(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Those of the run whose title has the part."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("ACTORS_RUNS") == self._marker
                if mine and part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass
        return [process for process in found if process.pid != os.getpid()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("runs"))
    yield made
    for process in made.processes():
        process.kill()


def until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, f"not in {PATIENCE_S:g} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def finished(machine: Machine) -> str:
    """What the supervisor printed of a run in which rank 1 was killed after two steps, and rank 0 after five."""
    run = machine.start(*ARGUMENTS)
    for victim, steps in ((1, 2), (0, 5)):
        until(lambda n=steps: len(machine.rows()) >= n or run.poll() is not None, f"{steps} steps")  # type: ignore[misc]
        before = machine.processes(f"learner {RUN} rank ")
        assert len(before) == 2
        (process,) = machine.processes(f"learner {RUN} rank {victim}")
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(before, timeout=10)
        assert not alive, "the other rank ends with it, within seconds"
    output, _ = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, output
    assert not machine.processes()
    return output


def test_the_supervisor_starts_the_group_again(finished: str) -> None:
    """It takes the death of a rank for what it is, and the run goes on to its end."""
    assert finished.count("why='killed by SIGKILL'") == 2


def test_nothing_is_lost_or_trained_twice(machine: Machine, finished: str) -> None:
    """Each step has one row, of two ranks, and every trajectory one fate."""
    rows = machine.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["ranks"] for row in rows} == {2}
    assert any(abs(row["loss"]) > 1e-3 for row in rows)
    assert "balanced: each has one fate" in machine.say("verify", "--run", RUN)


def test_steps_trained_again_give_the_same_weights(machine: Machine, finished: str) -> None:
    """The recorded batches from the last checkpoint, to the bit."""
    (log,) = (machine.folder / "logs").glob("learner-*.log")
    assert "gave other weights" not in log.read_text()


def test_the_curve_is_that_of_one_process(machine: Machine, finished: str) -> None:
    """Every recorded loss and gradient norm comes out again when one process trains the same batches from the start."""
    found = machine.say("replay", "--run", RUN)
    assert f"{STEPS} steps of several ranks: metrics equal to a thousandth" in found
