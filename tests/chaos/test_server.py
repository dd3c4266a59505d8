"""nats-server hangs, or its disk is full, in the middle of a run: the run waits, says why, and goes on."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.learner import NAME
from actors.recipe import load_recipe, to_toml
from actors.verify import audit, report_text
from bench.running import RUN, start_run
from bus import subjects
from schemas.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

STEPS = 40


def recipe() -> Recipe:
    """A scripted policy, quick, with deadlines shorter than the outages."""
    module = "tests.stalling.stalling"
    return load_recipe(
        Path("tests/stalling/recipe.toml"),
        [
            f'data.rows="{module}:rows"',
            f'tools.use=["{module}:echo"]',
            f'generator.script="{module}:script"',
            f'scorer.reward="{module}:by_member"',
            f"learner.steps={STEPS}",
            "deadlines.hang_s=15",
        ],
    )


async def test_a_server_that_hangs_for_20_s_costs_20_s() -> None:
    """Nobody is killed for it, nothing fails, and the run ends by itself."""
    async with start_run(recipe()) as run:
        stepped = await run.count(subjects.learner(RUN, NAME, "stepped"))
        await run.until(stepped.at(3))
        os.kill(run.server.pid, signal.SIGSTOP)
        await asyncio.sleep(20)
        os.kill(run.server.pid, signal.SIGCONT)
        await run.over()
        report = await audit(run.bus, RUN)
        assert "killing" not in run.output
    assert report.balanced, report_text(report)
    assert report.ended
    assert report.steps == STEPS
    assert not report.fates["failed"]


@pytest.fixture
def small_disk(tmp_path: Path, make_small_disk: Callable[[Path, int], Path]) -> Path:
    """A file system of 160 MB, where the run's server has its store."""
    return make_small_disk(tmp_path / "full" / "nats", 160)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 200
    while not is_so():
        assert time.monotonic() < end, f"not in 200 s: {what}"
        time.sleep(0.1)


def test_a_full_disk_is_waited_for(small_disk: Path, tmp_path: Path) -> None:
    """The run says so, loses nothing, and goes on when there is room."""
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe()))
    output = tmp_path / "output"
    with output.open("wb") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "actors", "train", str(path), "--run", "full"],
            env=os.environ | {"ACTORS_RUNS": str(tmp_path)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    until(lambda: "step 3/" in output.read_text(), "three steps")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        fill(ballast)
    until(lambda: "disk is full" in output.read_text(), "it says that the disk is full")
    time.sleep(20)
    assert run.poll() is None, output.read_text()
    ballast.unlink()
    assert run.wait(200) == 0, output.read_text()
    assert "killing" not in output.read_text()
    verified = subprocess.run(
        [sys.executable, "-m", "actors", "verify", "--run", "full", "--json"],
        env=os.environ | {"ACTORS_RUNS": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    report = json.loads(verified.stdout)
    assert verified.returncode == 0, report["broken"]
    assert (report["ended"], report["steps"], report["fates"]["failed"]) == (True, STEPS, 0)
