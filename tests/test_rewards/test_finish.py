"""An answer that was handed in by calling `finish` is the answer."""

from typing import Any

import pytest

from rewards.answer import finished_answer
from rewards.exact import exact
from schemas.events import Admitted, Call, Turn
from schemas.task import PublicPart, TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold


def finished(text: str, *answers: str) -> Trajectory:
    calls = [Call(tool="finish", arguments={"answer": answer}) for answer in answers]
    public = PublicPart(messages=[])
    admitted = Admitted(trajectory="g0-0-0", task="t", public=public, private_key="k")
    turn = Turn(trajectory="g0-0-0", tokens=Tokens(), text=text, calls=calls, last=True)
    return fold(fold(None, admitted, 1), turn, 2)


async def no_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("runs no code")


@pytest.mark.parametrize(
    ("trajectory", "reward"),
    [
        (finished("I think it is 7.", "4042"), 1.0),
        (finished("It is 4042.", "7"), 0.0),
        (finished("<answer>4042</answer>", " 4,042 "), 1.0),
        (finished("", "7", "4042"), 1.0),
        (finished("It is 4042."), 1.0),
    ],
)
async def test_what_was_handed_in_counts(trajectory: Trajectory, reward: float) -> None:
    """Whatever the text says; the last one; without a call, the text."""
    task = TaskRow(id="t", public=PublicPart(messages=[]), private={"answer": 4042})
    assert (await exact(task, trajectory, no_run)).value == reward


def test_without_turns_nothing_was_handed_in() -> None:
    public = PublicPart(messages=[])
    admitted = Admitted(trajectory="g0-0-0", task="t", public=public, private_key="k")
    assert finished_answer(fold(None, admitted, 1)) is None
