"""Dead letters: messages that no handler could take, kept with why until an operator has seen to them.

The stream DEAD only grows by `publish_dead` and shrinks by `drop_dead`. A message in it that is no letter is junk:
listed like one, and nobody stumbles over it.
"""

from collections.abc import AsyncIterator
from typing import NamedTuple

import structlog
from msgspec.structs import replace

from bus import store, subjects
from bus.codec import decode, encode
from bus.connection import Bus
from bus.errors import BadMessage, TooLarge
from bus.log import Raw, open_reader
from schemas.messages import DeadLetter

log = structlog.get_logger()

_CUT = 4096
"""Characters of an error, bytes of a payload."""


class Dead(NamedTuple):
    """A message of the stream DEAD."""

    raw: Raw
    letter: DeadLetter | None
    """None for junk."""
    junk: str = ""
    """Why it is no letter."""


async def publish_dead(bus: Bus, letter: DeadLetter) -> None:
    """Put a message aside, with why; one so large that no letter holds it, only as far as it goes."""
    subject = subjects.dead(letter.stage, letter.run)
    try:
        await bus.store(subject, encode(letter))
    except TooLarge:
        error, payload = letter.error[:_CUT], letter.payload[:_CUT]
        await bus.store(subject, encode(replace(letter, error=error, payload=payload)))


def read_dead(raw: Raw) -> Dead:
    """The letter in a stored message, if it is of the stage and run whose subject it has."""
    try:
        letter: DeadLetter = decode(raw.data, DeadLetter, raw.subject)
    except BadMessage as error:
        return Dead(raw, None, error.why)
    if raw.subject != subjects.dead(letter.stage, letter.run):
        return Dead(raw, None, f"holds a letter of {subjects.dead(letter.stage, letter.run)}")
    return Dead(raw, letter)


async def dead_letters(bus: Bus, run: str) -> list[Dead]:
    """All of a run, oldest first. Raises Unavailable."""
    async with open_reader(bus, subjects.DEAD_STREAM) as reader:
        return [read_dead(raw) async for raw in reader.read(subjects.dead("*", run))]


async def follow_dead(bus: Bus, run: str) -> AsyncIterator[list[DeadLetter]]:
    """A run's letters, as they come; junk is skipped with a warning."""
    async with open_reader(bus, subjects.DEAD_STREAM) as reader:
        async for found in reader.follow(subjects.dead("*", run)):
            letters = []
            for dead in map(read_dead, found):
                if dead.letter is None:
                    log.warning("junk among the dead letters", seq=dead.raw.seq, error=dead.junk)
                else:
                    letters.append(dead.letter)
            yield letters


async def drop_dead(bus: Bus, seq: int) -> bool:
    """Delete one message; False when it is not there any more. Raises Unavailable."""
    return await store.delete_message(bus, subjects.DEAD_STREAM, seq)
