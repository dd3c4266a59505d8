"""Whole runs of a policy that sees what it asks for, or what it is asked about. Real processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.names import find

SEEING = str(Path(__file__).parent / "seeing")
picture: Callable[..., bytes] = find("seeing:picture", SEEING)
RECIPE = Path(__file__).parent / "seeing" / "recipe.toml"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_policy_that_sees_is_trained(tmp_path: Path, machine_at) -> None:
    """The learner's log-probabilities are the engine's, of answers to pictures; replayed, they are so again."""
    folder = shutil.copytree(RECIPE.parent, tmp_path / "seeing")
    machine = machine_at(tmp_path / "runs")
    machine.say("train", str(folder / "recipe.toml"), "--run", "seeing")
    rows = machine.rows("seeing")
    assert len(rows) == 2
    for row in rows:
        assert row["failed_by_cause"] == {}
        assert row["tool_call_rate"] > 0.5
        assert row["kl_behaviour_max"] < 1e-3
        assert row["grad_norm"] > 0
    machine.say("verify", "--run", "seeing")
    machine.say("replay", "--run", "seeing")


def write_tasks(folder: Path, **files: bytes) -> None:
    """A data file whose messages show pictures that lie beside it, each named after its colour."""
    lines = []
    for colour, data in files.items():
        (folder / f"{colour}.png").write_bytes(data)
        content = [
            {"type": "image", "path": f"{colour}.png"},
            {"type": "text", "text": "What colour has the picture?"},
        ]
        public = {"messages": [{"role": "user", "content": content}]}
        lines.append(json.dumps({"id": colour, "public": public, "private": {"answer": colour}}))
    (folder / "tasks.jsonl").write_text("\n".join(lines))


SHOWN = [
    "--set", "data.rows=", "--set", "data.path=tasks.jsonl", "--set", "policy.max_turns=1",
    "--set", "cold_start.steps=0", "--set", "scorer.reward=seeing:guessed",
]  # fmt: skip


def test_a_policy_that_is_shown_pictures_is_trained(tmp_path: Path, machine_at) -> None:
    """Pictures of the task's own messages: engine and learner see the same, and so does a replay."""
    folder = shutil.copytree(RECIPE.parent, tmp_path / "seeing")
    write_tasks(folder, red=picture("red"), blue=picture("blue", 20, 9))
    machine = machine_at(tmp_path / "runs")
    machine.say("train", str(folder / "recipe.toml"), "--run", "shown", *SHOWN)
    rows = machine.rows("shown")
    assert len(rows) == 2
    for row in rows:
        assert row["failed_by_cause"] == {}
        assert row["kl_behaviour_max"] < 1e-3
        assert row["grad_norm"] > 0
    machine.say("verify", "--run", "shown")
    machine.say("replay", "--run", "shown")
    shown = machine.say("show", "g0-0-0", "--run", "shown")
    assert "<image>What colour has the picture?" in shown
    assert "image/png" in shown
