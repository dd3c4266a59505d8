"""Makes what tools return fit to be seen by the policy."""

import codecs
import re

from msgspec.structs import replace

from schemas.images import PLACEHOLDER
from tools.tool import Keep, Observation


def shorten(text: str, max_chars: int, keep: Keep = "both") -> str:
    """The text, or the kept parts of it and a marker that says how much was cut.

    The marker comes on top of `max_chars`; an image's placeholder is kept or cut whole.
    `shorten("abcdef", 2)` is `"a\\n[4 characters cut]\\nf"`.
    """
    head, tail = _kept(text, max_chars, keep)
    if head == tail:
        return text
    marker = f"[{tail - head} characters cut]"
    return "\n".join(part for part in (text[:head], marker, text[tail:]) if part)


def shorten_observation(observation: Observation, max_chars: int, keep: Keep) -> Observation:
    """The same of an observation: an image goes with its placeholder."""
    text = observation.text
    head, tail = _kept(text, max_chars, keep)
    first = text.count(PLACEHOLDER, 0, head)
    lost = text.count(PLACEHOLDER, head, tail)
    images = observation.images[:first] + observation.images[first + lost :]
    return replace(observation, text=shorten(text, max_chars, keep), images=images)


def decode_output(output: bytes, *, cut: bool = False) -> str:
    """A program's output as text. `cut`: it was ended somewhere, so half a character at its end is no part of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(output, final=not cut)


def _kept(text: str, max_chars: int, keep: Keep) -> tuple[int, int]:
    """Where the kept head ends and the kept tail begins; the same place if nothing is cut."""
    if len(text) <= max_chars:
        return len(text), len(text)
    head = {"head": max_chars, "both": (max_chars + 1) // 2, "tail": 0}[keep]
    tail = len(text) - (max_chars - head)
    for found in re.finditer(re.escape(PLACEHOLDER), text):
        if found.start() < head < found.end():
            head = found.start()
        if found.start() < tail < found.end():
            tail = found.end()
    return head, tail
