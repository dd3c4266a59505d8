"""Dead letters: messages that no handler could take, kept with why until an operator has seen to them.

The stream DEAD only grows by `publish_dead` and shrinks by `drop_dead`. A message in it that is no letter is junk:
listed like one, and nobody stumbles over it.
"""

from collections.abc import AsyncIterator
from typing import NamedTuple

import structlog

from bus import store, subjects
from bus.codec import decode, encode
from bus.connection import Bus
from bus.errors import BadMessage
from bus.log import Raw, open_reader
from schemas.messages import DeadLetter

log = structlog.get_logger()


class Dead(NamedTuple):
    """A message of the stream DEAD."""

    raw: Raw
    letter: DeadLetter | None
    """None for junk."""
    junk: str = ""
    """Why it is no letter."""


async def publish_dead(bus: Bus, letter: DeadLetter) -> None:
    """Put a message aside, with why."""
    await bus.store(subjects.dead(letter.stage, letter.run), encode(letter))


def read_dead(raw: Raw) -> Dead:
    """The letter in a stored message."""
    try:
        return Dead(raw, decode(raw.data, DeadLetter, raw.subject))
    except BadMessage as error:
        return Dead(raw, None, error.why)


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
