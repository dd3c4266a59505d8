"""What killing costs: the arithmetic recipe calm and then in a storm, with the same processes on the same machine.

In the storm a replica dies by SIGKILL every `--kill-every-s` on average, the learner at most every
`--learner-every-s`, and nats-server every `--server-every-s`. Rates are of trajectories trained or filtered, from the
first step on.

    python -m bench.chaos [--minutes 5] [--seed N]
"""

import argparse
import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import uvloop
from msgspec import structs

from actors.learner import NAME
from actors.recipe import load_recipe
from actors.rules import Report
from actors.verify import audit, report_text
from bench.running import RUN, RealRun, start_run
from bench.storm import Storm
from bus import subjects
from schemas.events import Filtered, Step, Stepped
from schemas.recipe import Recipe

_STEPS = 1_000_000
"""More than there is time for: the clock ends the run."""


class Measured(NamedTuple):
    """One run, from its first step to its end."""

    trajectories_per_s: float
    rewards: list[float]
    """By steps."""
    report: Report


async def measure(recipe: Recipe, minutes: float, storm: Storm | None, server_s: float) -> Measured:
    """Train for some minutes after the first step, in a storm if there is one, and settle the accounts."""
    async with start_run(recipe) as run:
        stepped = await run.count(subjects.learner(RUN, NAME, "stepped"))
        await run.until(stepped.at(1))
        async with AsyncExitStack() as stack:
            if storm is not None:
                group = await stack.enter_async_context(asyncio.TaskGroup())
                tasks = [
                    group.create_task(storm.rage(run.bus)),
                    group.create_task(storm.rage_at(run.server, server_s)),
                ]
            over = asyncio.Event()
            asyncio.get_running_loop().call_later(60 * minutes, over.set)
            await run.until(over)
            if storm is not None:
                for task in tasks:
                    task.cancel()
        await run.stop()
        return await _settle(run)


async def _settle(run: RealRun) -> Measured:
    begun_s = ended_s = 0.0
    trajectories = 0
    rewards: list[float] = []
    async for stored in run.log.read(subjects.learner(RUN, NAME)):
        event = stored.event
        if isinstance(event, Stepped):
            rewards.append(event.metrics["reward_mean"])
            begun_s = begun_s or stored.time_s
            ended_s = stored.time_s
        elif begun_s and isinstance(event, Step | Filtered):
            trajectories += len(event.trajectories)
    rate = trajectories / (ended_s - begun_s)
    return Measured(rate, rewards, await audit(run.bus, RUN))


def figures_of(calm: Measured, stormy: Measured, storm: Storm) -> dict[str, object]:
    """Print both, and return what the last line holds."""
    report = stormy.report
    print(report_text(report))
    for what, count in sorted(storm.kills.items()):
        print(f"{what:28} killed {count} times")
    ratio = stormy.trajectories_per_s / calm.trajectories_per_s
    print(f"{'':20} {'calm':>8} {'storm':>8}")
    print(f"{'trajectories/s':20} {calm.trajectories_per_s:8.1f} {stormy.trajectories_per_s:8.1f}")
    print(f"{'steps':20} {len(calm.rewards):8} {len(stormy.rewards):8}")
    broken = report.broken
    last = stormy.rewards[-5:]
    return {
        "lost": sum(len(ids) for rule, ids in broken.items() if rule != "trained_twice"),
        "trained_twice": len(broken.get("trained_twice", [])),
        "kills": storm.kills.total(),
        "server_kills": storm.server_kills,
        "throughput_ratio": round(ratio, 3),
        "reward_first": round(stormy.rewards[0], 3),
        "reward_last": round(sum(last) / len(last), 3),
        "failed_by_cause": report.failed_by_cause,
        "calm_trajectories_per_s": round(calm.trajectories_per_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/arithmetic.toml"))
    parser.add_argument("--minutes", type=float, default=5.0, help="of storm")
    parser.add_argument("--calm-minutes", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every-s", type=float, default=2.0)
    parser.add_argument("--learner-every-s", type=float, default=30.0)
    parser.add_argument("--server-every-s", type=float, default=20.0)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    recipe = structs.replace(
        recipe,
        seed=options.seed,
        learner=structs.replace(recipe.learner, steps=_STEPS),
        replicas=structs.replace(recipe.replicas, recorder=1),
    )
    storm = Storm(
        RUN,
        options.seed,
        every_s=options.kill_every_s,
        learner_every_s=options.learner_every_s,
    )
    calm = uvloop.run(measure(recipe, options.calm_minutes, None, 0.0))
    stormy = uvloop.run(measure(recipe, options.minutes, storm, options.server_every_s))
    print(json.dumps(figures_of(calm, stormy, storm)))


if __name__ == "__main__":
    main()
