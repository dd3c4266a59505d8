"""What several commands have in common."""

import asyncio
import re
import sys
from collections.abc import Coroutine
from typing import Any

import click

run_option = click.option("--run", help="The run's name; by default the one that is alive.")
nats_option = click.option(
    "--nats",
    "nats_url",
    envvar="NATS_URL",
    show_envvar=True,
    default="",
    metavar="URL|FILE|FOLDER",
    help="The NATS server to use: nats://user:password@host:port, the file of a login, or a folder with one for each "
    "role (actors nats-conf); by default the run's own.",
)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(text: str) -> int:
    """A number of bytes, written as `50GB`, `500MB` or `4096`."""
    found = re.fullmatch(r"([0-9]{1,9})\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise click.BadParameter(f"{text!r} is no size: write it as 50GB or 500MB")
    return int(found[1]) * _UNITS[(found[2] or "").upper()]


def go(command: Coroutine[Any, Any, int | None]) -> None:
    """Run a command to its end; its result is the exit status."""
    sys.exit(asyncio.run(command) or 0)
