"""Reward curves that mean something: each main algorithm, and each bound of staleness, at several seeds.

Each run is the real system on the recipe, with held-out problems evaluated every few steps; all of one seed begin with
the same cold start, made once. Steps and seconds are those of the reinforcement-learning phase, to the first version
that answers 0.9 of them; the worst drop is the farthest that the held-out curve fell below what it had reached. A run
that never gets there has none.

`--trl` adds the peer: TRL's GRPOTrainer from the same cold starts, on the same rows, with the same sandboxed tool, and
with a multiplication in place of it (bench/learn_trl.py). Its clock stands still while held-out problems are answered;
ours, which answers them while it trains, does not.

    python -m bench.learn [--algorithms A,B] [--staleness 0,4,8] [--trl] [--seeds N] [--steps N] [--quick]
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import uvloop

from actors.compare import Curve
from actors.recipe import load_recipe, to_toml, with_overrides
from actors.report import evaluated_version
from bench.running import start_run
from bus.log import Log
from schemas.events import Admitted, Evaluated, Stepped
from schemas.recipe import Recipe

GOAL = 0.9
EVALUATED_STEPS = 5
EVERY_GROUP = "filter.zero_variance=false"
"""Where the baseline is not the group's, one of equal rewards teaches too."""
ALGORITHMS = {
    "grpo": ["advantage.scale=group", "loss.aggregation=sequence_mean"],
    "dr_grpo": ["loss.aggregation=constant"],
    "dapo": ["advantage.scale=group"],
    "rloo": ["advantage.estimator=rloo", "loss.method=reinforce"],
    "reinforce++": ["advantage.estimator=reinforce++", "kl.coefficient=1e-3", "kl.place=reward", EVERY_GROUP],
    "gspo": ["loss.method=gspo", "loss.aggregation=sequence_mean", "loss.clip_low=3e-4", "loss.clip_high=4e-4"],
    "cispo": ["loss.method=cispo"],
    "ppo": ["advantage.estimator=gae", "advantage.scale=batch", EVERY_GROUP],
}  # fmt: skip
"""Name → keys of [learner]; the others are the recipe's."""
STALENESS = (0, 4, 8)
PEERS = {"trl": [], "trl in place": ["--in-place"]}
"""Name → options of bench.learn_trl."""
QUICK = {
    "cold_start.steps": 20,
    "learner.groups_per_step": 2,
    "learner.group_size": 4,
    "learner.filter.zero_variance": "false",  # a policy so young has no signal to wait for
    "evaluation.limit": 4,
}


class Learned(NamedTuple):
    """One run."""

    held_out: float
    """Of the last version."""
    steps_to_goal: int | None
    seconds_to_goal: float | None
    worst_drop: float


async def warm_up(recipe: Recipe, folder: Path) -> None:
    """Leave in the folder the model that the recipe's cold start makes."""
    recipe = with_overrides(recipe, ["learner.steps=0", "evaluation.limit=1"])
    async with start_run(recipe) as run:
        await run.over()
        shutil.copytree(run.folder / "checkpoint", folder)


async def measure(recipe: Recipe) -> Learned:
    """Do one run to its end."""
    async with start_run(recipe) as run:
        await run.over()
        return await read_run(run.log)


async def read_run(log: Log) -> Learned:
    """Fold the log of a run that has ended."""
    begun_s = math.inf
    made_s: dict[int, float] = {}
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    async for stored in log.read():
        event = stored.event
        if isinstance(event, Admitted) and event.purpose == "train":
            begun_s = min(begun_s, stored.time_s)
        elif isinstance(event, Stepped):
            made_s[event.policy_version] = stored.time_s
        elif isinstance(event, Evaluated):
            rewards[evaluated_version(event.trajectory) or 0].append(event.reward)
    versions = sorted(rewards)
    curve = Curve(versions, [sum(rewards[v]) / len(rewards[v]) for v in versions])
    return learned(curve, [max(0.0, made_s.get(v, begun_s) - begun_s) for v in versions])


def measure_trl(recipe: Recipe, *options: str) -> Learned:
    """Let TRL do the recipe, in a process of its own."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "bench.learn_trl", "/dev/stdin", *options],
        input=to_toml(recipe),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | quiet,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    return learned(Curve(found["versions"], found["held_out"]), found["seconds"])


def learned(curve: Curve, seconds: Sequence[float]) -> Learned:
    """What a held-out curve amounts to; `seconds` to each of its versions."""
    points = zip(*curve, seconds, strict=True)
    steps, reached_s = next(((v, s) for v, mean, s in points if mean >= GOAL), (None, None))
    return Learned(curve.values[-1], steps, reached_s, curve.worst_drop)


def kinds(algorithms: Sequence[str], staleness: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    """The names of what is measured, with the keys that make it."""
    for name in algorithms:
        yield name, [f"learner.{key}" for key in ALGORITHMS[name]]
    for bound in staleness:
        yield f"staleness {bound}", [f"asynchrony.max_staleness={bound}"]


def line(name: str, runs: Sequence[Learned]) -> str:
    """The seeds of one kind as one line: the worst and the mean of what is reached, the median way there."""
    finals = [run.held_out for run in runs]
    there = [run for run in runs if run.steps_to_goal is not None]
    steps = f"{median(run.steps_to_goal or 0 for run in there):g}" if there else "-"
    seconds = f"{median(run.seconds_to_goal or 0.0 for run in there):.1f}" if there else "-"
    drop = max(run.worst_drop for run in runs)
    mean = sum(finals) / len(finals)
    return f"{name:14} {mean:8.3f} {min(finals):8.3f} {len(there)}/{len(runs):<6} {steps:>6} {seconds:>8} {drop:10.3f}"


def figures(runs: Sequence[Learned]) -> dict[str, list[float | int | None]]:
    """One value for each seed."""
    return {
        name: [getattr(run, name) and round(getattr(run, name), 4) for run in runs]
        for name in Learned._fields
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/arithmetic.toml"))
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS), help="by comma; or none")
    parser.add_argument("--staleness", default=",".join(map(str, STALENESS)), help="or none")
    parser.add_argument("--trl", action="store_true", help="and TRL's GRPOTrainer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--quick", action="store_true", help="one seed, two tiny steps")
    options = parser.parse_args()
    algorithms = [name for name in options.algorithms.split(",") if name not in ("", "none")]
    if unknown := set(algorithms) - set(ALGORITHMS):
        parser.error(f"--algorithms: {min(unknown)}: there are {', '.join(ALGORITHMS)}")
    staleness = [int(bound) for bound in options.staleness.split(",") if bound not in ("", "none")]
    recipe = load_recipe(options.recipe)
    if options.trl and recipe.policy.model != "recipes.arithmetic:model":
        parser.error(
            f"--trl: its peer speaks as recipes/arithmetic.toml does, not {options.recipe}"
        )
    steps = 2 if options.quick else options.steps or recipe.learner.steps
    keys = {"learner.steps": steps, "evaluation.every_steps": min(steps, EVALUATED_STEPS)}
    keys |= QUICK if options.quick else {}
    recipe = with_overrides(recipe, [f"{key}={value}" for key, value in keys.items()])
    print(
        f"{'':14} {'held out':>8} {'worst':>8} {'to 0.9':8} {'steps':>6} {'seconds':>8} {'worst drop':>10}"
    )
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        recipes = []
        for seed in range(1 if options.quick else options.seeds):
            seeded, folder = with_overrides(recipe, [f"seed={seed}"]), Path(name, str(seed))
            uvloop.run(warm_up(seeded, folder))
            warmed = [f"policy.model={folder}", "cold_start.steps=0"]
            recipes.append(with_overrides(seeded, warmed))
        for kind, overrides in kinds(algorithms, staleness):
            runs = [uvloop.run(measure(with_overrides(each, overrides))) for each in recipes]
            print(line(kind, runs), flush=True)
            found[kind] = figures(runs)
        for kind, flags in PEERS.items() if options.trl else ():
            runs = [measure_trl(each, *flags) for each in recipes]
            print(line(kind, runs), flush=True)
            found[kind] = figures(runs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
