"""`actors run ROLE --unsupervised`: one replica as this very process, for whoever starts again what ends: containers.

Nobody tells it that the run is over: it reads that itself. What it logs goes to stderr.
"""

import asyncio
from typing import NoReturn

from actors.errors import UserError
from actors.process import opened
from actors.ranks import group_of, lead
from actors.replica import serve
from bus.connection import Endpoint, connect
from bus.log import open_log
from bus.logins import read_logins
from schemas.messages import RoleName
from schemas.recipe import Recipe


def run_alone(role: RoleName, run: str | None, nats_url: str) -> NoReturn:
    """Be a replica of the role until told to stop or the run is over. Raises UserError."""
    if run is None or not nats_url:
        raise UserError("run: --unsupervised needs --run NAME and --nats: nothing is looked for")
    endpoint = read_logins(nats_url).of(role)
    if role == "learner" and (group := group_of(asyncio.run(_recipe(run, endpoint)).learner)):
        lead(run, endpoint, group)
    serve(role, run, endpoint, alone=True)


async def _recipe(run: str, endpoint: Endpoint) -> Recipe:
    async with connect(endpoint, "learner") as bus, open_log(bus, run) as log:
        event = await opened(log)
    if event is None:
        raise UserError(f"no run {run!r} at {endpoint.url}")
    return event.recipe
