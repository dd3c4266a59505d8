"""Starts replicas as processes of their own, restarts them when they die, and stops them in the end.

Children die with the supervisor, however it ends. One that hangs is killed (`watch`), which counts as a death. One
that keeps dying stops the run, with the reason from its log.
"""

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import structlog

from actors.errors import UserError
from actors.fleet import Fleet
from actors.heartbeat import PERIOD_S, STARTING, Vitals, replica_name
from actors.metrics import write_targets
from actors.nursery import Child, Nursery, Order
from actors.ranks import group_of
from actors.replica import LOST_LINK
from actors.roles import slow_imports
from actors.watchdog import SILENT_S, why_hung
from bus import subjects
from bus.codec import encode
from bus.connection import Bus, wait
from bus.errors import Unavailable
from bus.logins import Logins
from schemas.messages import RoleName, Stall
from schemas.recipe import Recipe

log = structlog.get_logger()

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_HEALTHY_S = 30.0
"""A replica that lived so long has started well; its next death begins the back-off anew."""
_CRASHES = 5
"""Deaths in a row, none after `_HEALTHY_S`, before the run is stopped."""
_KILLS = 12
"""The same where the last was by a signal: whoever kills replicas as they start must be more patient than a bug."""
_KILL_AFTER_S = 5.0
"""Beyond the time to drain."""


class CrashLoop(UserError):
    """A replica cannot be kept alive."""


class Supervisor:
    """Keeps a set of replicas alive. `fleet` is heard by `watch`, and by whoever else wants to."""

    def __init__(self, run: str, logins: Logins, logs: Path, recipe: Recipe) -> None:
        self.fleet = Fleet()
        self._run = run
        self._logins = logins
        self._nursery = Nursery(logs / "nursery.log")
        self._logs = logs
        # beside the run's folder: Prometheus takes no `*` for a folder
        for stale in logs.parents[1].glob(f"{run}.*.targets.json"):
            if not psutil.pid_exists(int(stale.name.split(".")[-3])):
                stale.unlink(missing_ok=True)
        self._targets = logs.parents[1] / f"{run}.{os.getpid()}.targets.json"
        self._recipe = recipe
        self._stopping = asyncio.Event()
        self._children: set[Child] = set()

    async def keep(self, role: RoleName, replicas: int) -> None:
        """Keep so many replicas of a role alive until stopped. Raises CrashLoop."""
        self._logs.mkdir(parents=True, exist_ok=True)
        await asyncio.gather(*(self._keep_one(role, index) for index in range(replicas)))

    async def _keep_one(self, role: RoleName, index: int) -> None:
        deaths = 0
        path = self._logs / f"{role}-{os.getpid()}-{index}.log"
        while not self._stopping.is_set():
            begun_s = time.monotonic()
            size = path.stat().st_size if path.exists() else 0
            death = await self._run_once(role, path)
            if death.status == 0 or self._stopping.is_set():
                return
            why = death.why or last_error(path, size)
            if death.status == 2:
                raise CrashLoop(f"{why} (log: {path})")
            if death.status == LOST_LINK and not self.fleet.flows_s(time.monotonic()):
                log.warning("no server; the replica waits for it", role=role, why=why)
                await wait(self._stopping, _BACKOFF_S[-1])
                continue
            healthy = death.served_and_killed or time.monotonic() - begun_s > _HEALTHY_S
            deaths = 1 if healthy else deaths + 1
            if deaths >= (_KILLS if death.from_outside else _CRASHES):
                raise CrashLoop(f"{role} died {deaths} times in a row; last: {why} (log: {path})")
            log.warning("replica died; restarting", role=role, why=why, log=str(path))
            await wait(self._stopping, _BACKOFF_S[min(deaths, len(_BACKOFF_S)) - 1])

    async def _run_once(self, role: RoleName, path: Path) -> "Death":
        order = Order(
            role=role,
            run=self._run,
            endpoint=self._logins.of(role),
            log=str(path),
            imports=slow_imports(role, self._recipe),
            group=group_of(self._recipe.learner) if role == "learner" else None,
        )
        try:
            child = await self._nursery.start(order)
        except ConnectionResetError:  # it was killed; the next order starts another
            return Death(-signal.SIGKILL)
        self._children.add(child)
        try:
            status = await child.wait()
            heard = self.fleet.last(replica_name(role, child.pid), time.monotonic())
            served = heard is not None and heard.beat.phase not in STARTING
            return Death(status, served, child.hung)
        finally:
            self._children.remove(child)

    async def watch(self, bus: Bus) -> None:
        """Hear the children's signs of life, kill those that hang, and tell of silent ones, until stopped."""
        await self.fleet.hear(bus, self._run)
        name = replica_name("supervisor", os.getpid())
        vitals = Vitals(self._run, "supervisor", name, phase="")
        while not self._stopping.is_set():
            now_s = vitals.loop_ran_s = time.monotonic()
            self._kill_hung(now_s)
            vitals.stalls = self._silent(now_s)
            self._write_targets()
            with suppress(Unavailable):
                await bus.publish(subjects.heartbeat("supervisor", name), encode(vitals.beat()))
            await wait(self._stopping, PERIOD_S)

    def _write_targets(self) -> None:
        """Tell Prometheus where to ask."""
        ours = {replica_name(child.role, child.pid) for child in self._children}
        alive = [beat for beat in self.fleet.alive() if beat.replica in ours]
        with suppress(OSError):  # a full disk: the next round may do
            write_targets(self._targets, alive)

    def _kill_hung(self, now_s: float) -> None:
        flows_s = self.fleet.flows_s(now_s)
        for child in self._children:
            heard = self.fleet.last(replica_name(child.role, child.pid), now_s)
            why = why_hung(heard, now_s - child.born_s, flows_s, self._recipe.deadlines)
            if child.hung and now_s - child.killed_s > self._recipe.deadlines.hang_s:
                self._nursery.kill()  # it should have told of the death
            elif why and not child.hung:
                log.warning("replica hangs; killing it", role=child.role, pid=child.pid, why=why)
                child.hung, child.killed_s = f"it hung: {why}", now_s
                child.send_signal(signal.SIGKILL)

    def _silent(self, now_s: float) -> list[Stall]:
        """Children whose process is alive and which are not heard of."""
        stalls = []
        for child in self._children:
            replica = replica_name(child.role, child.pid)
            heard = self.fleet.last(replica, now_s)
            silent_s = min(heard.silent_s, self.fleet.flows_s(now_s)) if heard else 0.0
            if silent_s > SILENT_S:
                detail = f"{replica} is alive and gives no sign of life"
                stalls.append(Stall(kind="silent", subject=replica, detail=detail, for_s=silent_s))
        return stalls

    async def stop(self) -> None:
        """Tell all to drain, wait for them, and kill what is left."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        waits = [asyncio.ensure_future(child.wait()) for child in self._children]
        if waits:
            _, late = await asyncio.wait(
                waits, timeout=self._recipe.deadlines.drain_s + _KILL_AFTER_S
            )
            if late:
                self._signal(signal.SIGKILL)
                await asyncio.wait(late, timeout=_KILL_AFTER_S)
        await self._nursery.close()
        self._write_targets()

    def _signal(self, number: signal.Signals) -> None:
        for child in list(self._children):
            child.send_signal(number)


class Death(NamedTuple):
    """How a replica ended."""

    status: int
    """Its exit status; negative: the signal that killed it."""
    served: bool = False
    """It was seen at its work, past loading and testing."""
    hung: str = ""
    """Why we killed it."""

    @property
    def from_outside(self) -> bool:
        """By a signal that was not ours."""
        return self.status < 0 and not self.hung

    @property
    def served_and_killed(self) -> bool:
        """It says nothing of whether the next will start; a hop that kills its holders is ended by its count."""
        return self.from_outside and self.served

    @property
    def why(self) -> str:
        """The reason, as far as the way it ended tells."""
        if self.from_outside:
            return f"killed by {signal.Signals(-self.status).name}"
        return self.hung


_IN_GROUP = re.compile(r" +\| (?=[A-Za-z_])(?!Traceback|ExceptionGroup|BaseExceptionGroup)(.*)")
"""A line of an exception group's traceback that names an exception."""


_BY_LAUNCHER = re.compile(r"(\S+: )?\[[^]]+\] \[[A-Z]+\] \[\w+\.py:")
"""A line of DeepSpeed's launcher, which tells that a rank has ended and not why."""


def last_error(path: Path, after_byte: int = 0) -> str:
    """The last thing that a replica's log says went wrong."""
    if not path.exists():
        return f"it was never started; see {path.with_name('nursery.log')}"
    text = path.read_bytes()[after_byte:].decode(errors="replace")
    for line in reversed(text.strip().splitlines()[-200:]):
        with suppress(msgspec.DecodeError, TypeError):
            entry = msgspec.json.decode(line, type=dict[str, object])
            if entry.get("level") in ("error", "critical"):
                return str(entry.get("error") or entry.get("event"))
            continue
        if found := _IN_GROUP.fullmatch(line):
            return found[1]
        if _BY_LAUNCHER.match(line):
            continue
        if line and not line.startswith(" "):
            return line
    return "no reason in its log"
