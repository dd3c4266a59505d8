"""Tools that come and go while a run goes on: `actors tools add` and `remove`, and what a toolbox makes of it.

Added is one of

    shout.py:shout    a function; its source travels in the log, so that every toolbox runs just this version
    sql               a tool that is built in, or from an installed package
    word_count.json   what `actors tools schema` prints, of a tool that a worker of its own serves (docs/wire.md)

A version has a queue of its own, which is served until the run ends. So calls of a version that was replaced or removed
are finished by it, and by no other.
"""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import click
from msgspec.structs import replace

from actors.calling import Toolset
from actors.errors import UserError
from actors.joining import Reached, reach_all
from actors.recipe import tools_without_recipe
from bus import subjects
from bus.codec import encode
from bus.provision import provision
from schemas.events import Archived, Ended, Opened, ShownFunction, ToolAdded, ToolRemoved
from tools.errors import ToolError
from tools.formats import open_format
from tools.registry import load_tools, resolve_options
from tools.remote import all_tools, read_shown
from tools.source import load_source
from tools.tool import Place, Tool

_VERSION_DIGITS = 8


def load_added(event: ToolAdded, recipe_dir: str = "") -> Tool:
    """The tool, as a toolbox runs it. Raises ToolError, and what its source raises."""
    if event.source:
        return load_source(event.use, event.source, event.options)
    options = {event.use: event.options} if event.options else {}
    return load_tools([event.use], recipe_dir, options)[event.use]


async def add_tool(what: str, sets: tuple[str, ...], run: str, nats_url: str) -> None:
    """Add a tool to a run, or replace it by a new version. Raises UserError."""
    async with _open_run(run, nats_url) as (reached, toolset):
        try:
            event = await _addition(what, sets)
            before = toolset.present
            if before.get(event.tool) == event.version:
                click.echo(f"run {run} has {event.queue} already")
                return
            toolset.observe(event)
        except ToolError as error:
            raise UserError(f"{what}: {error.detail}") from error
        async with reached.provisioning() as bus:
            await provision(bus, run, [event.queue])
        await reached.log.append_run(event)
    old = " instead of the former one, which finishes its calls" if event.tool in before else ""
    click.echo(f"run {run} may call {event.queue} now{old}")
    if not event.use:
        click.echo(f"its worker takes them from the consumer {subjects.durable(run, event.queue)}")


async def remove_tool(name: str, run: str, nats_url: str) -> None:
    """Let a run call a tool no more. Raises UserError."""
    async with _open_run(run, nats_url) as (reached, toolset):
        present = toolset.present
        if name not in present:
            raise UserError(f"run {run} has no tool {name!r}; it has {', '.join(present)}")
        if toolset.ends(name):
            raise UserError(f"{name} ends trajectories: such a tool stays for the whole run")
        await reached.log.append_run(ToolRemoved(replica="operator", tool=name))
    click.echo(f"run {run} calls {name} no more; calls in the log are finished")


class _Run(NamedTuple):
    reached: Reached
    toolset: Toolset


@asynccontextmanager
async def _open_run(run: str, nats_url: str) -> AsyncIterator[_Run]:
    """A run and the tools that it has now. Raises UserError for one that has ended."""
    async with reach_all(run, nats_url) as reached:
        found = [event async for event in reached.log.read(subjects.run_event(run))]
        events = [stored.event for stored in found]
        if any(isinstance(event, Ended | Archived) for event in events):
            raise UserError(f"run {run!r} has ended")
        opened = [event for event in events if isinstance(event, Opened)]
        if not opened:
            raise UserError(f"no run {run!r}: `actors train RECIPE --run {run}` starts it")
        config, folder = opened[-1].recipe.tools, opened[-1].recipe_dir
        # `template` asks the model's own template, which is not here; names clash alike in all formats
        style = "hermes" if config.format == "template" else config.format
        try:
            tools = all_tools(config, folder)
            toolset = Toolset(tools, lambda tools: open_format(style, tools, config.tags))
        except ToolError as error:
            raise UserError(f"the recipe of run {run}: {error.detail}") from error
        for event in events:
            toolset.take(event)
        yield _Run(reached, toolset)


async def _addition(what: str, sets: tuple[str, ...]) -> ToolAdded:
    """The event that adds it. Raises UserError, ToolError."""
    if what.endswith(".json"):
        if sets:
            raise UserError(f"--set {sets[0]}: the options of {what} are its worker's")
        shown = read_shown(_read(what))
        return _versioned(
            ToolAdded(replica="operator", tool=shown.name, version="", functions=[shown])
        )
    path, _, name = what.rpartition(":")
    for key in sets:
        if not key.startswith(f"tools.options.{name}."):
            raise UserError(f"--set {key}: give the tool's own, tools.options.{name}.KEY=VALUE")
    if path and not path.endswith(".py"):
        raise UserError(f"{what}: give the file, so that its source can travel: FILE.py:{name}")
    options = tools_without_recipe(sets).options.get(name, {})
    event = ToolAdded(
        replica="operator",
        tool=name,
        version="",
        functions=[],
        use=name,
        source=_read(path) if path else "",
        options=options,
    )
    try:
        tool = load_added(event)
    except SyntaxError as error:
        raise UserError(f"{path}: line {error.lineno}: {error.msg}") from error
    if tool.ends:
        raise UserError(
            f"{name} ends trajectories: such a tool is there from the beginning, in tools.use"
        )
    asked = await resolve_options({name: tool}, Place(recipe_dir=str(Path.cwd())))
    event = replace(event, options=event.options | asked.get(name, {}))
    functions = [
        ShownFunction(name=f.name, description=f.description, parameters=f.parameters)
        for f in load_added(event).functions
    ]
    return _versioned(replace(event, functions=functions))


def _versioned(event: ToolAdded) -> ToolAdded:
    digest = hashlib.sha256(encode(replace(event, replica="", version=""))).hexdigest()
    return replace(event, version=digest[:_VERSION_DIGITS])


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error
