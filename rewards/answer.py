"""Finds the final answer in a turn's text."""

import re

from schemas.trajectory import Trajectory

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = "\\boxed{"


def finished_answer(trajectory: Trajectory) -> str | None:
    """What the last turn handed in by calling `finish`."""
    calls = trajectory.turns[-1].calls if trajectory.turns else []
    answers = [call.arguments.get("answer") for call in calls if call.tool == "finish"]
    return str(answers[-1]).strip() if answers else None


def tagged_answer(text: str) -> str | None:
    """What is inside the last `<answer>…</answer>`."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def boxed_answer(text: str) -> str | None:
    r"""What is inside the last complete `\boxed{…}`; braces may nest."""
    start = text.rfind(_BOXED)
    while start >= 0:
        depth = 0
        for position in range(start + len(_BOXED) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(_BOXED) : position].strip()
        start = text.rfind(_BOXED, 0, start)
    return None
