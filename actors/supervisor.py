"""Starts replicas as processes of their own, restarts them when they die, and stops them in the end.

Children die with the supervisor, however it ends. One that keeps dying stops the run, with the reason from its log.
"""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from actors.errors import UserError
from actors.replica import ENDPOINT_VARIABLE
from bus.connection import Endpoint, wait
from bus.embedded import die_with_parent
from schemas.messages import RoleName

log = structlog.get_logger()

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_HEALTHY_S = 30.0
"""A replica that lived so long has started well; its next death begins the back-off anew."""
_CRASHES = 5
"""Deaths in a row, none after `_HEALTHY_S`, before the run is stopped."""
_KILL_AFTER_S = 5.0
"""Beyond the time to drain."""


class CrashLoop(UserError):
    """A replica cannot be kept alive."""


class Supervisor:
    """Keeps a set of replicas alive."""

    def __init__(self, run: str, endpoint: Endpoint, logs: Path, drain_s: float) -> None:
        self._run = run
        self._environment = os.environ | {
            ENDPOINT_VARIABLE: msgspec.json.encode(endpoint).decode(),
            "OMP_NUM_THREADS": "1",  # torch's own setting wins where a recipe gives more
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._logs = logs
        self._drain_s = drain_s
        self._stopping = asyncio.Event()
        self._children: dict[asyncio.subprocess.Process, RoleName] = {}

    async def keep(self, role: RoleName, replicas: int) -> None:
        """Keep so many replicas of a role alive until stopped. Raises CrashLoop."""
        self._logs.mkdir(parents=True, exist_ok=True)
        await asyncio.gather(*(self._keep_one(role, index) for index in range(replicas)))

    async def _keep_one(self, role: RoleName, index: int) -> None:
        deaths = 0
        path = self._logs / f"{role}-{os.getpid()}-{index}.log"
        while not self._stopping.is_set():
            begun = time.monotonic()
            status = await self._run_once(role, path)
            if status == 0 or self._stopping.is_set():
                return
            deaths = 1 if time.monotonic() - begun > _HEALTHY_S else deaths + 1
            if status == 2:
                raise CrashLoop(f"{last_error(path)} (log: {path})")
            if deaths >= _CRASHES:
                raise CrashLoop(f"{role} died {deaths} times: {last_error(path)} (log: {path})")
            log.warning("replica died; restarting", role=role, status=status, log=str(path))
            await wait(self._stopping, _BACKOFF_S[min(deaths, len(_BACKOFF_S)) - 1])

    async def _run_once(self, role: RoleName, path: Path) -> int:
        with path.open("ab") as output:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "actors.replica",
                role,
                self._run,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is ours to handle
                preexec_fn=die_with_parent,
            )
        self._children[child] = role
        try:
            return await child.wait()
        finally:
            del self._children[child]

    async def stop(self) -> None:
        """Tell all to drain, wait for them, and kill what is left."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        waits = [asyncio.ensure_future(child.wait()) for child in self._children]
        if waits:
            _, late = await asyncio.wait(waits, timeout=self._drain_s + _KILL_AFTER_S)
            if late:
                self._signal(signal.SIGKILL)
                await asyncio.wait(late)

    def _signal(self, number: signal.Signals) -> None:
        for child in list(self._children):
            with suppress(ProcessLookupError):
                child.send_signal(number)


def last_error(path: Path) -> str:
    """The last thing that a replica's log says went wrong."""
    lines = path.read_text(errors="replace").strip().splitlines()[-50:]
    for line in reversed(lines):
        with suppress(msgspec.DecodeError, TypeError):
            entry = msgspec.json.decode(line, type=dict[str, object])
            if entry.get("level") in ("error", "critical"):
                return str(entry.get("error") or entry.get("event"))
            continue
        if line and not line.startswith(" "):
            return line
    return "no reason in its log"
