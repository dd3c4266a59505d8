"""What asynchrony brings: trajectories/s of the real system, each trajectory at its own pace or in lockstep.

The same processes, engine, replicas, tasks and number in flight twice: as they are, and with
`asynchrony.barriers`: the next stage of a batch begins when its last trajectory has ended the stage before, the next
batch when the last group of this one is filtered. Policy and tool only wait, so the bounds are known:

    synchronous    Σ over a batch's stages of its slowest trajectory's time there
    asynchronous   Σ over trajectories of their time / number in flight

Few are in flight, so that processors are no limit on a small machine: what is compared is waiting.
A slot of the asynchronous mode is freed by a group, not by a trajectory: its bound with whole groups (the time of
the slower member counts twice) is printed beside.

    python -m bench.async_rollout [--quick] [--in-flight N] [--window-s S] [--workloads NAME …]
"""

import argparse
import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import uvloop

from bench import workload
from bench.running import scored, start_run
from bus.log import Log
from schemas.events import Scored, Turn
from schemas.recipe import (
    Asynchrony,
    Data,
    Generator,
    Learner,
    Policy,
    Recipe,
    Scorer,
    Toolbox,
    Tools,
)
from schemas.trajectory import TrajectoryId

WORKLOADS = ("0ms", "50ms", "500ms", "heavy_tail")
GROUP_SIZE = 2
PUBLISHED = "VerlTool publishes 1.32 to 1.97 for asynchronous against synchronous rollout"


def recipe_of(name: str, in_flight: int, *, barriers: bool) -> Recipe:
    """A run whose groups are filtered as they complete, so that it goes on until it is stopped."""
    return Recipe(
        name="async-rollout",
        policy=Policy(
            model="recipes.arithmetic:model",
            max_turns=workload.CALLS + 1,
            max_turn_tokens=16,
            max_tokens=256,
        ),
        data=Data(rows=f"bench.workload:rows_{name}"),
        tools=Tools(use=["bench.workload:wait"], tags={"wait": workload.TAG}, tier="unsafe"),
        learner=Learner(steps=1, groups_per_step=in_flight // GROUP_SIZE, group_size=GROUP_SIZE),
        asynchrony=Asynchrony(max_staleness=0, barriers=barriers),
        generator=Generator(engine="scripted", script="bench.workload:script", slots=in_flight),
        toolbox=Toolbox(slots=in_flight),
        scorer=Scorer(reward="bench.workload:nothing", slots=in_flight),
    )


# -- what was measured, from the log ---------------------------------------------------------------


@dataclass
class Waited:
    """One trajectory: how long each of its stages was meant to take, and when it was scored."""

    stages_s: list[float] = field(default_factory=list)
    """Engine and tool by turns."""
    scored_s: float = 0.0


class Rate(NamedTuple):
    """One run, from the last trajectory of its warm-up to the last one counted."""

    trajectories: int
    seconds: float
    work_s: float
    """Σ over trajectories of all their stages."""
    group_work_s: float
    """The same, had each taken as long as the slowest of its group."""
    lockstep_s: float
    """Σ over batches and stages of the slowest."""

    @property
    def per_s(self) -> float:
        return self.trajectories / self.seconds


async def read_rate(log: Log, in_flight: int, warm_up: int, counted: int) -> Rate:
    """Fold the log of a run that was stopped."""
    known: dict[str, Waited] = defaultdict(Waited)
    done: list[str] = []
    async for stored in log.read():
        event = stored.event
        if isinstance(event, Turn):
            stages = known[event.trajectory].stages_s
            stages.append(event.tokens.sampled_count * workload.script.seconds_per_token)
            stages += [int(call.arguments["milliseconds"]) / 1e3 for call in event.calls]
        elif isinstance(event, Scored):
            known[event.trajectory].scored_s = stored.time_s
            done.append(event.trajectory)
    begun_s = known[done[warm_up - 1]].scored_s
    window = done[warm_up : warm_up + counted]
    groups: dict[str, float] = defaultdict(float)
    for name in window:
        group = TrajectoryId.parse(name).group
        groups[group] = max(groups[group], sum(known[name].stages_s))
    return Rate(
        trajectories=counted,
        seconds=known[window[-1]].scored_s - begun_s,
        work_s=sum(sum(known[name].stages_s) for name in window),
        group_work_s=sum(groups[TrajectoryId.parse(name).group] for name in window),
        lockstep_s=sum(
            lockstep_s([known[name].stages_s for name in window[first : first + in_flight]])
            for first in range(0, counted, in_flight)
        ),
    )


def lockstep_s(batch: Sequence[Sequence[float]]) -> float:
    """How long a batch takes at least, with a barrier after each stage."""
    return sum(max(stage_s) for stage_s in zip_longest(*batch, fillvalue=0.0))


# -- the runs --------------------------------------------------------------------------------------


async def measure(name: str, in_flight: int, window_s: float, *, barriers: bool) -> Rate:
    """One mode: a warm-up, then whole batches, two at least, for about as long as the window."""
    recipe = recipe_of(name, in_flight, barriers=barriers)
    warm_up = in_flight * (1 if barriers else 4)  # the mix of ages takes longer to settle
    async with start_run(recipe) as run:
        count = await run.count(scored())
        await run.until(count.at(warm_up))
        window = asyncio.create_task(asyncio.sleep(window_s), name="window")
        await run.until(count.at(warm_up + 2 * in_flight))
        await window
        batches = (count.seen - warm_up) // in_flight
        await run.stop()
        return await read_rate(run.log, in_flight, warm_up, batches * in_flight)


def figures_of(name: str, in_flight: int, free: Rate, lockstep: Rate) -> dict[str, float]:
    """One workload's figures, by the names of the last line."""
    return {
        f"async_per_s_{name}": free.per_s,
        f"sync_per_s_{name}": lockstep.per_s,
        f"ratio_{name}": free.per_s / lockstep.per_s,
        f"async_of_bound_{name}": free.work_s / in_flight / free.seconds,
        f"async_of_group_bound_{name}": free.group_work_s / in_flight / free.seconds,
        f"sync_of_bound_{name}": lockstep.lockstep_s / lockstep.seconds,
    }


async def run(names: Sequence[str], in_flight: int, window_s: float) -> dict[str, float]:
    """Each workload in both modes, one after the other."""
    print(f"{in_flight} trajectories in flight, groups of {GROUP_SIZE}; of bound: 1 is the limit")
    print("tool latency   async/s   sync/s   ratio   async of bound   with groups   sync of bound")
    figures: dict[str, float] = {}
    for name in names:
        free = await measure(name, in_flight, window_s, barriers=False)
        lockstep = await measure(name, in_flight, window_s, barriers=True)
        row = figures_of(name, in_flight, free, lockstep)
        figures |= row
        per_s, sync_per_s, ratio, of_bound, of_group_bound, sync_of_bound = row.values()
        print(
            f"{name:<13} {per_s:8.1f} {sync_per_s:8.1f} {ratio:7.2f} {of_bound:16.2f} "
            f"{of_group_bound:13.2f} {sync_of_bound:15.2f}",
            flush=True,
        )
    print(PUBLISHED)
    for short, name in (("ratio", "ratio_heavy_tail"), ("of_bound", "async_of_bound_heavy_tail")):
        if name in figures:
            figures[f"heavy_tail_{short}"] = figures[name]
    return {name: round(figure, 3) for name, figure in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two batches of each")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--window-s", type=float, default=20.0)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    options = parser.parse_args()
    window_s = 0.0 if options.quick else options.window_s
    print(json.dumps(uvloop.run(run(options.workloads, options.in_flight, window_s))))


if __name__ == "__main__":
    main()
