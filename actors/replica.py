"""One replica of one role, in a process of its own that actors/nursery.py has forked.

Exit status: 0 done or drained, 1 it crashed or something that it needs is not there, 2 a recipe that cannot be run (not
worth a restart), 75 the link was lost for good.
"""

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import NamedTuple, NoReturn

import structlog
import uvloop
from structlog.contextvars import bind_contextvars

from actors.errors import UserError
from actors.heartbeat import replica_name
from actors.logs import set_up_logging
from actors.process import Process, join, until_over
from actors.roles import ROLES
from bus.connection import Endpoint
from bus.errors import BusError, Denied
from schemas.messages import RoleName
from schemas.names import find
from tools.errors import ToolError

FAULTS_VARIABLE = "ACTORS_FAULTS"
"""For tests: `module:function`, called with the role before anything else, to make the replica die where it hurts."""
LOST_LINK = 75
"""Exit status: temporary failure, in the sense of sysexits.h."""

log = structlog.get_logger()


_END_THEMSELVES = ("learner", "recorder")
"""Roles that have something to finish when a run has ended."""


async def run_replica(
    role: RoleName, run: str, endpoint: Endpoint, rank: "Rank | None", alone: bool = False
) -> int:
    """Serve a role until told to stop or the run ends; returns the exit status."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGINT, stopping.set)
    pid = rank.leader if rank else os.getpid()
    bind_contextvars(run=run, role=role, replica=replica_name(role, pid))
    async with join(endpoint, run, role, stopping, pid) as process:
        log.info("started")
        over = asyncio.create_task(_stop_when_over(process)) if alone else None
        await (rank.serve if rank else ROLES[role])(process)
        if over:
            over.cancel()
        log.info("stopped")
        return LOST_LINK if process.bus.closed.is_set() else 0


async def _stop_when_over(process: Process) -> None:
    """What a supervisor would tell it."""
    if not await until_over(process.log) or process.vitals.role not in _END_THEMSELVES:
        process.stopping.set()


def _innermost(error: BaseException) -> BaseException:
    """What went wrong first; task groups wrap it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Rank(NamedTuple):
    """Of a replica of several processes, the one on the bus."""

    leader: int
    """The process id by which the replica is known."""
    serve: Callable[[Process], Awaitable[None]]
    """The role."""
    leave: Callable[[], None]
    """Called last: ends the others."""


def serve(
    role: RoleName,
    run: str,
    endpoint: Endpoint,
    rank: Rank | None = None,
    *,
    alone: bool = False,
) -> NoReturn:
    """Be the replica: serve the role, then end the process with its exit status.

    `alone`: no supervisor tells it when the run is over.
    """
    set_up_logging("json")  # its supervisor reads them: see last_error there
    if hook := os.environ.get(FAULTS_VARIABLE):
        find(hook)(role)
    status = 1
    try:
        try:
            status = uvloop.run(run_replica(role, run, endpoint, rank, alone))
        except BaseExceptionGroup as group:
            raise _innermost(group) from group
    except (UserError, Denied) as error:
        log.error("cannot run", error=str(error))
        status = 2
    except BusError as error:
        log.error("bus", error=str(error))
        status = LOST_LINK
    except ToolError as error:  # no sandbox that holds, no database: perhaps not for ever
        log.error("cannot serve", error=str(error))
    finally:
        if crash := sys.exc_info()[1]:
            why = "".join(traceback.format_exception_only(crash)).strip()
            log.critical("crashed", error=why, exc_info=crash)
        # threads of libraries may still run, and the interpreter may take seconds to go; all of ours is closed by now
        sys.stderr.flush()
        if rank:
            rank.leave()
        os._exit(status)
