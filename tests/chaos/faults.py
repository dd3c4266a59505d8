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
"""Before the death of a replica, so that it is seen at its work: who keeps dying before that stops the run."""
_STEP_S = 0.6
"""What a step of the learner takes at least: on a quick machine too, two are longer than the pause."""

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
    """No pause before: it may come as soon as the role has started, or at the end, when there is no other chance."""
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
    Point("dispatcher", "bus.log:Log.append_run", "before", early=True, times=1),
    Point("dispatcher", "bus.log:Log.append_run", "after", early=True, times=1),
    Point("recorder", "actors.archive_files:RangeFiles.add", "after"),
    Point("recorder", "actors.archive_files:RangeFiles.finish", "before", early=True),
    Point("recorder", "actors.archive_files:RangeFiles.finish", "after", early=True),
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
    if role == "learner":
        _slow_down()


def _slow_down() -> None:
    from learner.policy import Policy

    train_step = Policy.train_step

    @functools.wraps(train_step)
    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(_STEP_S)
        return train_step(*arguments, **keywords)

    Policy.train_step = slow  # type: ignore[method-assign]


def _arm(point: Point, begun_s: float) -> None:
    module_name, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def fires(when: str, *arguments: Any) -> bool:
        """Asked when it is time to die: what another point on the way killed has not fired."""
        old_enough = point.early or time.monotonic() - begun_s > _PAUSE_S
        return point.when == when and old_enough and point.passes(*arguments) and _claim(point)

    @functools.wraps(original)
    async def asynchronous(*arguments: Any, **keywords: Any) -> Any:
        if fires("before", *arguments):
            _die()
        if fires("during", *arguments):
            asyncio.get_running_loop().call_later(0.02, _die)
        result = await original(*arguments, **keywords)
        if fires("after", *arguments):
            _die()
        return result

    @functools.wraps(original)
    def synchronous(*arguments: Any, **keywords: Any) -> Any:
        if fires("before", *arguments):
            _die()
        result = original(*arguments, **keywords)
        if fires("after", *arguments):
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
