"""`actors serve`: a run without a policy, whose tools answer trainers elsewhere. One command, on this machine."""

import asyncio
import signal

from rich.console import Console

from actors.errors import RecipeError, UserError
from actors.fleet import Fleet
from actors.heartbeat import STARTING
from actors.preflight import resolve_tools
from actors.run_folder import RunFolder
from actors.supervisor import Supervisor
from actors.train import INTERRUPTED, begin
from actors.watchdog import known_stalls
from bus.log import Log
from schemas.events import Ended, Stopping
from schemas.messages import RoleName
from schemas.recipe import Recipe

_TELL_S = 1.0


async def serve(recipe: Recipe, recipe_dir: str, run: str, nats_url: str, console: Console) -> int:
    """Keep dispatcher, toolboxes and gateways alive until told to stop. Returns the exit status."""
    folder = RunFolder(run)
    if folder.live():
        raise UserError(f"run {run!r} is alive already: `actors run gateway --run {run}` joins it")
    if not recipe.tools.names:
        raise RecipeError("recipe", "tools.use", "no tools to serve: name them")
    recipe = await resolve_tools(recipe, recipe_dir)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with begin(recipe, recipe_dir, folder, nats_url) as begun:
        console.print(f"run {run} in {folder.path}/", highlight=False, soft_wrap=True)
        supervisor = Supervisor(run, begun.logins, folder.logs, recipe)
        replicas = recipe.replicas
        counts: dict[RoleName, int] = {
            "dispatcher": 1,
            "toolbox": replicas.toolbox,
            "gateway": max(1, replicas.gateway),
            "recorder": replicas.recorder,
        }
        ends = [
            asyncio.create_task(stop.wait(), name="stop"),
            asyncio.create_task(_until_told(begun.log, begun.after), name="until told"),
        ]
        tasks = [
            *(asyncio.create_task(supervisor.keep(role, n)) for role, n in counts.items()),
            asyncio.create_task(supervisor.watch(begun.bus), name="watch children"),
            asyncio.create_task(_tell(supervisor.fleet, console), name="tell"),
            *ends,
        ]
        try:
            waiting = set(tasks)
            while not any(task.done() for task in ends):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await supervisor.stop()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    console.print(f"stopped; go on with --run {run}", highlight=False, soft_wrap=True)
    return INTERRUPTED


async def _tell(fleet: Fleet, console: Console) -> None:
    """Print where gateways listen, and what stands still, each time it is new; never ends."""
    told: set[object] = set()
    while True:
        beats = fleet.alive()
        news: dict[object, str] = {
            beat.replica: f"gateway {beat.phase}"
            for beat in beats
            if beat.role == "gateway" and beat.phase not in STARTING
        }
        news |= {key: f"stall: {stall}" for key, stall in known_stalls(beats).items()}
        for key, line in news.items():
            if key not in told:
                console.print(line, highlight=False, soft_wrap=True, markup=False)
        told = set(news)
        await asyncio.sleep(_TELL_S)


async def _until_told(run_log: Log, after: int) -> None:
    """Until the run is told to stop from now on."""
    async for found in run_log.follow(after):
        if any(isinstance(stored.event, Ended | Stopping) for stored in found):
            return
