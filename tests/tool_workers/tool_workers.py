"""What the runs of tests/test_live_tools.py are made of."""

import itertools
import re
from collections.abc import Iterator

from rewards.reward import Run
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.trajectory import Trajectory
from tools.tool import Context

_OBSERVATION = re.compile(r"<\|tool\|>(.*?)<\|end\|>", re.DOTALL)


def script(text: str, _seed: int) -> str:
    """Call a tool of ours, then the one that is served elsewhere, then say what that said."""
    seen = _OBSERVATION.findall(text)
    if not seen:
        return "<echo>a rose is a rose</echo>"
    return f"<word_count>{seen[0]}</word_count>" if len(seen) == 1 else str(seen[1])


def shouting(text: str, _seed: int) -> str:
    """Call `shout`, whether or not there is such a tool, then say what that said."""
    seen = _OBSERVATION.findall(text)
    return str(seen[0]) if seen else "<shout>a rose</shout>"


def rows(_seed: int) -> Iterator[TaskRow]:
    for number in itertools.count():
        message = ChatMessage(role="user", content="1")
        yield TaskRow(id=f"r{number}", public=PublicPart(messages=[message]))


async def echo(_context: Context, text: str) -> str:
    """Say it again."""
    return text


async def says_five(_task: TaskRow, trajectory: Trajectory, _run: Run) -> float:
    return float(trajectory.turn_text == "5")


async def nothing(_task: TaskRow, _trajectory: Trajectory, _run: Run) -> float:
    return 0.0
