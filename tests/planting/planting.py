"""What the run of tests/test_secrets.py is made of: answers, and code of a user's that is careless with them."""

import itertools
import os
from collections.abc import Iterator

from rewards.errors import RewardError
from rewards.reward import Run
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.trajectory import Trajectory, TrajectoryId
from tools.tool import Context

ANSWER = "planted-answer-7f3a"
RUBRIC = "planted-rubric-91c2"


def script(text: str, _seed: int) -> str:
    """One call, then an answer."""
    return "1" if "</python>" in text else "<python>0</python>"


def rows(_seed: int) -> Iterator[TaskRow]:
    public = PublicPart(messages=[ChatMessage(role="user", content="1")])
    private = {"answer": ANSWER, "tests": f"assert answer() == '{RUBRIC}'"}
    for number in itertools.count():
        yield TaskRow(id=f"r{number}", public=public, private=private)


async def reads(_context: Context, text: str) -> str:
    """Crash now and then, with a secret of this process in a local variable."""
    key = os.environ["SERPER_API_KEY"]
    if len(key) and text == "crash":
        raise ValueError
    return text


async def quotes(task: TaskRow, trajectory: Trajectory, _run: Run) -> float:
    """The first attempts of some trajectories crash, with the answer in the message and in a local variable."""
    group, member, attempt = TrajectoryId.parse(trajectory.id)
    expected = str(task.private["answer"])
    if attempt == 0 and member == 0 and group in ("g0", "g1"):
        raise ValueError(f"{expected} is not in {task.private['tests']}")
    if attempt == 0 and member == 1 and group == "g0":
        raise RewardError("no_judge", "the judge does not answer") from KeyError(expected)
    return float(member % 2)
