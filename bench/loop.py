"""What independent processes cost: the same recipe in one process and as the real system, side by side.

The peer samples and learns in turns, and its tool is a multiplication in place; the system samples while it learns,
runs each call in a sandbox, logs every hop, and evaluates version 0 meanwhile. Rates are of training trajectories in
the reinforcement-learning phase: from the first admission to the last step.

    python -m bench.loop [--recipe PATH] [--seed N] [--steps N]
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import uvloop
from msgspec import structs

from actors.learner import NAME
from actors.recipe import load_recipe
from bench import single_process
from bench.running import RUN, start_run
from bus import subjects
from bus.log import Log
from schemas.events import Admitted, Evaluated, Filtered, Step, Stepped
from schemas.recipe import Recipe


class Measured(NamedTuple):
    """One run of the real system."""

    seconds: float
    """From the command to its end."""
    rl_s: float
    trajectories: int
    """Trained or filtered."""
    rewards: list[float]
    """By steps."""
    held_out: float
    """Of the last version evaluated."""
    cpu_s: dict[str, float]
    """Of the reinforcement-learning phase, by process."""


async def measure(recipe: Recipe) -> Measured:
    """The recipe as `actors train` runs it."""
    begun = time.perf_counter()
    async with start_run(recipe) as run:
        admitted = await run.count(subjects.trajectory(RUN, "*", "admitted"))
        stepped = await run.count(subjects.learner(RUN, NAME, "stepped"))
        await run.until(admitted.at(1))
        cpu_before_s = run.cpu_s()
        await run.until(stepped.at(recipe.learner.steps))
        cpu_after_s = run.cpu_s()
        await run.over()
        seconds = time.perf_counter() - begun
        used_s = {name: cpu_after_s[name] - cpu_before_s.get(name, 0.0) for name in cpu_after_s}
        return await read_run(run.log, seconds, used_s)


async def read_run(log: Log, seconds: float, cpu_s: dict[str, float]) -> Measured:
    """Fold the log of a run that has ended."""
    begun_s = ended_s = 0.0
    trajectories = 0
    rewards: list[float] = []
    held_out: dict[str, list[float]] = {}
    async for stored in log.read():
        event = stored.event
        if isinstance(event, Admitted) and event.purpose == "train":
            begun_s = begun_s or stored.time_s
        elif isinstance(event, Step | Filtered):
            trajectories += len(event.trajectories)
        elif isinstance(event, Stepped):
            rewards.append(event.metrics["reward_mean"])
            ended_s = stored.time_s
        elif isinstance(event, Evaluated):
            version = event.trajectory.partition("x")[0]
            held_out.setdefault(version, []).append(event.reward)
    last = list(held_out.values())[-1] if held_out else [0.0]
    return Measured(seconds, ended_s - begun_s, trajectories, rewards, sum(last) / len(last), cpu_s)


def figures_of(measured: Measured) -> dict[str, float]:
    """By the names that bench.single_process gives them."""
    last = measured.rewards[-5:]
    return {
        "seconds": round(measured.seconds, 2),
        "rl_s": round(measured.rl_s, 2),
        "trajectories_per_s": round(measured.trajectories / measured.rl_s, 1),
        "reward_first": round(measured.rewards[0], 3),
        "reward_last5": round(sum(last) / len(last), 3),
        "held_out": round(measured.held_out, 3),
    }


def compare(peer: dict[str, float], measured: Measured) -> dict[str, object]:
    """Print both, and return what the last line holds."""
    figures = figures_of(measured)
    print(f"{'':20} {'one process':>12} {'actors':>8}")
    for name, figure in figures.items():
        print(f"{name:20} {peer[name]:12g} {figure:8g}")
    print("CPU ms per trajectory, by process")
    cpu_ms = {
        process: round(1e3 * used_s / measured.trajectories, 2)
        for process, used_s in sorted(measured.cpu_s.items(), key=lambda item: -item[1])
    }
    for process, used_ms in cpu_ms.items():
        print(f"{process:20} {used_ms:12.2f}")
    ratio = figures["trajectories_per_s"] / peer["trajectories_per_s"]
    return figures | {
        "ratio_to_single_process": round(ratio, 3),
        "cpu_ms_per_trajectory": cpu_ms,
        "single_process": peer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/arithmetic.toml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--quick", action="store_true", help="3 steps")
    options = parser.parse_args()
    recipe = structs.replace(load_recipe(options.recipe), seed=options.seed)
    steps = 3 if options.quick else options.steps or recipe.learner.steps
    recipe = structs.replace(recipe, learner=structs.replace(recipe.learner, steps=steps))
    peer = single_process.run(recipe, options.seed)
    print(json.dumps(compare(peer, uvloop.run(measure(recipe)))))


if __name__ == "__main__":
    main()
