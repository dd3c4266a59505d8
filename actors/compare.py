"""`actors compare`: runs and shadows side by side, as a table and as curves, and where they differ first."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from actors.errors import UserError
from actors.report import new_figure
from actors.run_folder import RUNS, RunFolder
from actors.views import columns

_METRICS = {
    "reward_mean": "reward",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "kl_behaviour": "KL to the engine",
    "kl_reference": "KL to the reference",
    "entropy": "entropy",
    "is_ratio_mean": "ratio to the engine",
}
"""Metric → what it is called; one that no row has is left out."""


class Curve(NamedTuple):
    """One metric of one run, by step."""

    steps: list[int]
    values: list[float]

    @property
    def worst_drop(self) -> float:
        """The farthest that it fell below what it had reached before."""
        highest, worst = -math.inf, 0.0
        for value in self.values:
            highest = max(highest, value)
            worst = max(worst, highest - value)
        return worst


class Compared(NamedTuple):
    """A run, or a shadow of one."""

    name: str
    """`RUN`, or `RUN/SHADOW`."""
    rows: list[dict[str, Any]]

    def curve(self, metric: str) -> Curve:
        """Of the steps that have it."""
        found = [row for row in self.rows if isinstance(row.get(metric), int | float)]
        return Curve([row["step"] for row in found], [row[metric] for row in found])


def compare(names: Sequence[str], picture: Path | None) -> None:
    """Print the table and where the others first differ from the first, and draw the curves. Raises UserError."""
    if len(names) < 2:
        raise UserError("compare: name two or more, each as RUN or RUN/SHADOW")
    compared = [Compared(name, _rows(name)) for name in names]
    click.echo(table(compared))
    for other in compared[1:]:
        click.echo(difference(compared[0], other))
    path = picture or run_path(names[0]) / "compare.png"
    draw(compared, path)
    click.echo(f"curves: {path}")


def run_path(name: str) -> Path:
    """The folder of `RUN` or `RUN/SHADOW`."""
    run, _, shadow = name.partition("/")
    return RunFolder(run, shadow).path


def _rows(name: str) -> list[dict[str, Any]]:
    path = run_path(name) / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
        rows = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except OSError as error:
        raise UserError(f"{name}: {path} is not there (runs are in {RUNS}/)") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{name}: {path}: {error}") from error
    if not rows:
        raise UserError(f"{name}: {path} has no step yet")
    return rows


def table(compared: Sequence[Compared]) -> str:
    """A line for each metric of each run."""
    cells: list[tuple[str, ...]] = [
        ("METRIC", "RUN", "STEPS", "FIRST", "LAST", "MEAN", "WORST DROP")
    ]
    for metric, what in _METRICS.items():
        for each in compared:
            curve = each.curve(metric)
            if curve.values:
                mean = sum(curve.values) / len(curve.values)
                figures = (curve.values[0], curve.values[-1], mean, curve.worst_drop)
                steps = f"{curve.steps[0]}-{curve.steps[-1]}"
                cells.append((what, each.name, steps, *(f"{figure:.5g}" for figure in figures)))
    return columns(cells)


def difference(one: Compared, other: Compared) -> str:
    """Where two runs first differ, as a line."""
    for step, metric, values in _differences(one, other):
        ours, theirs = values
        return (
            f"{other.name} first differs from {one.name} at step {step}: "
            f"{_METRICS[metric]} {theirs!r}, not {ours!r}"
        )
    common = {row["step"] for row in one.rows} & {row["step"] for row in other.rows}
    return f"{other.name} equals {one.name} in all of {len(common)} steps"


def _differences(
    one: Compared, other: Compared
) -> Iterator[tuple[int, str, tuple[object, object]]]:
    theirs = {row["step"]: row for row in other.rows}
    for row in one.rows:
        for metric in _METRICS:
            values = row.get(metric), theirs.get(row["step"], row).get(metric)
            if values[0] != values[1]:
                yield row["step"], metric, values


def draw(compared: Sequence[Compared], path: Path) -> None:
    """Each metric's curves in a field of its own."""
    drawn = [m for m in _METRICS if any(each.curve(m).values for each in compared)]
    with new_figure(path, fields=len(drawn)) as fields:
        for metric, axes in zip(drawn, fields, strict=True):
            for each in compared:
                axes.plot(*each.curve(metric), label=each.name)
            axes.set(xlabel="step", title=_METRICS[metric])
        fields[0].legend()
