"""`actors`: train, join, watch and steer runs. Torch is imported by the processes that need it, never here."""

import errno
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from actors.cli_nats import nats_certs, nats_conf
from actors.cli_options import go, nats_option, run_option, size
from actors.cli_tools import tools
from actors.errors import UserError
from actors.logs import set_up_logging
from bus.errors import BusError
from bus.subjects import KEPT

_NO_PLACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})


class Commands(click.Group):
    """Prints the mistakes that a user can mend as one line, with exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (UserError, BusError) as error:
            click.echo(f"actors: {error}", err=True)
            sys.exit(2)
        except OSError as error:
            if error.errno not in _NO_PLACE:
                raise
            hint = "make room, or name another folder for runs in ACTORS_RUNS"
            click.echo(f"actors: {error}: {hint}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agentic-actors")
def main() -> None:
    """Train language-model agents that use tools, by reinforcement learning, as processes on NATS."""
    set_up_logging()


def _run_name(given: str | None, recipe_name: str) -> str:
    """The run's name, or a new one. Raises UserError for one that no subject can have."""
    from bus.subjects import token

    try:
        return token(given or f"{recipe_name}-{time.strftime('%m%d-%H%M%S')}", "--run")
    except ValueError as error:
        raise UserError(str(error)) from error


@main.command()
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
@click.option("--run", help="The run's name; that of an earlier run resumes it.")
@nats_option
@click.option("--dry-run", is_flag=True, help="Print the recipe as resolved, and start nothing.")
@click.option(
    "--log-limit",
    type=size,
    metavar="SIZE",
    envvar="ACTORS_LOG_LIMIT",
    show_envvar=True,
    help="What the log of all runs on the server may take, e.g. 50GB; near it admission stops. "
    "By default it stays as it is, at first without a limit.",
)
@click.option(
    "--no-replicas",
    is_flag=True,
    help="Open the run at --nats, watch it and report; its replicas are started elsewhere, by "
    "`actors run ROLE --unsupervised`.",
)
def train(  # noqa: PLR0913 (one for each option)
    recipe_path: Path,
    overrides: tuple[str, ...],
    run: str | None,
    nats_url: str,
    dry_run: bool,
    log_limit: int | None,
    no_replicas: bool,
) -> None:
    """Train RECIPE (a TOML file), or resume a run."""
    from rich.console import Console

    from actors.preflight import check_names
    from actors.recipe import load_recipe, sentence, to_toml
    from actors.train import report
    from actors.train import train as train_run

    recipe = load_recipe(recipe_path, overrides)
    folder = str(recipe_path.resolve().parent)
    name = _run_name(run, recipe.name)
    if dry_run:
        click.echo(sentence(recipe) + to_toml(recipe), nl=False)
        check_names(recipe, folder)
        return
    begin = report if no_replicas else train_run
    go(begin(recipe, folder, name, nats_url, Console(), log_limit))


@main.command("serve")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
@click.option("--run", help="The run's name; that of an earlier one goes on with it.")
@nats_option
def serve_tools(
    recipe_path: Path, overrides: tuple[str, ...], run: str | None, nats_url: str
) -> None:
    """Serve the tools of RECIPE to other trainers, as VerlTool's tool server does."""
    from rich.console import Console

    from actors.recipe import NO_POLICY, load_recipe
    from actors.serving import serve

    recipe = load_recipe(recipe_path, (*overrides, *NO_POLICY))
    name = _run_name(run, recipe.name)
    go(serve(recipe, str(recipe_path.resolve().parent), name, nats_url, Console()))


@main.command("run")
@click.argument("role", metavar="ROLE", type=click.Choice(KEPT))
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="With learner: processes that train together; by default the recipe's learner.ranks.",
)
@click.option(
    "--shadow",
    metavar="NAME",
    help="With learner: train the main learner's batches beside it, or along the log of a run at "
    "rest, and publish nothing; the same command goes on after an interruption.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="With --shadow: a key of [learner] that it has otherwise, e.g. learner.learning_rate=1e-5.",
)
@click.option(
    "--unsupervised",
    is_flag=True,
    help="Be the one replica, in this very process: for containers, whose engine starts it again.",
)
@run_option
@nats_option
def run_role(  # noqa: PLR0913 (one for each option)
    role: str,
    replicas: int,
    ranks: int | None,
    shadow: str | None,
    overrides: tuple[str, ...],
    unsupervised: bool,
    run: str | None,
    nats_url: str,
) -> None:
    """Add replicas of ROLE to a live run, until they are stopped.

    ROLE: dispatcher, generator, toolbox, scorer, learner, recorder or gateway.
    """
    if shadow is not None:
        if role != "learner" or replicas > 1 or ranks is not None:
            raise UserError("run: --shadow is for one learner: actors run learner --shadow NAME")
        from actors.shadow import run_shadow

        go(run_shadow(shadow, overrides, run, nats_url))
    if overrides:
        raise UserError("run: --set needs --shadow NAME; a run's recipe is given to `actors train`")
    if ranks is not None and role != "learner":
        raise UserError(f"run: --ranks is for learner; of {role} there are --replicas")
    if unsupervised:
        if replicas > 1 or ranks is not None:
            raise UserError("run: --unsupervised is one replica, as the run's recipe has it")
        from actors.alone import run_alone

        run_alone(role, run, nats_url)  # type: ignore[arg-type]
    from actors.joining import add_replicas

    go(add_replicas(role, replicas, run, nats_url, ranks))  # type: ignore[arg-type]


def _steer(name: str, text: str) -> Callable[[str, str], None]:
    @main.command(name, help=text)
    @click.argument("run")
    @nats_option
    def command(run: str, nats_url: str) -> None:
        from actors.joining import steer

        go(steer(name, run, nats_url))

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
    go(train_run(recipe, folder, name, nats_url, Console()))


@main.command()
@run_option
@nats_option
def ps(run: str | None, nats_url: str) -> None:
    """Who is alive, on what, since when."""
    from actors.joining import show_alive

    go(show_alive(run, nats_url))


@main.command()
@run_option
@click.option("--from-start", is_flag=True, help="Begin with the run's first event.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@nats_option
def tail(run: str | None, from_start: bool, as_json: bool, nats_url: str) -> None:
    """Follow the trajectory stream."""
    from actors.joining import follow

    go(follow(run, nats_url, from_start=from_start, as_json=as_json))


@main.command()
@click.argument("trajectory")
@run_option
@nats_option
def show(trajectory: str, run: str | None, nats_url: str) -> None:
    """One TRAJECTORY: every turn, tool call, observation, reward and version."""
    from actors.joining import show_trajectory

    go(show_trajectory(trajectory, run, nats_url))


@main.command()
@run_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@nats_option
def verify(run: str | None, as_json: bool, nats_url: str) -> None:
    """Account for every trajectory from the log alone; exit status 1 when something is broken."""
    from actors.verify import verify as verify_run

    go(verify_run(run, nats_url, as_json=as_json))


@main.command()
@run_option
@click.option("--steps", default="", metavar="A:B", help="Both included; by default all.")
@nats_option
def replay(run: str | None, steps: str, nats_url: str) -> None:
    """Do the steps of a run again from its log; exit status 1 when a value is not the recorded one."""
    from actors.replay import replay as replay_run

    go(replay_run(run, nats_url, steps))


@main.command()
@click.argument("names", metavar="RUN[/SHADOW]...", nargs=-1)
@click.option("--to", type=click.Path(path_type=Path), help="The picture; by default in the first.")
def compare(names: tuple[str, ...], to: Path | None) -> None:
    """Runs and shadows beside each other: a table, curves, and where they differ first."""
    from actors.compare import compare as compare_runs

    compare_runs(names, to)


@main.command()
@click.argument("name", metavar="RUN[/SHADOW]")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="By default the newest kept.")
@click.option("--best", is_flag=True, help="The best kept, by learner.best_by.")
@nats_option
def export(name: str, folder: Path, step: int | None, best: bool, nats_url: str) -> None:
    """Write a checkpoint as a Hugging Face FOLDER with a model card; adapters are merged."""
    from actors.export import export as export_checkpoint

    if best and step is not None:
        raise UserError("export: --step or --best, not both")
    go(export_checkpoint(name, folder, nats_url, step=step, best=best))


@main.command()
@click.argument("run")
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), help="By default the run's own folder."
)
@click.option("--drop", is_flag=True, help="Then delete it from the stores.")
@click.option("--force", is_flag=True, help="With --drop, also a run that could be resumed.")
@nats_option
def archive(run: str, folder: Path | None, drop: bool, force: bool, nats_url: str) -> None:
    """Copy the log of RUN, which has ended, to a file that is read back and compared."""
    from actors.archive import archive as archive_run

    go(archive_run(run, folder, nats_url, drop=drop, force=force))


@main.group()
def dead() -> None:
    """Messages that no handler could take: list, show, replay, drop."""


@dead.command("list")
@run_option
@nats_option
def dead_list(run: str | None, nats_url: str) -> None:
    """One line for each."""
    from actors.dead import list_dead

    go(list_dead(run, nats_url))


@dead.command("show")
@click.argument("seq", type=int)
@run_option
@nats_option
def dead_show(seq: int, run: str | None, nats_url: str) -> None:
    """All that one says, with what was put aside."""
    from actors.dead import show_dead

    go(show_dead(seq, run, nats_url))


@dead.command("replay")
@click.argument("seq", type=int)
@run_option
@nats_option
def dead_replay(seq: int, run: str | None, nats_url: str) -> None:
    """Send what was put aside again, if its trajectory still waits for it; else exit status 1."""
    from actors.dead import replay_dead

    go(replay_dead(seq, run, nats_url))


@dead.command("drop")
@click.argument("seq", type=int, required=False)
@click.option("--all", "every", is_flag=True, help="All of the run.")
@run_option
@nats_option
def dead_drop(seq: int | None, every: bool, run: str | None, nats_url: str) -> None:
    """Delete one, or all."""
    from actors.dead import drop

    if every == (seq is not None):
        raise UserError("dead drop: name one by its SEQ, or say --all")
    go(drop(seq, run, nats_url))


main.add_command(tools)
main.add_command(nats_conf)
main.add_command(nats_certs)


@main.command()
def flow() -> None:
    """The roles, and the messages between them."""
    from actors.flow import draw

    click.echo(draw())
