"""`actors tools`: what there is to call, by hand and in a run that goes on."""

from pathlib import Path

import click

from actors.cli_options import go, nats_option


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def tools() -> None:
    """The tools that there are: list them, see what the policy is shown, call one by hand, change those of a run."""


recipe_option = click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="Take tools, options and tier from a recipe.",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As tools.tier=unsafe."
)


@tools.command("list")
@recipe_option
@set_option
def tools_list(recipe_path: Path | None, overrides: tuple[str, ...]) -> None:
    """What there is to call."""
    from actors.trying import list_tools

    go(list_tools(recipe_path, overrides))


@tools.command("schema")
@click.argument("name")
@recipe_option
@set_option
def tools_schema(name: str, recipe_path: Path | None, overrides: tuple[str, ...]) -> None:
    """What the policy is shown of the tool NAME."""
    from actors.trying import show_schema

    go(show_schema(name, recipe_path, overrides))


@tools.command("call")
@click.argument("name")
@click.argument("arguments", default="")
@click.option("--task", default="{}", help="The row's public.extra, as JSON.")
@recipe_option
@set_option
def tools_call(
    name: str, arguments: str, task: str, recipe_path: Path | None, overrides: tuple[str, ...]
) -> None:
    """Call the tool NAME with ARGUMENTS: a JSON object, or what a call's body would hold.

    Not for tools that keep a session: only a trajectory has one.
    """
    from actors.trying import call_tool

    go(call_tool(name, arguments, recipe_path, task, overrides))


@tools.command("add")
@click.argument("run")
@click.argument("tool", metavar="FILE.py:FUNCTION|NAME|FILE.json")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="As tools.options.sql.timeout_s=5.",
)
@nats_option
def tools_add(run: str, tool: str, overrides: tuple[str, ...], nats_url: str) -> None:
    """Let RUN call a tool from now on, or another version of one that it has.

    FILE.json has the form that `tools schema` prints, and is of a tool that a worker of its own serves (docs/wire.md).
    """
    from actors.adding import add_tool

    go(add_tool(tool, overrides, run, nats_url))


@tools.command("remove")
@click.argument("run")
@click.argument("name")
@nats_option
def tools_remove(run: str, name: str, nats_url: str) -> None:
    """Let RUN call the tool NAME no more; calls in the log are finished."""
    from actors.adding import remove_tool

    go(remove_tool(name, run, nats_url))
