"""Every role dies in every state of its work, twice; the run ends by itself and its accounts balance."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

HERE = Path(__file__).parent
RECIPE = [
    "recipes/arithmetic.toml", "--run", "matrix",
    "--set", "generator.engine=scripted", "--set", "generator.script=oracle:script",
    "--set", "cold_start.steps=0", "--set", "learner.steps=30", "--set", "learner.groups_per_step=4",
    "--set", "learner.group_size=4", "--set", "learner.checkpoint_every_steps=4",
    "--set", "generator.slots=16", "--set", "evaluation.limit=8", "--set", "evaluation.every_steps=10",
    "--set", "replicas.generator=2", "--set", "replicas.toolbox=2", "--set", "replicas.scorer=2",
    "--set", "replicas.recorder=1",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def actors(environment: dict[str, str], *arguments: str, timeout_s: float) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "actors", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "markers").mkdir()
    return os.environ | {
        "ACTORS_RUNS": str(folder),
        "ACTORS_FAULTS": "faults:arm",
        "CHAOS_MARKERS": str(folder / "markers"),
        "PYTHONPATH": str(HERE),
    }


@pytest.fixture(scope="module")
def output(environment: dict[str, str]) -> Iterator[str]:
    """What `actors train` printed until it ended by itself."""
    return actors(environment, "train", *RECIPE, timeout_s=800)


def test_every_point_was_reached(
    output: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point that no longer fires tests nothing."""
    monkeypatch.syspath_prepend(HERE)
    from faults import POINTS

    fired = {path.name for path in Path(environment["CHAOS_MARKERS"]).iterdir()}
    assert fired == {f"{point.name}.{number}" for point in POINTS for number in range(point.times)}


def test_every_trajectory_has_one_fate(output: str, environment: dict[str, str]) -> None:
    report = json.loads(actors(environment, "verify", "--run", "matrix", "--json", timeout_s=60))
    assert report["ended"]
    assert report["in_flight"] == 0
    assert report["failed_by_cause"] == {}, "a kill is nobody's failure"


def test_the_archive_has_every_trajectory_once(output: str, environment: dict[str, str]) -> None:
    """Killed while it writes, too: its rows by fate are what the log says."""
    report = json.loads(actors(environment, "verify", "--run", "matrix", "--json", timeout_s=60))
    folder = Path(environment["ACTORS_RUNS"], "matrix", "archive")
    rows = [
        row
        for path in folder.glob("trajectories-*.parquet")
        for row in pq.read_table(path, columns=["trajectory", "fate"]).to_pylist()
    ]
    assert len({row["trajectory"] for row in rows}) == len(rows) == report["admitted"]
    fates = Counter(row["fate"] for row in rows)
    assert fates == Counter({fate: n for fate, n in report["fates"].items() if n})


def test_every_step_can_be_made_again(output: str, environment: dict[str, str]) -> None:
    actors(environment, "replay", "--run", "matrix", timeout_s=300)
