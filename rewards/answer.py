"""Finds the final answer in a turn's text."""

import re

from schemas.trajectory import Trajectory

_OPENING, _CLOSING = "<answer>", "</answer>"
_BRACE = re.compile(r"(?:\\boxed)?\{|\}")


def finished_answer(trajectory: Trajectory) -> str | None:
    """What the last turn handed in by calling `finish`."""
    calls = trajectory.turns[-1].calls if trajectory.turns else []
    answers = [call.arguments.get("answer") for call in calls if call.tool == "finish"]
    return str(answers[-1]).strip() if answers else None


def tagged_answer(text: str) -> str | None:
    """What is inside the last `<answer>…</answer>`."""
    # forwards, as they are read; each character is looked at once, however many tags are never closed
    found, end = None, 0
    while (begun := text.find(_OPENING, end)) >= 0 and (closing := text.find(_CLOSING, begun)) >= 0:
        found, end = text[begun + len(_OPENING) : closing], closing
    return None if found is None else found.strip()


def boxed_answer(text: str) -> str | None:
    r"""What is inside the last complete `\boxed{…}`; braces may nest."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            begun, boxed = opened.pop()
            if boxed and (last is None or begun > last[0]):
                last = (begun, brace.start())
    return text[slice(*last)].strip() if last else None
