"""`actors compare`: what the table says, and where runs are told to differ."""

import json
from pathlib import Path

import pytest

from actors.compare import Compared, Curve, compare, difference, table
from actors.errors import UserError


def rows(losses: list[float], **others: float) -> list[dict]:
    return [
        {"step": step, "reward_mean": 0.5, "loss": loss, "failed_by_cause": {}, **others}
        for step, loss in enumerate(losses, 1)
    ]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a, with a shadow b of other losses from step 2 on, and a shadow c without a step."""
    monkeypatch.setattr("actors.run_folder.RUNS", tmp_path)
    for name, losses in {
        "a": [0.5, 0.25, 0.375],
        "a/shadow/b": [0.5, 0.125],
        "a/shadow/c": [],
    }.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [json.dumps(row) for row in rows(losses)]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path


def test_worst_drop() -> None:
    """The farthest fall below what was reached before, not the largest step down."""
    assert Curve([1, 2, 3, 4, 5], [0.5, 0.9, 0.7, 0.6, 0.95]).worst_drop == pytest.approx(0.3)
    assert Curve([1, 2], [-2.0, -1.0]).worst_drop == 0
    assert Curve([], []).worst_drop == 0


def test_table() -> None:
    """First, last, mean and worst drop of each run; a metric that nobody has is left out."""
    text = table([Compared("a", rows([0.5, 0.25, 0.375])), Compared("a/b", rows([1.0]))])
    lines = [line.split() for line in text.splitlines()]
    assert ["loss", "a", "1-3", "0.5", "0.375", "0.375", "0.25"] in lines
    assert ["loss", "a/b", "1-1", "1", "1", "1", "0"] in lines
    assert "entropy" not in text


def test_the_first_difference_is_named() -> None:
    """By step, then by metric; a metric that only one of them has is one, a step is none."""
    one = Compared("a", rows([0.5, 0.25, 0.375]))
    says = difference(one, Compared("b", rows([0.5, 0.125, 0.375])))
    assert says == "b first differs from a at step 2: loss 0.125, not 0.25"
    assert "at step 1: entropy 2.0" in difference(one, Compared("b", rows([0.5], entropy=2.0)))
    assert difference(one, Compared("b", rows([0.5, 0.25]))) == "b equals a in all of 2 steps"


def test_runs_and_shadows_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name; the picture lies where it is asked for, or in the first one's folder."""
    compare(["a", "a/b"], None)
    assert "a/b first differs from a at step 2" in capsys.readouterr().out
    assert (runs / "a" / "compare.png").read_bytes().startswith(b"\x89PNG")
    compare(["a/b", "a"], runs / "other.png")
    assert (runs / "other.png").is_file()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a"], "name two or more"),
        (["a", "nobody"], "nobody/metrics.jsonl is not there"),
        (["a", "a/c"], "has no step yet"),
    ],
)
def test_what_cannot_be_compared(runs: Path, names: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        compare(names, None)
