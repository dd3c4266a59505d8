"""The commands that join, steer and watch a run from another terminal."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import click
from msgspec.structs import replace
from structlog.contextvars import bind_contextvars

from actors.errors import UserError
from actors.fleet import HEARD_S, Fleet
from actors.process import opened, until_over
from actors.run_folder import RUNS, RunFolder, find_live
from actors.supervisor import Supervisor
from actors.views import alive_table, event_json, event_line, stall_lines, trajectory_text
from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.errors import InUse
from bus.log import Log, open_log
from bus.logins import Logins, read_logins
from schemas.events import AnyRunEvent, Ended, Paused, Resumed, Stopping
from schemas.messages import RoleName
from schemas.trajectory import TrajectoryId

STEERING: dict[str, AnyRunEvent] = {
    "pause": Paused(replica="operator"),
    "resume": Resumed(replica="operator"),
    "stop": Stopping(replica="operator", reason="`actors stop`"),
}
_IN_USE_S = 15.0
"""So long may a run that stops, and is not alive any more, take to end its server."""
_LOOK_AGAIN_S = 0.1


def _where(run: str | None, nats_url: str) -> tuple[str, Logins]:
    """The run, and how to be let in at its server. Raises UserError, BadLogin."""
    if not nats_url:
        return find_live(run)
    if run is None:
        raise UserError("--nats, or NATS_URL, needs --run NAME: a server may hold many runs")
    return run, read_logins(nats_url)


class Served(NamedTuple):
    """A run whose server can be reached."""

    run: str
    logins: Logins
    at_rest: bool
    """Nothing more will come."""


@asynccontextmanager
async def serving(run: str | None, nats_url: str) -> AsyncIterator[Served]:
    """A run, live or at rest: for one at rest its server is started on its store for as long.

    Raises UserError, and InUse when another command has started one there.
    """
    if run is not None and not nats_url and RunFolder(run).nats.is_dir():
        server = EmbeddedServer(RunFolder(run).nats)
        if await start_at_rest(server, RunFolder(run)):
            try:
                yield Served(run, server.logins, at_rest=True)
            finally:
                server.stop()
            return
    yield Served(*_where(run, nats_url), at_rest=False)


async def start_at_rest(server: EmbeddedServer, folder: RunFolder) -> bool:
    """Start a run's server once no other is on its store; False when the run is, or becomes, alive.

    Raises InUse when that takes too long.
    """
    end = time.monotonic() + _IN_USE_S
    while not folder.live():
        try:
            server.start()
        except InUse:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(_LOOK_AGAIN_S)
        else:
            return True
    return False


class Reached(NamedTuple):
    """A run, as its operator."""

    bus: Bus
    log: Log
    logins: Logins

    def provisioning(self) -> AbstractAsyncContextManager[Bus]:
        """A connection of the one who may change streams and consumers, and delete what they hold."""
        return connect(self.logins.of("provision"), "operator provisions")


@asynccontextmanager
async def reach(run: str | None, nats_url: str) -> AsyncIterator[tuple[Bus, Log]]:
    """A run's log, live or at rest. Raises UserError."""
    async with reach_all(run, nats_url) as (bus, log, _):
        yield bus, log


@asynccontextmanager
async def reach_all(run: str | None, nats_url: str) -> AsyncIterator[Reached]:
    """The same, with what it takes to delete of it, or to add to its streams."""
    async with (
        serving(run, nats_url) as served,
        connect(served.logins.of("operator"), "operator") as bus,
        open_log(bus, served.run) as log,
    ):
        if not served.at_rest and await opened(log) is None:
            raise UserError(f"no run {served.run!r} at {served.logins.url}")
        yield Reached(bus, log, served.logins)


async def add_replicas(
    role: RoleName, replicas: int, run: str | None, nats_url: str, ranks: int | None = None
) -> int:
    """Keep more replicas of a role alive until interrupted or the run ends.

    `ranks`: of a learner, instead of what the recipe says.
    """
    name, logins = _where(run, nats_url)
    bind_contextvars(run=name, role="supervisor")
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with (
        connect(logins.of("supervisor"), f"supervisor {role}") as bus,
        open_log(bus, name) as log,
    ):
        event = await opened(log)
        if event is None:
            raise UserError(f"no run {name!r} at {logins.url}")
        folder = RunFolder(name)
        home = None if nats_url else folder.live()
        gone = asyncio.Event()
        if home is not None:
            watch_process(home.supervisor_pid, gone)
        recipe = event.recipe
        if ranks is not None:
            recipe = replace(recipe, learner=replace(recipe.learner, ranks=ranks))
        supervisor = Supervisor(name, logins, folder.logs, recipe)
        click.echo(f"{role} x{replicas} joins run {name}; Ctrl-C drains and leaves")
        waits = [
            asyncio.ensure_future(each)
            for each in (
                gone.wait(),
                supervisor.keep(role, replicas),
                supervisor.watch(bus),
                stop.wait(),
                until_over(log),
                bus.closed.wait(),
            )
        ]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await supervisor.stop()
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)
    return 0


def watch_process(pid: int, gone: asyncio.Event) -> None:
    """Set the event when the process ends: a run on this machine is over with its supervisor. Linux only."""
    if sys.platform == "linux":
        loop, descriptor = asyncio.get_running_loop(), os.pidfd_open(pid)

        def end() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            gone.set()

        loop.add_reader(descriptor, end)


async def steer(command: str, run: str, nats_url: str) -> None:
    """Tell a live run to stop, pause or go on."""
    name, logins = _where(run, nats_url)
    async with connect(logins.of("operator"), "operator") as bus, open_log(bus, name) as log:
        if await opened(log) is None:
            raise UserError(f"no run {name!r} at {logins.url}")
        await log.append_run(STEERING[command])
    click.echo(f"told run {name} to {command}")


async def show_alive(run: str | None, nats_url: str) -> None:
    """Listen for as long as a sign of life may take, and print who gave one."""
    name, logins = _where(run, nats_url)
    async with connect(logins.of("operator"), "operator") as bus:
        fleet = Fleet()
        await fleet.hear(bus, name)
        await asyncio.sleep(HEARD_S / 2)
        beats = fleet.alive()
        click.echo(alive_table(name, logins.url, beats))
        for line in stall_lines(beats):
            click.echo(line)


async def follow(run: str | None, nats_url: str, *, from_start: bool, as_json: bool) -> None:
    """Print events as they come, until the run ends or the reader has had enough."""
    async with reach(run, nats_url) as (_, log):
        after = 0 if from_start else await log.last_seq()
        render = event_json if as_json else event_line
        live = RunFolder(log.run).live() is not None or bool(nats_url)
        try:
            async for found in log.follow(after):
                for stored in found:
                    sys.stdout.write(render(stored) + "\n")
                sys.stdout.flush()
                if any(isinstance(stored.event, Ended) for stored in found) or not (found or live):
                    return
        except BrokenPipeError:
            # the reader is gone: nothing more to say, and nowhere to say it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def show_trajectory(trajectory: str, run: str | None, nats_url: str) -> None:
    """Print one trajectory. Raises UserError when there is none."""
    try:
        TrajectoryId.parse(trajectory)
    except ValueError as error:
        raise UserError(f"{error}; `actors tail` shows ids") from error
    async with reach(run, nats_url) as (_, log):
        state = await log.trajectory(trajectory)
        if state is None:
            raise UserError(f"run {log.run} has no trajectory {trajectory} (runs are in {RUNS}/)")
        click.echo(trajectory_text(state))
