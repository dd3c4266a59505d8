"""A run of the real system for a measurement: a nats-server, `actors train` as a process, and its log."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from actors.recipe import to_toml
from bus import subjects
from bus.connection import Bus, Message, connect
from bus.embedded import EmbeddedServer, die_with_parent
from bus.log import Log, open_log
from schemas.events import Stopping
from schemas.recipe import Recipe

RUN = "bench"


class RunDied(Exception):
    """`actors train` ended before it was measured; says what it printed last."""


class Count:
    """Counts messages of the log as they are published, without reading it: an observer that costs little."""

    def __init__(self) -> None:
        self.seen = 0
        self._marks: dict[int, asyncio.Event] = {}

    def at(self, number: int) -> asyncio.Event:
        """Set when so many have been seen."""
        mark = self._marks.setdefault(number, asyncio.Event())
        if self.seen >= number:
            mark.set()
        return mark

    async def on_message(self, _: Message) -> None:
        """One more."""
        self.seen += 1
        if mark := self._marks.get(self.seen):
            mark.set()


class RealRun:
    """A run that was started by `start_run`."""

    def __init__(
        self,
        bus: Bus,
        log: Log,
        server: EmbeddedServer,
        child: asyncio.subprocess.Process,
        folder: Path,
    ) -> None:
        self.folder = folder / "runs" / RUN
        self.log = log
        self.bus = bus
        self.server = server
        self._child = child
        self._output = folder / "output"

    @property
    def output(self) -> str:
        """What `actors train` has printed so far."""
        return self._output.read_text()

    async def count(self, subject: str) -> Count:
        """A count of what is published on a subject from now on."""
        count = Count()
        await self.bus.subscribe(subject, count.on_message)
        return count

    async def until(self, event: asyncio.Event) -> None:
        """Wait for the event. Raises RunDied when the run ends before."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._child.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not event.is_set():
            raise RunDied(self.output[-2000:])

    async def over(self) -> None:
        """Wait for the run's own end. Raises RunDied when it is not a good one."""
        if await self._child.wait() != 0:
            raise RunDied(self.output[-2000:])

    async def stop(self) -> None:
        """Drain and stop it; its log can still be read."""
        if self._child.returncode is None:
            await self.log.append_run(Stopping(replica="bench", reason="measured"))
            await self._child.wait()

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far by process: a role, `sandbox`, `supervisor`, `nats-server`."""
        supervisor = psutil.Process(self._child.pid)
        used: dict[str, float] = defaultdict(float)
        used["supervisor"] = _own_s(supervisor)
        used["nats-server"] = _own_s(psutil.Process(self.server.pid))
        for process in supervisor.children(recursive=True):
            try:
                title = " ".join(process.cmdline()).split()  # none: it has just ended
                if title[:1] == ["actors"]:  # `actors generator bench`, or `actors nursery`
                    used[title[1]] += _own_s(process)
                else:
                    times = process.cpu_times()  # a sandbox's processes are many and short-lived
                    used["sandbox"] += sum(times[:4])
            except psutil.Error:
                continue  # it has just ended
        return used


def _own_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@asynccontextmanager
async def start_run(recipe: Recipe, store: Path | None = None) -> AsyncIterator[RealRun]:
    """`actors train` on the recipe, in a folder that is deleted, for as long as the block runs.

    Module names in the recipe are looked up from the current directory. `store`: the server's folder, if not there too.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "recipe.toml").write_text(to_toml(recipe))
        server = EmbeddedServer(store or folder / "nats", unrestricted=True)
        server.start()
        try:
            async with (
                connect(server.endpoint, "bench") as bus,
                open_log(bus, RUN) as log,
            ):
                child = await _train(folder, server)
                run = RealRun(bus, log, server, child, folder)
                try:
                    yield run
                finally:
                    await run.stop()
        finally:
            server.stop()


async def _train(folder: Path, server: EmbeddedServer) -> asyncio.subprocess.Process:
    server.logins.write(folder / "logins")
    environment = os.environ | {
        "ACTORS_RUNS": str(folder / "runs"),
        "NATS_URL": str(folder / "logins"),
    }
    command = [sys.executable, "-m", "actors", "train", str(folder / "recipe.toml"), "--run", RUN]
    with (folder / "output").open("ab") as file:
        return await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,
        )


def scored() -> str:
    """The subject of training trajectories' last hop."""
    return subjects.trajectory(RUN, "*", "scored")
