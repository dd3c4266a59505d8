"""Kills a replica at a chosen point of its work: between a commit and its acknowledgement, in a checkpoint,
while a tool call is held. A replica loads it when `ACTORS_FAULTS=faults:arm` is in its environment.

Each point fires its number of times in a run, however many processes pass it: who makes the marker file may die. A
point that never fires is a hole in the suite, and the suite fails.
"""

import asyncio
import functools
import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

MARKERS_VARIABLE = "CHAOS_MARKERS"
"""A folder; `<point>.<n>` in it says that the point has fired for the n-th time."""

_PAUSE_S = 1.0
"""Between two deaths of one role, so that it lives long enough to reach the points of later work."""

Passes = Callable[..., bool]


def _always(*_: Any) -> bool:
    return True


def _event(*kinds: str) -> Passes:
    return lambda _log, *arguments: any(getattr(a, "kind", "") in kinds for a in arguments)


class Point(NamedTuple):
    """Where a role dies."""

    role: str
    target: str
    """`module:Class.method` or `module:function`."""
    when: Literal["before", "during", "after"]
    """`during`: 20 ms into it."""
    passes: Passes = _always
    """Whether a call of the target, by its arguments, is the one meant."""
    early: bool = False
    """It may come soon after the role has started: no pause before."""
    times: int = 2

    @property
    def name(self) -> str:
        """For people and for the marker's file."""
        kind = f"-{id_of(self.passes)}" if self.passes is not _always else ""
        return f"{self.role}-{self.when}-{self.target.replace(':', '.')}{kind}"


def id_of(passes: Passes) -> str:
    """What distinguishes two points on one target: the kinds of event it is for."""
    cells = passes.__closure__ or ()
    return "-".join(kind for cell in cells for kind in cell.cell_contents)


def _hop(role: str, handler: str, kinds: tuple[str, ...]) -> list[Point]:
    """The three states of a hop: at work, committed and not passed on, passed on and not acknowledged."""
    return [
        Point(role, handler, "during"),
        Point(role, "bus.log:Log.append", "after", _event(*kinds)),
        Point(role, "bus.work:Delivery.done", "before"),
    ]


POINTS = (
    *_hop("generator", "actors.generator:Generator.handle", ("turn",)),
    *_hop("toolbox", "actors.toolbox:Toolbox.handle", ("result",)),
    *_hop("scorer", "actors.scorer:Scorer.handle", ("scored",)),
    Point("generator", "bus.policy:load_weights", "during"),
    Point("dispatcher", "bus.private:put_private", "after"),
    Point("dispatcher", "bus.log:Log.append", "after", _event("admitted")),
    Point("dispatcher", "bus.lease:Lease.acquire", "after", early=True),
    Point("dispatcher", "bus.log:Log.append_run", "before", times=1),
    Point("dispatcher", "bus.log:Log.append_run", "after", times=1),
    Point("recorder", "actors.archive_files:RangeFiles.add", "after"),
    Point("recorder", "actors.archive_files:RangeFiles.finish", "before"),
    Point("recorder", "actors.archive_files:RangeFiles.finish", "after"),
    Point("learner", "bus.log:Log.append_learner", "after", _event("step")),
    Point("learner", "bus.log:Log.append_learner", "after", _event("stepped")),
    Point("learner", "bus.log:Log.append_learner", "after", _event("filtered")),
    Point("learner", "learner.policy:Policy.train_step", "after"),
    Point("learner", "bus.store:put_object", "during"),
    Point("learner", "bus.store:put", "before"),
    Point("learner", "learner.checkpoints:_sync_folder", "before"),
    Point("learner", "learner.checkpoints:write_folder", "after"),
    Point("learner", "learner.checkpoints:prune_checkpoints", "after"),
    Point("learner", "learner.policy:Policy.export", "before", early=True),
    Point("learner", "actors.learner:Planner._complete", "after"),
)


def arm(role: str) -> None:
    """Put the points of a role in place. An unknown target is an error: it would never fire."""
    begun_s = time.monotonic()
    for point in POINTS:
        if point.role == role:
            _arm(point, begun_s)


def _arm(point: Point, begun_s: float) -> None:
    module_name, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def dies(*arguments: Any) -> bool:
        old_enough = point.early or time.monotonic() - begun_s > _PAUSE_S
        return old_enough and point.passes(*arguments) and _claim(point)

    @functools.wraps(original)
    async def asynchronous(*arguments: Any, **keywords: Any) -> Any:
        fires = dies(*arguments)
        if fires and point.when == "before":
            _die()
        if fires and point.when == "during":
            asyncio.get_running_loop().call_later(0.02, _die)
        result = await original(*arguments, **keywords)
        if fires:
            _die()
        return result

    @functools.wraps(original)
    def synchronous(*arguments: Any, **keywords: Any) -> Any:
        fires = dies(*arguments)
        if fires and point.when == "before":
            _die()
        result = original(*arguments, **keywords)
        if fires:
            _die()
        return result

    is_async = asyncio.iscoroutinefunction(original)
    setattr(owner, name, asynchronous if is_async else synchronous)


def _claim(point: Point) -> bool:
    """Whether it is this process that dies here: the marker is made by one alone."""
    folder = Path(os.environ[MARKERS_VARIABLE])
    for number in range(point.times):
        try:
            (folder / f"{point.name}.{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
