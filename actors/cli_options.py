"""What several commands have in common."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import click

run_option = click.option("--run", help="The run's name; by default the one that is alive.")
nats_option = click.option(
    "--nats",
    "nats_url",
    envvar="NATS_URL",
    default="",
    help="A NATS server to use, as nats://user:password@host:port; by default the run's own.",
)


def go(command: Coroutine[Any, Any, int | None]) -> None:
    """Run a command to its end; its result is the exit status."""
    sys.exit(asyncio.run(command) or 0)
