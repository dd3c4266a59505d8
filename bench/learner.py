"""What a step of the learner costs, beside TRL's GRPOTrainer and beside a bare forward and backward pass.

    ours    Policy.train_step: packing, log-probabilities, loss, metrics, clipping, AdamW
    trl     GRPOTrainer.train, the same; its completions are given and scored before, only the update is timed
    floor   no more than forward and backward: as many tokens as the trajectories have, in rows of their mean length and
            so without padding or mask; cross entropy of as many tokens as were sampled; no optimizer

The same weights, trajectories, precision, threads and tokens in a micro-batch; prompts and completions of mixed
lengths. That it is the same step is checked: both gradients have the same norm. Each kind is a process of its own, so
that its peak of memory is its own (above what imports take), and they take their steps in turn. Tokens are those of the
trajectories, whatever is computed for them. SmolLM2 is learned in bfloat16, as in its recipe.

`--parts` also measures what is saved by computing a group's prompt once, and by `learner.gradient_checkpointing`.

    python -m bench.learner [--workloads tiny smollm2] [--models DIR] [--steps N] [--threads N] [--parts] [--quick]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

from bench.learner_step import WORKLOADS

PEERS = ("ours", "trl", "floor")
PARTS = ("ours", "unshared", "recomputed")
SAME_NORM = 0.01
"""How far two gradients' norms may be apart, relatively, for the same step: bfloat16 rounds."""


@dataclass(frozen=True)
class Measured:
    """A kind's steps, but for the first, which warms up."""

    seconds: float
    """The median."""
    grad_norm: float | None
    """Of the first step."""
    peak_mb: float


class Kind:
    """A process that takes steps of one kind."""

    def __init__(self, name: str, commands: IO[str], answers: IO[str]) -> None:
        self._name = name
        self._commands, self._answers = commands, answers
        self._seconds: list[float] = []
        self._grad_norm: float | None = None

    def step(self) -> None:
        """When it is ready for one."""
        self._read()
        self._commands.write("\n")
        self._commands.flush()
        found = self._read()
        if not self._seconds:
            self._grad_norm = found["grad_norm"]
        self._seconds.append(found["seconds"])

    def measured(self) -> Measured:
        return Measured(median(self._seconds[1:]), self._grad_norm, self._read()["peak_mb"])

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self._name} has ended: it says why above, or memory ran out")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def started(kind: str, *arguments: str) -> Iterator[Kind]:
    command = [sys.executable, "-m", "bench.learner_step", kind, *arguments]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield Kind(kind, process.stdin, process.stdout)
        finally:
            process.kill()


class Plan(NamedTuple):
    """How a workload is measured."""

    workload: str
    models: Path
    steps: int
    threads: int


def measure(names: Sequence[str], plan: Plan) -> dict[str, Measured]:
    """The kinds' steps, one of each after the other; prints a table, in which time is also that of the first kind's."""
    work = WORKLOADS[plan.workload]
    folder = model_folder(work.model, plan.models / work.model.rpartition(":")[0])
    arguments = [plan.workload, str(folder), str(1 + plan.steps), str(plan.threads)]
    with ExitStack() as stack:
        kinds = {name: stack.enter_context(started(name, *arguments)) for name in names}
        for _ in range(1 + plan.steps):
            for kind in kinds.values():
                kind.step()
        found = {name: kind.measured() for name, kind in kinds.items()}
    for name, row in found.items():
        print(
            f"  {name:12} {row.seconds:8.3f} s {work.tokens / row.seconds:8.0f} tokens/s"
            f" {row.peak_mb:8.0f} MB {row.seconds / found[names[0]].seconds:6.2f} of {names[0]}"
        )
    return found


def model_folder(source: str, folder: Path) -> Path:
    """Where `module:function` has written its model, once."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        module, _, function = source.partition(":")
        getattr(import_module(module), function)(folder)
    return folder


def compare(plan: Plan, parts: bool) -> dict[str, float]:
    """Print a workload's tables; returns its figures."""
    work = WORKLOADS[plan.workload]
    print(
        f"{plan.workload}, {work.dtype}, {plan.threads} threads: {work.groups} groups of {work.group_size},"
        f" {work.tokens} tokens"
    )
    found = measure(PEERS, plan)
    ours, trl, floor = (found[name] for name in PEERS)
    assert ours.grad_norm
    assert trl.grad_norm
    if abs(ours.grad_norm / trl.grad_norm - 1) > SAME_NORM:
        norms = f"our gradient's norm is {ours.grad_norm:.4g}, TRL's {trl.grad_norm:.4g}"
        raise SystemExit(f"{plan.workload}: not the same step: {norms}")
    figures = {
        "vs_trl": trl.seconds / ours.seconds,
        "vs_floor": floor.seconds / ours.seconds,
        "tokens_per_s": work.tokens / ours.seconds,
        "peak_mb": ours.peak_mb,
        "trl_peak_mb": trl.peak_mb,
        "floor_peak_mb": floor.peak_mb,
    }
    if parts:
        ours, unshared, recomputed = measure(PARTS, plan).values()
        figures |= {
            "vs_unshared": unshared.seconds / ours.seconds,
            "unshared_peak_mb": unshared.peak_mb,
            "vs_recomputed": recomputed.seconds / ours.seconds,
            "recomputed_peak_mb": recomputed.peak_mb,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["tiny", "smollm2"])
    parser.add_argument("--quick", action="store_true", help="the same as --workloads quick")
    parser.add_argument("--parts", action="store_true", help="and ours without two of its parts")
    parser.add_argument("--models", type=Path, help="a folder that keeps the models for next time")
    parser.add_argument("--steps", type=int, default=5, help="of each kind, after the first")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = given.models or Path(scratch)
        names = ["quick"] if given.quick else given.workloads
        found = {
            name: compare(Plan(name, models, given.steps, given.threads), given.parts)
            for name in names
        }
    figures = {
        "vs_trl": min(row["vs_trl"] for row in found.values()),
        "vs_floor": min(row["vs_floor"] for row in found.values()),
        "peak_mb": max(row["peak_mb"] for row in found.values()),
    }
    for name, row in found.items():
        figures |= {f"{name}_{key}": value for key, value in row.items()}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
