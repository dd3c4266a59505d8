"""Trajectories that only wait: what a policy, a tool and a reward cost in time, and nothing else.

    <|user|>50<|end|><|assistant|>hm: <python>50</python> … four calls … <|assistant|>hm: 1<|end|>

How long a call takes follows from the task and the turn's seed alone.
"""

import asyncio
import random
import re
from collections.abc import Callable, Iterator

from rewards.reward import Run
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.trajectory import Trajectory
from tools.tool import Context

CALLS = 4
TAG = "python"
"""One token in the vocabulary of recipes.arithmetic: a call is three tokens to six."""
THOUGHT = "hm: "
"""Before each call and the answer, four tokens: a policy's turns are longer than their calls."""

HEAVY_TAIL = "heavy"
"""The task whose calls mostly take `COMMON_MS`, and rarely `RARE_MS`; other tasks are a number of milliseconds."""
COMMON_MS, RARE_MS, RARE_SHARE = 50, 2000, 0.05

_TASK = re.compile(r"<\|user\|>(.*?)<\|end\|>")


class Script:
    """What the policy says; see engines/scripted.py."""

    seconds_per_token = 0.080

    def __call__(self, text: str, seed: int) -> str:
        """`CALLS` calls, one a turn, and then an answer."""
        task = _TASK.search(text)
        assert task is not None, "a trajectory begins with its task"
        if text.count(f"</{TAG}>") == CALLS:
            return f"{THOUGHT}1"
        return f"{THOUGHT}<{TAG}>{latency_ms(task[1], seed)}</{TAG}>"


script = Script()


def latency_ms(task: str, seed: int) -> int:
    """How long the call of a turn takes."""
    if task != HEAVY_TAIL:
        return int(task)
    return RARE_MS if random.Random(seed).random() < RARE_SHARE else COMMON_MS


def _rows(task: str) -> Callable[[int], Iterator[TaskRow]]:
    def rows(_seed: int) -> Iterator[TaskRow]:
        public = PublicPart(messages=[ChatMessage(role="user", content=task)])
        while True:
            yield TaskRow(id=task, public=public)

    return rows


rows_0ms, rows_50ms, rows_500ms, rows_heavy_tail = map(_rows, ("0", "50", "500", HEAVY_TAIL))


async def wait(_context: Context, milliseconds: int) -> str:
    """Take some time."""
    await asyncio.sleep(milliseconds / 1e3)
    return "ok"


async def nothing(_task: TaskRow, _trajectory: Trajectory, _run: Run) -> float:
    """The same for all, so that no group has anything to learn from and its slot is free at once."""
    return 0.0
