"""What a run leaves in its folder, written from the log alone: metrics.jsonl, TensorBoard events, reward.png."""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from bus.log import Stored
from schemas.events import Evaluated, Stepped, Warmed
from schemas.trajectory import TrajectoryId

_EVALUATION = re.compile(r"e([0-9]{1,9})x[0-9]{1,9}")


class Report:
    """Follows a run's log from its beginning; what is there already is written anew, so a resume repeats nothing."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        board = folder / "tensorboard"
        shutil.rmtree(board, ignore_errors=True)
        self._board = SummaryWriter(str(board))
        self._metrics = (folder / "metrics.jsonl").open("wb")
        self._warm = (folder / "cold_start.jsonl").open("wb")
        self.rows: list[dict[str, Any]] = []
        self.evaluations: dict[int, list[float]] = {}
        """Policy version → the rewards of its evaluation trajectories."""

    def observe(self, stored: Stored) -> None:
        """Write down one event, if it is one to write down."""
        event = stored.event
        if isinstance(event, Stepped):
            self.rows.append(event.metrics)
            _write(self._metrics, event.metrics)
            self._chart("train", event.metrics, event.step, stored.time_s)
        elif isinstance(event, Warmed):
            _write(self._warm, event.metrics)
            self._chart("cold_start", event.metrics, event.step, stored.time_s)
        elif isinstance(event, Evaluated):
            version = evaluated_version(event.trajectory)
            if version is not None:
                self.evaluations.setdefault(version, []).append(event.reward)

    def _chart(self, prefix: str, row: dict[str, Any], step: int, time_s: float) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                self._board.add_scalar(f"{prefix}/{name}", value, step, walltime=time_s)

    def evaluation_means(self) -> dict[int, float]:
        """Policy version → mean held-out reward."""
        return {v: sum(r) / len(r) for v, r in sorted(self.evaluations.items())}

    def close(self) -> None:
        """Write what is left and draw the curve."""
        for version, mean in self.evaluation_means().items():
            self._board.add_scalar("evaluation/reward_mean", mean, version)
        with (self._folder / "evaluations.jsonl").open("wb") as file:
            for version, rewards in sorted(self.evaluations.items()):
                mean = sum(rewards) / len(rewards)
                _write(file, {"policy_version": version, "rows": len(rewards), "reward_mean": mean})
        self._metrics.close()
        self._warm.close()
        self._board.close()
        if self.rows:
            draw(self.rows, self.evaluation_means(), self._folder / "reward.png")


def evaluated_version(trajectory: str) -> int | None:
    """The policy version that an evaluation trajectory is pinned to, from its group's name `e<version>x<row>`.

    None for another trajectory, which a faulty scorer has evaluated.
    """
    place = _EVALUATION.fullmatch(TrajectoryId.parse(trajectory).group)
    return int(place[1]) if place else None


def _write(file: IO[bytes], row: dict[str, Any]) -> None:
    file.write(msgspec.json.encode(row) + b"\n")
    file.flush()


def draw(rows: list[dict[str, Any]], evaluations: dict[int, float], path: Path) -> None:
    """The reward by step, with the held-out means."""
    with new_figure(path) as (axes,):
        steps = [row["step"] for row in rows]
        axes.plot(steps, [row["reward_mean"] for row in rows], label="training")
        if evaluations:
            axes.plot(list(evaluations), list(evaluations.values()), "o", label="held out, greedy")
        axes.set(xlabel="step", ylabel="mean reward", ylim=(-0.02, 1.02))
        axes.legend(loc="lower right")


@contextmanager
def new_figure(path: Path, fields: int = 1) -> Iterator[Sequence[Any]]:
    """Axes to draw on, two beside each other; the picture is written when the block ends."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(fields, 2)
    rows = -(-fields // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(7 * columns, 4 * rows), dpi=120, squeeze=False
    )
    axes = list(grid.flat)
    for unused in axes[fields:]:
        unused.remove()
    for each in axes[:fields]:
        each.grid(alpha=0.3)
    try:
        yield axes[:fields]
        figure.tight_layout()
        figure.savefig(path)
    finally:
        plt.close(figure)
