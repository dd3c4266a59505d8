"""Signs of life, from a thread with a connection of its own that no torch call can block."""

import asyncio
import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from bus import subjects
from bus.codec import encode
from bus.connection import Endpoint, connect
from bus.errors import BusError
from schemas.messages import Heartbeat, Held, RoleName, Stall

PERIOD_S = 1.0
_HELD_SHOWN = 512
_STALLS_SHOWN = 20

STARTING = frozenset({"starting", "loading the model", "testing the sandbox"})
"""Phases in which libraries and models are loaded, which may block everything for a while."""


def replica_name(role: RoleName, pid: int) -> str:
    """`<role>-<host>-<pid>`, for a process of this machine."""
    # a token of a subject: a host name may have dots
    host = "".join(c if c.isalnum() or c in "-_" else "_" for c in platform.node())
    return f"{role}-{host}-{pid}"


@dataclass
class Vitals:
    """What a replica says of itself; its event loop writes, the heartbeat thread reads."""

    run: str
    role: RoleName
    replica: str
    phase: str = "starting"
    policy_version: int = -1
    held: dict[tuple[str, int], tuple[str, float]] = field(default_factory=dict)
    """Trajectory and its log sequence → stage, and since when (monotonic seconds).

    Infinity: it is not begun, or it is handled and waits for the log.
    """
    stalls: list[Stall] = field(default_factory=list)
    """What it sees stand still, longest first."""
    metrics: str = ""
    """Where it answers Prometheus, as host:port."""
    started_s: float = field(default_factory=time.monotonic)
    loop_ran_s: float = field(default_factory=time.monotonic)
    """When the event loop last ran."""

    def beat(self) -> Heartbeat:
        """The message of this moment."""
        now = time.monotonic()
        held = list(self.held.items())
        return Heartbeat(
            run=self.run,
            role=self.role,
            replica=self.replica,
            host=platform.node(),
            pid=os.getpid(),
            up_s=now - self.started_s,
            phase=self.phase,
            policy_version=self.policy_version,
            held=[
                Held(trajectory=name, stage=stage, for_s=max(0.0, now - since))
                for (name, _), (stage, since) in held[:_HELD_SHOWN]
            ],
            held_count=len(held),
            loop_lag_s=max(0.0, now - self.loop_ran_s),
            rss_bytes=psutil.Process().memory_info().rss,
            stalls=self.stalls[:_STALLS_SHOWN],
            metrics=self.metrics,
        )


class HeartbeatThread:
    """Publishes a replica's vitals each second until stopped."""

    def __init__(self, endpoint: Endpoint, vitals: Vitals) -> None:
        self._endpoint = endpoint
        self._vitals = vitals
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, within a second or so."""
        self._stop.set()
        self._thread.join(5.0)

    def _main(self) -> None:
        while not self._stop.is_set():
            with suppress(BusError):  # no server: the main thread says so; try again
                asyncio.run(self._beat())
            self._stop.wait(PERIOD_S)

    async def _beat(self) -> None:
        async with connect(self._endpoint, f"{self._vitals.replica} heartbeat") as bus:
            subject = subjects.heartbeat(self._vitals.role, self._vitals.replica)
            while not self._stop.is_set() and not bus.closed.is_set():
                await bus.publish(subject, encode(self._vitals.beat()))
                await asyncio.to_thread(self._stop.wait, PERIOD_S)
