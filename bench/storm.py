"""Kills the processes of a live run with SIGKILL, by what they are doing, at random moments of a seeded schedule."""

import asyncio
import os
import random
import signal
import time
from collections import Counter

from actors.fleet import Fleet
from bus.connection import Bus
from bus.embedded import EmbeddedServer
from schemas.messages import Heartbeat, RoleName

ROLES: tuple[RoleName, ...] = (
    "dispatcher", "generator", "toolbox", "scorer", "recorder", "learner",
)  # fmt: skip


class Storm:
    """Replicas of all roles, and the server when asked, until `stop`."""

    def __init__(
        self, run: str, seed: int, *, every_s: float, learner_every_s: float, at_once: int = 1
    ) -> None:
        self._run = run
        self._random = random.Random(seed)
        self._every_s = every_s
        self._learner_every_s = learner_every_s
        self._learner_s = time.monotonic()
        self._at_once = at_once
        self._fleet = Fleet()
        self.kills: Counter[str] = Counter()
        """By role and what it was doing: `generator holding`, `learner step`."""
        self.server_kills = 0

    async def rage(self, bus: Bus) -> None:
        """Kill replicas, one every `every_s` on average, for ever."""
        await self._fleet.hear(bus, self._run)
        while True:
            await asyncio.sleep(self._random.expovariate(1 / (self._every_s * self._at_once)))
            for _ in range(self._at_once):
                self._kill_one()

    async def rage_at(self, server: EmbeddedServer, every_s: float) -> None:
        """Kill the server and start it on its store again, for ever."""
        while True:
            await asyncio.sleep(every_s)
            server.kill()  # and started in one go: whoever cancels the storm needs a server
            server.start()
            self.server_kills += 1

    def _kill_one(self) -> None:
        roles = [role for role in ROLES if self._may_die(role)]
        alive = self._fleet.alive()
        alive = [beat for beat in alive if beat.role in roles]
        if not alive:
            return
        role = self._random.choice(sorted({beat.role for beat in alive}))
        victim = self._random.choice([beat for beat in alive if beat.role == role])
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has died since it last beat
        if role == "learner":
            self._learner_s = time.monotonic()
        self.kills[f"{role} {_doing(victim)}"] += 1

    def _may_die(self, role: RoleName) -> bool:
        return role != "learner" or time.monotonic() - self._learner_s > self._learner_every_s


def _doing(beat: Heartbeat) -> str:
    """In a word."""
    if beat.phase:
        return beat.phase.split()[0]
    return "holding" if beat.held_count else "idle"
