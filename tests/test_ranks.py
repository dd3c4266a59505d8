"""A whole run whose learner is two processes, each of which is killed once: it begins again, and loses nothing."""

import os
import signal
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = Path(__file__).parent / "stalling" / "recipe.toml"
RUN = "ranks"
STEPS = 24
ARGUMENTS = [
    "train", str(RECIPE), "--run", RUN,
    "--set", "learner.ranks=2", "--set", "learner.zero_stage=2",
    "--set", f"learner.steps={STEPS}", "--set", "learner.checkpoint_every_steps=3",
    "--set", "learner.learning_rate=1e-3", "--set", "learner.correction.token=none",
    "--set", "learner.correction.sequence_min=1e-8", "--set", "learner.correction.sequence_max=1e8",
    "--set", "deadlines.hang_s=120",
]  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, machine_at):
    return machine_at(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(machine) -> str:
    """What the supervisor printed of a run in which rank 1 was killed after some steps, and rank 0 after some more."""
    run = machine.start(*ARGUMENTS)

    def ranks() -> list[psutil.Process]:
        return machine.processes(f"learner {RUN} rank ")

    for victim, more in ((1, 2), (0, 3)):
        machine.until(lambda: len(ranks()) == 2 or run.poll() is not None, "a group")
        # a new group takes seconds: no row is still to come of the old one
        steps = len(machine.rows(RUN)) + more
        machine.until(
            lambda n=steps: len(machine.rows(RUN)) >= n or run.poll() is not None, f"{steps} steps"
        )  # type: ignore[misc]
        before = ranks()
        assert len(before) == 2
        (process,) = machine.processes(f"learner {RUN} rank {victim}")
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(before, timeout=40)
        assert not alive, "the other rank ends with it, within seconds"
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    assert not machine.processes()
    return output


def test_the_supervisor_starts_the_group_again(finished: str) -> None:
    """It takes the death of a rank for what it is, and the run goes on to its end."""
    assert finished.count('"why": "killed by SIGKILL"') == 2


def test_nothing_is_lost_or_trained_twice(machine, finished: str) -> None:
    """Each step has one row, of two ranks, and every trajectory one fate."""
    rows = machine.rows(RUN)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["ranks"] for row in rows} == {2}
    assert any(abs(row["loss"]) > 1e-3 for row in rows)
    assert "balanced: each has one fate" in machine.say("verify", "--run", RUN)


def test_steps_trained_again_give_the_same_weights(machine, finished: str) -> None:
    """The recorded batches from the last checkpoint, to the bit."""
    (log,) = (machine.runs / RUN / "logs").glob("learner-*.log")
    assert "gave other weights" not in log.read_text()


def test_the_curve_is_that_of_one_process(machine, finished: str) -> None:
    """Every recorded loss and gradient norm comes out again when one process trains the same batches from the start."""
    found = machine.say("replay", "--run", RUN)
    assert f"{STEPS} steps of several ranks: metrics equal to a thousandth" in found
