"""Who is alive, by their heartbeats."""

import time
from contextlib import suppress
from typing import NamedTuple

from actors.metrics import HEARTBEATS
from bus import subjects
from bus.codec import decode
from bus.connection import Bus, Message
from bus.errors import BadMessage
from schemas.messages import Heartbeat

HEARD_S = 3.0
"""A replica not heard of for so long counts as gone."""

_REMEMBERED_S = 600.0


class Heard(NamedTuple):
    """The last sign of life of a replica, and how long ago it was."""

    beat: Heartbeat
    silent_s: float


class Fleet:
    """Listens to heartbeats."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[Heartbeat, float]] = {}
        self._flows_since_s = self._last_s = time.monotonic()

    async def hear(self, bus: Bus, run: str) -> None:
        """Listen for as long as the connection lives."""

        async def on_beat(message: Message) -> None:
            with suppress(BadMessage):
                beat: Heartbeat = decode(message.data, Heartbeat, message.subject)
                said = subjects.heartbeat(beat.role, beat.replica)
                if beat.run == run and message.subject == said:
                    self.take(beat, time.monotonic())

        await bus.subscribe(subjects.heartbeat(), on_beat)

    def take(self, beat: Heartbeat, now_s: float) -> None:
        """A sign of life came."""
        if now_s - self._last_s > HEARD_S:
            self._flows_since_s = now_s
        self._last_s = now_s
        self._beats[beat.replica] = (beat, now_s)
        HEARTBEATS.labels(beat.role).inc()

    def flows_s(self, now_s: float) -> float:
        """For how long heartbeats have come without a gap: only then is a replica's silence its own.

        0 while none come: the server or our link to it is down, or this process was stopped itself. Whoever
        gives signs of life hears its own among them.
        """
        return now_s - self._flows_since_s if now_s - self._last_s < HEARD_S else 0.0

    def heard(self, now_s: float) -> list[Heard]:
        """The last sign of each replica that ever gave one, also of those that are gone."""
        self._beats = {
            name: (beat, at)
            for name, (beat, at) in self._beats.items()
            if now_s - at < _REMEMBERED_S
        }
        return [Heard(beat, now_s - at) for beat, at in self._beats.values()]

    def last(self, replica: str, now_s: float) -> Heard | None:
        """The last sign of one."""
        beat, at = self._beats.get(replica, (None, 0.0))
        return Heard(beat, now_s - at) if beat else None

    def alive(self) -> list[Heartbeat]:
        """The last sign of each replica that was heard of lately."""
        return [beat for beat, silent_s in self.heard(time.monotonic()) if silent_s < HEARD_S]
