"""Cuts observations that are too long for the policy."""

from typing import Literal


def shorten(text: str, max_chars: int, keep: Literal["start", "both", "end"] = "both") -> str:
    """The text, or the kept parts of it and a marker that says how much was cut.

    The marker comes on top of `max_chars`. `shorten("abcdef", 2)` is `"a\\n[4 characters cut]\\nf"`.
    """
    cut_chars = len(text) - max_chars
    if cut_chars <= 0:
        return text
    head = {"start": max_chars, "both": (max_chars + 1) // 2, "end": 0}[keep]
    tail = max_chars - head
    marker = f"[{cut_chars} characters cut]"
    parts = [text[:head], marker, text[len(text) - tail :]]
    return "\n".join(part for part in parts if part)
