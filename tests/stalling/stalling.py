"""What the runs of tests/test_stalls.py are made of: a policy that calls a tool once, and rewards that may hang."""

import asyncio
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from rewards.reward import Run
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.trajectory import Trajectory, TrajectoryId
from tools.errors import SandboxError
from tools.tool import Context


class Script:
    """What the policy says; see engines/scripted.py."""

    seconds_per_token = 0.02

    def __call__(self, text: str, _seed: int) -> str:
        """One call, then an answer."""
        return "1" if "</python>" in text else "<python>0</python>"


script = Script()


def rows(_seed: int) -> Iterator[TaskRow]:
    number = 0
    while True:
        yield TaskRow(
            id=f"r{number}", public=PublicPart(messages=[ChatMessage(role="user", content="1")])
        )
        number += 1


def broken_rows(seed: int) -> Iterator[TaskRow]:
    """Three of them."""
    yield from itertools.islice(rows(seed), 3)
    raise ValueError("row 3 is no row")


async def echo(_context: Context, text: str) -> str:
    """Say it again."""
    return text


async def by_member(_task: TaskRow, trajectory: Trajectory, _run: Run) -> float:
    """Every group has something to learn from."""
    return float(TrajectoryId.parse(trajectory.id).member % 2)


async def in_its_time(task: TaskRow, trajectory: Trajectory, run: Run) -> float:
    """The same, half a second later: a run of some steps can be met while it is on."""
    await asyncio.sleep(0.5)
    return await by_member(task, trajectory, run)


async def hangs_once(task: TaskRow, trajectory: Trajectory, run: Run) -> float:
    """The first to come waits for ever, and nothing but that: the process looks healthy."""
    marker = Path(os.environ["ACTORS_RUNS"]) / "hung"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return await by_member(task, trajectory, run)
    await asyncio.Event().wait()
    raise AssertionError


# -- a tool that always breaks its sandbox ---------------------------------------------------------


def some_break(_seed: int) -> Iterator[TaskRow]:
    """Every fifth task leads to the tool that breaks."""
    for number in itertools.count():
        content = "break" if number % 5 == 0 else "1"
        message = ChatMessage(role="user", content=content)
        yield TaskRow(id=f"{content}{number}", public=PublicPart(messages=[message]))


def breaking_script(text: str, seed: int) -> str:
    """The call that the task asks for, then an answer."""
    return "<crash>0</crash>" if "break" in text else script(text, seed)


async def crash(_context: Context, text: str) -> str:
    """Never comes back."""
    raise SandboxError("crashed", f"the sandbox is gone, at {text}")
