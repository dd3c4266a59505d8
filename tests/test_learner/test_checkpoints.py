"""A resumed run goes on as if it had never stopped."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.checkpoints import (
    CheckpointWriter,
    best_steps,
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    step_of,
    write_folder,
)
from learner.errors import BadCheckpoint
from learner.policy import Policy
from schemas.recipe import Recipe


def sha(policy: Policy) -> str:
    return hashlib.sha256(policy.weights()).hexdigest()


def test_the_next_step_is_the_same_to_the_bit(
    folder: Path, config: Recipe, policy: Policy, make_groups, tmp_path: Path
) -> None:
    """Weights, moments and the random state come back: two more steps equal the uninterrupted ones."""
    for step in (1, 2):
        policy.train_step(make_groups(seed=step), step)
    write_folder(tmp_path / "step-000002", policy.checkpoint_files(2))
    at_checkpoint = sha(policy)
    expected = [policy.train_step(make_groups(seed=step), step) for step in (3, 4)]
    assert sha(policy) != at_checkpoint
    drawn = torch.rand(3)

    resumed = Policy.open(folder, config)
    torch.manual_seed(99)
    assert resumed.load_checkpoint(tmp_path / "step-000002") == 2
    assert [resumed.train_step(make_groups(seed=step), step) for step in (3, 4)] == expected
    assert sha(resumed) == sha(policy)
    assert torch.equal(torch.rand(3), drawn)


def test_a_policy_may_go_back(policy: Policy, make_groups, tmp_path: Path) -> None:
    """Loading forgets what came after the checkpoint, the first moments too."""
    write_folder(tmp_path / "step-000000", policy.checkpoint_files(0))
    first = policy.train_step(make_groups(), 1)
    assert policy.load_checkpoint(tmp_path / "step-000000") == 0
    assert policy.train_step(make_groups(), 1) == first


def test_no_pickle(policy: Policy, make_groups, tmp_path: Path) -> None:
    """A checkpoint is safetensors and JSON."""
    policy.train_step(make_groups(), 1)
    write_folder(tmp_path / "step-000001", policy.checkpoint_files(1))
    names = {path.name for path in (tmp_path / "step-000001").iterdir()}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", None),
        ("state.json", b"{}"),
        ("state.json", b"[1"),
        ("model.safetensors", b"short"),
        ("optimizer.safetensors", None),
    ],
)
def test_damage_is_seen_before_anything_is_loaded(
    policy: Policy, make_groups, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """A missing or malformed file raises BadCheckpoint, and the policy is as it was."""
    path = tmp_path / "step-000000"
    write_folder(path, policy.checkpoint_files(0))
    policy.train_step(make_groups(), 1)
    before = sha(policy)
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match="step-000000"):
        policy.load_checkpoint(path)
    assert sha(policy) == before


@pytest.mark.parametrize("file", ["model", "optimizer", "rng"])
def test_another_models_checkpoint_is_refused(
    policy: Policy, make_groups, tmp_path: Path, file: str
) -> None:
    """A tensor too few is another model's, whatever file it is missing from; nothing is loaded."""
    path = tmp_path / "step-000001"
    policy.train_step(make_groups(), 1)
    write_folder(path, policy.checkpoint_files(1))
    policy.train_step(make_groups(), 2)
    before = sha(policy)
    tensors = load_file(path / f"{file}.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, path / f"{file}.safetensors")
    with pytest.raises(BadCheckpoint):
        policy.load_checkpoint(path)
    assert sha(policy) == before


# -- folders ---------------------------------------------------------------------------------------


def test_a_writer_that_dies_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Half a folder is never seen under its name, and the older one is still whole."""
    path = checkpoint_path(tmp_path, 3)
    write_folder(path, [("a", b"old"), ("b", b"old")])

    def dying() -> Iterator[tuple[str, bytes]]:
        yield "a", b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(path, dying())
    assert [file.read_bytes() for file in sorted(path.iterdir())] == [b"old", b"old"]
    assert latest_checkpoint(tmp_path) == path
    write_folder(path, [("a", b"new")])
    assert [file.read_bytes() for file in path.iterdir()] == [b"new"]
    prune_checkpoints(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_deletion_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it prunes leaves no damaged checkpoint under a checkpoint's name."""
    for step in (1, 2):
        write_folder(checkpoint_path(tmp_path, step), [("a", b""), ("b", b"")])

    def dying(path: Path) -> None:
        (path / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("learner.checkpoints.shutil.rmtree", dying)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    """By step, not by name or time; leftovers of interrupted writers go, other folders stay."""
    for step in (1_000_000, 10, 999_999):
        write_folder(checkpoint_path(tmp_path, step), [("state.json", b"{}")])
    (tmp_path / ".step-000011.writing").mkdir()
    (tmp_path / "export").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1000000", "step-999999", "export"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    """Of a run that has written none, and of one that has no folder."""
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    prune_checkpoints(tmp_path / "missing", keep=1)


def test_the_first_checkpoint_stays(tmp_path: Path) -> None:
    """A whole run can be replayed from step 0, and any step from the newest checkpoint before it."""
    for step in (0, 3, 6, 9):
        write_folder(checkpoint_path(tmp_path, step), [("state.json", b"{}")])
        prune_checkpoints(tmp_path, keep=2)
    assert {step_of(path) for path in tmp_path.iterdir()} == {0, 6, 9}
    assert latest_checkpoint(tmp_path, 8) == checkpoint_path(tmp_path, 6)
    assert latest_checkpoint(tmp_path, 5) == checkpoint_path(tmp_path, 0)
    assert latest_checkpoint(tmp_path, -1) is None


# -- beside training -------------------------------------------------------------------------------


def test_what_is_written_is_the_snapshot(policy: Policy, make_groups, tmp_path: Path) -> None:
    """Steps made meanwhile change nothing of it."""
    writer = CheckpointWriter(tmp_path, keep=2)
    snapshot = list(policy.checkpoint_files(0))
    writer.write(0, snapshot, {})
    policy.train_step(make_groups(), 1)
    writer.wait()
    path = checkpoint_path(tmp_path, 0)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == dict(snapshot)
    first = sha(policy)
    assert policy.load_checkpoint(path) == 0
    assert sha(policy) != first


def test_the_best_stay(tmp_path: Path) -> None:
    """By their scores, of equal ones the later; beside the newest and that of step 0."""
    writer = CheckpointWriter(tmp_path, keep=1, keep_best=2)
    scores = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: 0.1}
    for step in range(0, 11, 2):
        known = {each: score for each, score in scores.items() if each <= step}
        writer.write(step, [("state.json", b"{}")], known)
    writer.wait()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [0, 4, 8, 10]
    assert best_steps(tmp_path, scores, 1) == [8]
    assert best_steps(tmp_path, {}, 1) == []


def test_what_could_not_be_written_is_told(tmp_path: Path) -> None:
    """When the next one is begun, or at the end."""
    (tmp_path / "file").write_bytes(b"")
    writer = CheckpointWriter(tmp_path / "file", keep=1)
    writer.write(0, [("state.json", b"{}")], {})
    with pytest.raises(OSError, match="file"):
        writer.write(2, [("state.json", b"{}")], {})


DYING = """
import sys
from pathlib import Path
from learner.checkpoints import CheckpointWriter

writer = CheckpointWriter(Path(sys.argv[1]), keep=1)
for step in range(1, 100_000):
    content = str(step).encode() * 20_000
    writer.write(step, [(name, content) for name in ("a", "b", "c")], {})
    print(step, flush=True)
"""


def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Whenever it comes: the newest there is holds what one step wrote, and of no older step than the last but one."""
    for kill in range(4):
        folder = tmp_path / str(kill)
        child = subprocess.Popen(
            [sys.executable, "-c", DYING, folder], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(5 + kill):
            begun = int(child.stdout.readline())
        child.kill()
        child.communicate()
        newest = latest_checkpoint(folder)
        assert newest is not None
        assert step_of(newest) >= begun - 1
        content = str(step_of(newest)).encode() * 20_000
        assert [file.read_bytes() for file in sorted(newest.iterdir())] == [content] * 3
