"""Every role dies in every state of its work, twice; the run ends by itself and its accounts balance."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

HERE = Path(__file__).parent
RECIPE = [
    "recipes/arithmetic.toml", "--run", "matrix",
    "--set", "generator.engine=scripted", "--set", "generator.script=oracle:script",
    "--set", "cold_start.steps=0", "--set", "learner.steps=30", "--set", "learner.groups_per_step=4",
    "--set", "learner.group_size=4", "--set", "learner.checkpoint_every_steps=2",
    "--set", "generator.slots=16", "--set", "evaluation.limit=8", "--set", "evaluation.every_steps=10",
    "--set", "replicas.generator=2", "--set", "replicas.toolbox=2", "--set", "replicas.scorer=2",
    "--set", "replicas.recorder=1",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def markers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each point leaves a file when it fires."""
    return tmp_path_factory.mktemp("markers")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, markers: Path, machine_at):
    """With a run in which everything was killed, and which ended by itself."""
    machine = machine_at(
        tmp_path_factory.mktemp("matrix"),
        ACTORS_FAULTS="faults:arm",
        CHAOS_MARKERS=str(markers),
        PYTHONPATH=str(HERE),
    )
    machine.say("train", *RECIPE, timeout_s=800)
    return machine


def test_every_point_was_reached(machine, markers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that no longer fires tests nothing."""
    monkeypatch.syspath_prepend(HERE)
    from faults import POINTS

    fired = {path.name for path in markers.iterdir()}
    assert fired == {f"{point.name}.{number}" for point in POINTS for number in range(point.times)}


def test_every_trajectory_has_one_fate(machine) -> None:
    report = json.loads(machine.say("verify", "--run", "matrix", "--json"))
    assert report["ended"]
    assert report["in_flight"] == 0
    assert report["failed_by_cause"] == {}, "a kill is nobody's failure"


def test_the_archive_has_every_trajectory_once(machine) -> None:
    """Killed while it writes, too: its rows by fate are what the log says."""
    report = json.loads(machine.say("verify", "--run", "matrix", "--json"))
    folder = machine.runs / "matrix" / "archive"
    rows = [
        row
        for path in folder.glob("trajectories-*.parquet")
        for row in pq.read_table(path, columns=["trajectory", "fate"]).to_pylist()
    ]
    assert len({row["trajectory"] for row in rows}) == len(rows) == report["admitted"]
    fates = Counter(row["fate"] for row in rows)
    assert fates == Counter({fate: n for fate, n in report["fates"].items() if n})


def test_every_step_can_be_made_again(machine) -> None:
    machine.say("replay", "--run", "matrix")
