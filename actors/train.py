"""`actors train`: one run on this machine, from its server to its report."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from structlog.contextvars import bind_contextvars

from actors.errors import UserError
from actors.joining import start_at_rest
from actors.learner import is_shadow
from actors.preflight import check_names, resolve_tools
from actors.process import opened
from actors.progress import Progress
from actors.recipe import to_toml
from actors.report import Report
from actors.run_folder import RunFolder
from actors.supervisor import Supervisor
from bus import subjects
from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.log import Log, open_log
from bus.logins import Logins, read_logins
from bus.provision import provision
from schemas.events import Archived, Ended, Opened, Stopping
from schemas.messages import RoleName
from schemas.recipe import Nats, Recipe, Replicas

INTERRUPTED = 130
"""Exit status of a run that was told to stop and can be resumed."""
_ARCHIVE_S = 60.0
"""How long a run that has ended waits for its archive."""


class HasEnded(UserError):
    """The run is over."""


async def train(
    recipe: Recipe,
    recipe_dir: str,
    run: str,
    nats_url: str,
    console: Console,
    log_limit_bytes: int | None = None,
) -> int:
    """Start or resume a run and stay until it ends or is told to stop. Returns the exit status."""
    folder = RunFolder(run)
    if folder.live():
        raise UserError(f"run {run!r} is alive already: watch it with `actors tail --run {run}`")
    check_names(recipe, recipe_dir)
    recipe = await resolve_tools(recipe, recipe_dir)
    stop = _told_to_stop()
    async with begin(recipe, recipe_dir, folder, nats_url, log_limit_bytes) as begun:
        run_ = Run(recipe, run, folder, begun.logins, console)
        ended = await run_.supervise(begun, stop, _counts(recipe.replicas))
    return 0 if ended else INTERRUPTED


async def report(
    recipe: Recipe,
    recipe_dir: str,
    run: str,
    nats_url: str,
    console: Console,
    log_limit_bytes: int | None = None,
) -> int:
    """Start or resume a run whose replicas others start, and report until it ends or is told to stop."""
    if not nats_url:
        raise UserError(
            "train: --no-replicas needs --nats: where those join that are started elsewhere"
        )
    check_names(recipe, recipe_dir)
    recipe = await resolve_tools(recipe, recipe_dir)
    stop, folder = _told_to_stop(), RunFolder(run)
    try:
        async with begin(
            recipe, recipe_dir, folder, nats_url, log_limit_bytes, local=False
        ) as begun:
            await Run(recipe, run, folder, begun.logins, console).supervise(begun, stop, {})
    except HasEnded as error:  # nothing to do, however often it is started again
        console.print(str(error), highlight=False, soft_wrap=True)
    return 0


def _told_to_stop() -> asyncio.Event:
    """An event that signals set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


def _counts(replicas: Replicas) -> dict[RoleName, int]:
    """How many of each role; those that need torch last: the others need not wait for it."""
    return {
        "dispatcher": 1,
        "toolbox": replicas.toolbox,
        "scorer": replicas.scorer,
        "gateway": replicas.gateway,
        "recorder": replicas.recorder,
        "generator": replicas.generator,
        "learner": 1,
    }


class Begun(NamedTuple):
    """A run that can be joined."""

    logins: Logins
    bus: Bus
    log: Log
    after: int
    """The last sequence of what went before."""


@asynccontextmanager
async def begin(
    recipe: Recipe,
    recipe_dir: str,
    folder: RunFolder,
    nats_url: str,
    log_limit_bytes: int | None = None,
    *,
    local: bool = True,
) -> AsyncIterator[Begun]:
    """Begin a run, or go on with it: its server, its streams, its recipe in the log, its address in its folder.

    `local`: others on this machine may join without `--nats`. Raises UserError for a run that has ended.
    """
    bind_contextvars(run=folder.run, role="supervisor")
    async with AsyncExitStack() as stack:
        logins = await stack.enter_async_context(_server(folder, nats_url, recipe.nats))
        name = f"supervisor {folder.run}"
        async with connect(logins.of("provision"), f"{name} provisions") as provisioning:
            await provision(
                provisioning,
                folder.run,
                recipe.tools.names,
                log_limit_bytes=log_limit_bytes,
                replicas=recipe.nats.replicas,
            )
        bus = await stack.enter_async_context(connect(logins.of("supervisor"), name))
        run_log = await stack.enter_async_context(open_log(bus, folder.run))
        after = await _open(run_log, recipe, recipe_dir)
        (folder.path / "recipe.toml").write_text(to_toml(recipe))
        if local:
            folder.write_endpoint(logins)
            stack.callback(folder.remove_endpoint)
        yield Begun(logins, bus, run_log, after)


@asynccontextmanager
async def _server(folder: RunFolder, nats_url: str, nats: Nats) -> AsyncIterator[Logins]:
    """The server given, or one of our own that is kept alive. Raises UserError, InUse."""
    if nats_url:
        folder.path.mkdir(parents=True, exist_ok=True)
        yield read_logins(nats_url)
        return
    server = EmbeddedServer(folder.nats, analytics_sees_answers=nats.analytics_sees_answers)
    if not await start_at_rest(server, folder):
        raise UserError(f"run {folder.run!r} is alive already: `actors tail` watches it")
    keeper = asyncio.create_task(server.keep(), name="keep nats-server")
    try:
        yield server.logins
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        server.stop()


async def _open(run_log: Log, recipe: Recipe, recipe_dir: str) -> int:
    """Make sure that the log begins with this recipe; returns the last sequence of what went before.

    Raises UserError for a run that has ended.
    """
    after = 0
    before = await opened(run_log)
    async for stored in run_log.read(subjects.run_event(run_log.run)):
        after = stored.seq
        if isinstance(stored.event, Ended | Archived):
            raise HasEnded(f"run {run_log.run!r} has ended: choose another --run name")
    if before is None or (before.recipe, before.recipe_dir) != (recipe, recipe_dir):
        event = Opened(replica="supervisor", recipe=recipe, recipe_dir=recipe_dir)
        after = await run_log.append_run(event)
    return after


class Run:
    """A run that is being supervised."""

    def __init__(
        self, recipe: Recipe, run: str, folder: RunFolder, logins: Logins, console: Console
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._console = console
        self._run = run
        self._report = Report(folder.path)
        self._supervisor = Supervisor(run, logins, folder.logs, recipe)
        self._begun_s = time.monotonic()
        self._ended = False

    async def supervise(
        self, begun: Begun, stop: asyncio.Event, counts: dict[RoleName, int]
    ) -> bool:
        """Keep so many replicas alive until the run ends, or must stop; whether it has ended."""
        self._console.print(
            f"run {self._run} in {self._folder.path}/", highlight=False, soft_wrap=True
        )
        with Progress(self._run, self._recipe, self._console) as progress:
            keepers = {
                role: asyncio.create_task(self._supervisor.keep(role, count), name=f"keep {role}")
                for role, count in counts.items()
            }
            watch = asyncio.create_task(self._watch(begun.log, progress, begun.after), name="watch")
            children = asyncio.create_task(self._supervisor.watch(begun.bus), name="watch children")
            stopped = asyncio.create_task(stop.wait(), name="stop")
            try:
                ended = await self._until_over(keepers, watch, children, stopped)
            finally:
                await self._supervisor.stop()
                tasks = (*keepers.values(), watch, children, stopped)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                self._report.close()
        self._say_summary(ended)
        return ended

    async def _until_over(
        self,
        keepers: dict[RoleName, asyncio.Task[None]],
        watch: asyncio.Task[None],
        children: asyncio.Task[None],
        stopped: asyncio.Task[bool],
    ) -> bool:
        """Wait for the end, which is the learner's if it is ours: it exports the model. False when told to stop before.

        Raises CrashLoop.
        """
        waiting: set[asyncio.Task[Any]] = {*keepers.values(), watch, children, stopped}
        learner = keepers.get("learner", watch)
        while not (watch.done() and learner.done()):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if stopped in done or (watch in done and not self._ended):
                return False
        # the end reaches it within a second, unless it was behind; a full disk does not hold the run back for long
        done, _ = await asyncio.wait({keepers.get("recorder", watch)}, timeout=_ARCHIVE_S)
        for task in done:
            task.result()
        if not done:
            self._console.print(
                f"{self._folder.path}/archive is not whole: see {self._folder.logs}/"
            )
        return True

    async def _watch(self, run_log: Log, progress: Progress, after: int) -> None:
        """Report what the log says until the run ends or is told to stop."""
        async for found in run_log.follow():
            progress.see(self._supervisor.fleet.alive(), time.monotonic())
            for stored in found:
                if is_shadow(stored.learner):
                    continue
                self._report.observe(stored)
                progress.observe(stored, live=stored.seq > after)
                if isinstance(stored.event, Ended):
                    self._ended = True
                    return
                if isinstance(stored.event, Stopping) and stored.seq > after:
                    return

    def _say_summary(self, ended: bool) -> None:
        say = partial(self._console.print, highlight=False, soft_wrap=True)
        rows = self._report.rows
        if rows:
            last = rows[-5:]
            mean = sum(row["reward_mean"] for row in last) / len(last)
            say(
                f"reward {rows[0]['reward_mean']:.3f} at step 1, {mean:.3f} over the last {len(last)}"
            )
        for version, mean in self._report.evaluation_means().items():
            say(f"held out, version {version}: {mean:.3f}")
        seconds = time.monotonic() - self._begun_s
        path = self._folder.path
        if ended:
            say(
                f"done in {seconds:.0f} s: {path}/checkpoint, {path}/metrics.jsonl, {path}/reward.png"
            )
        else:
            say(f"stopped after {seconds:.0f} s; go on with --run {self._run}")
