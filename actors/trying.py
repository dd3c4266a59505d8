"""`actors tools`: see what tools there are, how the policy sees them, and call one by hand as the toolbox would."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from actors.errors import UserError
from actors.recipe import NO_POLICY, load_recipe, tools_without_recipe
from actors.roles import open_encoder
from schemas.events import Call
from schemas.recipe import Tools
from tools.errors import ToolError
from tools.observation import shorten_observation
from tools.registry import load_tools, open_tools, resolve_options, tool_names
from tools.remote import remote_tools
from tools.sandbox.sandbox import Limits
from tools.sandbox.select import open_sandbox
from tools.tool import Context, Place, Tool


async def list_tools(recipe_path: Path | None, sets: tuple[str, ...]) -> None:
    """One line for each function: of the tools that have names, or of a recipe's."""
    config, recipe_dir = _config(recipe_path, sets)
    names = config.names or tool_names()
    tools = await _load(config, recipe_dir, names)
    lines = [
        (_label(tool.name, function.name), function.description.partition("\n")[0], _traits(tool))
        for tool in tools
        for function in tool.functions
    ]
    width = max((len(label) for label, *_ in lines), default=0)
    for label, first, traits in lines:
        click.echo(f"{label:{width}}  {first}{traits}")
    for tool in tools:
        if not tool.functions:
            click.echo(f"{tool.name:{width}}  What its options name: [tools.options.{tool.name}]")


def _label(tool: str, function: str) -> str:
    return tool if function == tool else f"{tool}: {function}"


async def show_schema(name: str, recipe_path: Path | None, sets: tuple[str, ...]) -> None:
    """The JSON that the policy is shown of a tool."""
    config, recipe_dir = _config(recipe_path, sets)
    (tool,) = await _load(config, recipe_dir, [name])
    for function in tool.functions:
        click.echo(msgspec.json.format(msgspec.json.encode(function.schema), indent=2).decode())


async def call_tool(
    name: str, text: str, recipe_path: Path | None, task: str, sets: tuple[str, ...]
) -> int:
    """Call a tool and print what the policy would see; the exit status is 1 for an error of the call's making.

    `text`: the arguments as JSON, or what a call's body would hold; `task`: the row's `public.extra` as JSON.
    """
    config, recipe_dir = _config(recipe_path, sets)
    (tool,) = await _load(config, recipe_dir, [name])
    wall_s = tool.options.timeout_s or config.timeout_s
    try:
        sandbox = await open_sandbox(config.tier)
        try:
            async with open_tools([tool], Place(recipe_dir=recipe_dir, encoder=open_encoder)):
                context = Context(
                    run=sandbox.importing(tool.options.imports or ()).run,
                    limits=Limits(wall_s=wall_s),
                    task=_json_object(task, "--task"),
                )
                seen = await tool(context, _arguments(tool, text).arguments)
        finally:
            await sandbox.close()
    except ToolError as error:
        raise UserError(str(error)) from error
    max_chars = tool.options.observation_chars or config.observation_chars
    keep = tool.options.keep or (tool.keep if config.keep == "auto" else config.keep)
    seen = shorten_observation(seen, max_chars, keep)
    click.echo(seen.text)
    for image in seen.images:
        suffix = f".{image.media_type.rpartition('/')[2]}"
        with tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=suffix, delete=False) as file:
            file.write(image.data)
        click.echo(f"[{image.media_type} in {file.name}]")
    return 0 if seen.ok else 1


def _config(recipe_path: Path | None, sets: tuple[str, ...]) -> tuple[Tools, str]:
    """The `tools` table of a recipe, or the defaults, with overrides; and where its names are looked up."""
    if recipe_path is None:
        return tools_without_recipe(sets), str(Path.cwd())
    return load_recipe(recipe_path, (*sets, *NO_POLICY)).tools, str(recipe_path.resolve().parent)


async def _load(config: Tools, recipe_dir: str, names: Sequence[str]) -> list[Tool]:
    """Tools by their names; those of the recipe that others serve are as the policy sees them."""
    remote = remote_tools(config.remote)
    served = [remote[name] for name in names if name in remote]
    names = [name for name in names if name not in remote]
    short = {name.rpartition(":")[2] for name in names}
    options: dict[str, dict[str, Any]]
    options = {name: dict(table) for name, table in config.options.items() if name in short}
    try:
        tools = load_tools(names, recipe_dir, options)
        for name, found in (await resolve_options(tools, Place(recipe_dir=recipe_dir))).items():
            options[name] = options.get(name, {}) | found
        return [*load_tools(names, recipe_dir, options).values(), *served]
    except ToolError as error:
        raise UserError(error.detail) from error


def _traits(tool: Tool) -> str:
    traits = [
        *(["keeps a session"] if tool.session else []),
        *(["acts on the world"] if tool.effects == "external" else []),
        *(["ends the trajectory"] if tool.ends else []),
    ]
    return f" ({', '.join(traits)})" if traits else ""


def _arguments(tool: Tool, text: str) -> Call:
    """A JSON object is the arguments, other text the one argument; a tool of several functions wants a name before."""
    if not tool.functions:
        raise UserError(f"{tool.name} has nothing to call: see its options")
    function, rest = tool.functions[0], text
    if len(tool.functions) > 1 or function.name != tool.name:
        named, _, rest = text.partition(" ")
        known = {function.name: function for function in tool.functions}
        if named not in known:
            raise UserError(f"{tool.name}: begin with one of {', '.join(known)}")
        function = known[named]
    arguments: dict[str, Any]
    if rest.lstrip().startswith("{") or not function.argument:
        arguments = _json_object(rest or "{}", function.name)
    else:
        arguments = {function.argument: rest}
    if function.name != tool.name:
        arguments = {"function": function.name, "arguments": arguments}
    return Call(tool=tool.name, arguments=arguments)


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UserError(f"{what}: not a JSON object: {error}") from error
