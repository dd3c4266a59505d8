"""`actors`: train, join, watch and steer runs. Torch is imported by the processes that need it, never here."""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from actors.errors import UserError
from bus.errors import BusError

ROLE_NAMES = ["dispatcher", "generator", "toolbox", "scorer", "learner"]

run_option = click.option("--run", help="The run's name; by default the one that is alive.")
nats_option = click.option(
    "--nats",
    "nats_url",
    envvar="NATS_URL",
    default="",
    help="A NATS server to use, as nats://user:password@host:port; by default the run's own.",
)


class Commands(click.Group):
    """Prints the mistakes that a user can mend as one line, with exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (UserError, BusError) as error:
            click.echo(f"actors: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agentic-actors")
def main() -> None:
    """Train language-model agents that use tools, by reinforcement learning, as processes on NATS."""


def _go(coroutine: Coroutine[Any, Any, int | None]) -> None:
    sys.exit(asyncio.run(coroutine) or 0)


@main.command()
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
@click.option("--run", help="The run's name; that of an earlier run resumes it.")
@nats_option
@click.option("--dry-run", is_flag=True, help="Print the recipe as resolved, and start nothing.")
def train(
    recipe_path: Path, overrides: tuple[str, ...], run: str | None, nats_url: str, dry_run: bool
) -> None:
    """Train RECIPE (a TOML file), or resume a run."""
    from rich.console import Console

    from actors.recipe import load_recipe, to_toml
    from actors.train import train as train_run
    from bus.subjects import token

    recipe = load_recipe(recipe_path, overrides)
    name = run or f"{recipe.name}-{time.strftime('%m%d-%H%M%S')}"
    try:
        token(name, "--run")
    except ValueError as error:
        raise UserError(str(error)) from error
    if dry_run:
        click.echo(to_toml(recipe), nl=False)
        return
    folder = str(recipe_path.resolve().parent)
    _go(train_run(recipe, folder, name, nats_url, Console()))


@main.command("run")
@click.argument("role", type=click.Choice(ROLE_NAMES))
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True)
@run_option
@nats_option
def run_role(role: str, replicas: int, run: str | None, nats_url: str) -> None:
    """Add replicas of ROLE to a live run, until they are stopped."""
    from actors.joining import add_replicas

    _go(add_replicas(role, replicas, run, nats_url))  # type: ignore[arg-type]


def _steer(name: str, text: str) -> Callable[[str, str], None]:
    @main.command(name, help=text)
    @click.argument("run")
    @nats_option
    def command(run: str, nats_url: str) -> None:
        from actors.joining import steer

        _go(steer(name, run, nats_url))

    return command


_steer("stop", "Drain RUN and stop it; `train --run RUN` goes on from there.")
_steer("pause", "Stop admitting trajectories to RUN; those in flight go on.")
_steer("resume", "Admit trajectories to RUN again.")


@main.command("eval")
@click.argument("model", metavar="RUN|MODEL")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
@nats_option
def evaluate(model: str, recipe_path: Path, overrides: tuple[str, ...], nats_url: str) -> None:
    """Score a run's checkpoint or any model on RECIPE's held-out tasks."""
    from rich.console import Console

    from actors.recipe import load_recipe
    from actors.run_folder import RunFolder
    from actors.train import train as train_run

    checkpoint = RunFolder(model).path / "checkpoint"
    source = str(checkpoint.resolve()) if (checkpoint / "config.json").exists() else model
    fixed = (f'policy.model="{source}"', "learner.steps=0", "cold_start.steps=0")
    recipe = load_recipe(recipe_path, (*overrides, *fixed))
    if not (recipe.evaluation.rows or recipe.evaluation.path):
        raise UserError(
            f"{recipe_path}: evaluation.path: no held-out tasks: give it or evaluation.rows"
        )
    name = f"eval-{recipe.name}-{time.strftime('%m%d-%H%M%S')}"
    folder = str(recipe_path.resolve().parent)
    _go(train_run(recipe, folder, name, nats_url, Console()))


@main.command()
@run_option
@nats_option
def ps(run: str | None, nats_url: str) -> None:
    """Who is alive, on what, since when."""
    from actors.joining import show_alive

    _go(show_alive(run, nats_url))


@main.command()
@run_option
@click.option("--from-start", is_flag=True, help="Begin with the run's first event.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@nats_option
def tail(run: str | None, from_start: bool, as_json: bool, nats_url: str) -> None:
    """Follow the trajectory stream."""
    from actors.joining import follow

    _go(follow(run, nats_url, from_start=from_start, as_json=as_json))


@main.command()
@click.argument("trajectory")
@run_option
@nats_option
def show(trajectory: str, run: str | None, nats_url: str) -> None:
    """One TRAJECTORY: every turn, tool call, observation, reward and version."""
    from actors.joining import show_trajectory

    _go(show_trajectory(trajectory, run, nats_url))


@main.command()
def flow() -> None:
    """The roles, and the messages between them."""
    from actors.flow import draw

    click.echo(draw())
