"""The reward `exact`: 1 if the final answer equals the expected one, else 0. Private part: `{"answer": …}`."""

import re
from decimal import Decimal

from rewards.answer import boxed_answer, finished_answer, tagged_answer
from rewards.errors import BadTask
from rewards.reward import Reward, Run
from schemas.task import TaskRow
from schemas.trajectory import Trajectory

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:(?<=[0-9])(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?<![\w.])[-+]?{_DIGITS}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?")


async def exact(task: TaskRow, trajectory: Trajectory, _run: Run) -> Reward:
    r"""Compare what `finish` was called with, or the last turn's answer.

    That is in `<answer>…</answer>`, else in `\boxed{…}`, else the last number or the text.

    Numbers are equal by value (1,234.0 and 1234). The part `answered` says whether there was an answer at all.
    """
    if "answer" not in task.private:
        raise BadTask("no_answer", f"the private part of {task.id} has no `answer`")
    expected = str(task.private["answer"])
    given = finished_answer(trajectory)
    if given is None and trajectory.turns:
        given = final_answer(trajectory.turn_text, expected)
    correct = given is not None and is_same(given, expected)
    return Reward(value=float(correct), parts={"answered": float(given is not None)})


def final_answer(text: str, expected: str) -> str | None:
    """The answer to compare with `expected`, which decides between the last number and all of the text."""
    marked = tagged_answer(text)
    if marked is None:
        marked = boxed_answer(text)
    if marked is not None:
        return marked
    if as_number(expected) is None:
        return text.strip() or None
    numbers: list[str] = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1] if numbers else None


def is_same(given: str, expected: str) -> bool:
    """Equal as numbers, or else as text but for white space."""
    number = as_number(expected)
    if number is not None:
        return as_number(given) == number
    return given.split() == expected.split()


def as_number(text: str) -> Decimal | None:
    """The number that the whole text is: `1,234.50`, `-7.`, `$3`, `1e5`; None if it is not one."""
    text = text.strip().replace("\N{MINUS SIGN}", "-").removeprefix("$")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
