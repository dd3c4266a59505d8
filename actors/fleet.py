"""Who is alive, by their heartbeats."""

import time
from contextlib import suppress

from bus import subjects
from bus.codec import decode
from bus.connection import Bus, Message
from bus.errors import BadMessage
from schemas.messages import Heartbeat

HEARD_S = 3.0
"""A replica not heard of for so long counts as gone."""


class Fleet:
    """Listens to heartbeats."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[Heartbeat, float]] = {}

    async def hear(self, bus: Bus, run: str) -> None:
        """Listen for as long as the connection lives."""

        async def on_beat(message: Message) -> None:
            with suppress(BadMessage):
                beat: Heartbeat = decode(message.data, Heartbeat, message.subject)
                if beat.run == run:
                    self._beats[beat.replica] = (beat, time.monotonic())

        await bus.subscribe(subjects.heartbeat(), on_beat)

    def alive(self) -> list[Heartbeat]:
        """The last sign of each replica that was heard of lately."""
        now = time.monotonic()
        self._beats = {
            name: (beat, heard)
            for name, (beat, heard) in self._beats.items()
            if now - heard < HEARD_S
        }
        return [beat for beat, _ in self._beats.values()]
