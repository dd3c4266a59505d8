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

from actors.errors import UserError
from actors.process import Process, join
from actors.roles import ROLES
from bus.connection import Endpoint
from bus.errors import BusError
from schemas.messages import RoleName
from schemas.names import find
from tools.errors import ToolError

FAULTS_VARIABLE = "ACTORS_FAULTS"
"""For tests: `module:function`, called with the role before anything else, to make the replica die where it hurts."""
LOST_LINK = 75
"""Exit status: temporary failure, in the sense of sysexits.h."""

log = structlog.get_logger()


def set_up_logging() -> None:
    """JSON lines on stderr."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


async def run_replica(role: RoleName, run: str, endpoint: Endpoint, rank: "Rank | None") -> int:
    """Serve a role until told to stop or the run ends; returns the exit status."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGINT, stopping.set)
    pid = rank.leader if rank else os.getpid()
    async with join(endpoint, run, role, stopping, pid) as process:
        structlog.contextvars.bind_contextvars(replica=process.replica)
        log.info("started", run=run)
        await (rank.serve if rank else ROLES[role])(process)
        log.info("stopped")
        return LOST_LINK if process.bus.closed.is_set() else 0


class Rank(NamedTuple):
    """Of a replica of several processes, the one on the bus."""

    leader: int
    """The process id by which the replica is known."""
    serve: Callable[[Process], Awaitable[None]]
    """The role."""
    leave: Callable[[], None]
    """Called last: ends the others."""


def serve(role: RoleName, run: str, endpoint: Endpoint, rank: Rank | None = None) -> NoReturn:
    """Be the replica: serve the role, then end the process with its exit status."""
    set_up_logging()
    if hook := os.environ.get(FAULTS_VARIABLE):
        find(hook)(role)
    status = 1
    try:
        status = uvloop.run(run_replica(role, run, endpoint, rank))
    except UserError as error:
        log.error("cannot run", error=str(error))
        status = 2
    except BusError as error:
        log.error("bus", error=str(error))
        status = LOST_LINK
    except ToolError as error:  # no sandbox that holds, no database: perhaps not for ever
        log.error("cannot serve", error=str(error))
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        # threads of libraries may still run, and the interpreter may take seconds to go; all of ours is closed by now
        sys.stderr.flush()
        if rank:
            rank.leave()
        os._exit(status)
