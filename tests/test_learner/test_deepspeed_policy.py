"""Two ranks train as one process does, in every way of ZeRO, and either goes on from the other's checkpoint."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from bus.embedded import free_port
from learner.checkpoints import write_folder
from learner.policy import Policy
from schemas.names import find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "several_ranks.py"
ranks = runpy.run_path(str(SCRIPT))
WAYS: list[str] = list(ranks["WAYS"])


@dataclass
class Results:
    """Of one process; and where those of two are."""

    folder: Path
    rows: list[dict[str, float]]
    restarted: dict[str, float]
    taught: dict[str, float]
    weights: bytes
    checkpoint: Path

    def of(self, way: str) -> Any:
        return json.loads((self.folder / way / "found.json").read_text())


def policy_of(folder: Path) -> Policy:
    policy = Policy.open(folder, ranks["BASE"], "cpu")
    policy.hold_reference(folder)
    return policy


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees."""
    made = tmp_path_factory.mktemp("llava")
    find("seeing:model", str(Path(__file__).parents[1] / "seeing"))(made)
    return made


@pytest.fixture(scope="module")
def results(folder: Path, sees: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Three steps by one process, then by two in each way: both processes start once."""
    out = tmp_path_factory.mktemp("ranks")
    batch = ranks["batch"]
    policy = policy_of(folder)
    rows = [policy.train_step(batch(step), step) for step in (1, 2)]
    write_folder(out / "one", policy.checkpoint_files(2))
    rows.append(policy.train_step(batch(3), 3))
    weights = policy.weights()
    policy.restart_optimizer()
    restarted = policy.train_step(batch(4), 4)
    taught = policy.supervised_step(batch(5)[0], 5, 1e-3)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(out / "one"), str(out), str(sees)],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
    return Results(out, rows, restarted, taught, weights, out / "one")


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    """Every metric, but for the number of ranks and the places computed."""
    packing = {"computed_tokens", "ranks"}
    assert found.keys() == expected.keys() | packing
    for name in expected.keys() - packing:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def assert_close_tensors(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float = 1e-5
) -> None:
    """A step is 1e-3; where a gradient is nearly zero, another order of summing is a part of it, on some processors."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=error, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_deepspeed_does_what_the_recipe_says(results: Results, way: str) -> None:
    """Its stage, and what of optimizer and weights stays where it is computed."""
    keys = ranks["WAYS"][way]
    found = results.of(way)
    assert found["stage"] == keys["zero_stage"]
    stays = {"none": 2, "optimizer": 1, "weights": 0}
    assert found["offload"] == stays[keys.get("offload", "none")]


@pytest.mark.parametrize("way", WAYS)
def test_losses_gradients_and_weights_are_those_of_one_process(results: Results, way: str) -> None:
    """Also where there are fewer trajectories than ranks, with a value head and a reference."""
    found = results.of(way)
    for row, expected in zip(found["rows"], results.rows, strict=True):
        assert_close(row, expected)
        assert row["ranks"] == 2
    weights = load_file(results.folder / way / "weights.safetensors")
    assert_close_tensors(weights, load(results.weights))


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_go_on_from_the_checkpoint_of_one(results: Results, way: str) -> None:
    """Weights, moments and the value head: the next step is the one that was made without an interruption."""
    found = results.of(way)
    assert_close(found["resumed"], results.rows[2])
    weights = load_file(results.folder / way / "resumed.safetensors")
    assert_close_tensors(weights, load(results.weights))


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_from_the_checkpoint_of_two(
    results: Results, folder: Path, way: str
) -> None:
    """It is of the same files, with the same tensors."""
    theirs = results.folder / way / "checkpoint"
    assert {path.name for path in theirs.iterdir()} == {
        p.name for p in results.checkpoint.iterdir()
    }
    for name in ("model", "optimizer", "value_head"):
        expected = load_file(results.checkpoint / f"{name}.safetensors")
        assert_close_tensors(load_file(theirs / f"{name}.safetensors"), expected)
    policy = policy_of(folder)
    assert policy.load_checkpoint(theirs) == 2
    row = policy.train_step(ranks["batch"](3), 3)
    assert_close(row | {"ranks": 1}, results.rows[2])
    assert_close_tensors(load(policy.weights()), load(results.weights))


@pytest.mark.parametrize("way", WAYS)
def test_a_restarted_optimizer_has_no_memory(results: Results, way: str) -> None:
    """As between the cold start and reinforcement learning."""
    assert_close(results.of(way)["restarted"], results.restarted)


@pytest.mark.parametrize("way", WAYS)
def test_demonstrations_are_taught_beside_a_value_head(results: Results, way: str) -> None:
    """Which they teach nothing."""
    found = results.of(way)["taught"]
    for name, value in results.taught.items():
        if name != "computed_tokens":
            assert found[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("way", ranks["SEEING"])
def test_images_reach_every_rank(results: Results, sees: Path, way: str) -> None:
    """Losses, gradients and the vision tower's weights are those of one process, whoever has which image."""
    policy = Policy.open(sees, ranks["seeing"](), "cpu")
    policy.hold_reference(sees)
    before = load(policy.weights())
    rows = json.loads((results.folder / way / "seeing.json").read_text())
    for step, row in enumerate(rows, start=1):
        assert_close(row | {"ranks": 2}, policy.train_step(ranks["seen"](sees), step))
    weights, expected = (
        load_file(results.folder / way / "seeing.safetensors"),
        load(policy.weights()),
    )
    assert_close_tensors(weights, expected, error=1e-4)
    moved = [name for name, tensor in expected.items() if not tensor.equal(before[name])]
    assert any("vision_tower" in name for name in moved)
