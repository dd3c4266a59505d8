"""Logs: on stderr, one JSON object a line where nobody watches; `ACTORS_LOG=json` or `text` decides otherwise.

What they are about is bound, not repeated: `run`, `role` and `replica` by a process; `trajectory`, `stage`, `attempt`
and `policy_version` by a hop. No local variables in tracebacks: there lie keys and answers.
"""

import logging
import os
import sys

import structlog
from structlog.processors import ExceptionRenderer, JSONRenderer, TimeStamper, add_log_level
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

from actors.errors import UserError

VARIABLE = "ACTORS_LOG"


def set_up_logging(kind: str = "") -> None:
    """For this process, its libraries included. Raises UserError."""
    kind = kind or os.environ.get(VARIABLE) or ("text" if sys.stderr.isatty() else "json")
    if kind not in ("json", "text"):
        raise UserError(f"{VARIABLE}={kind}: write json or text")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_log_level,
        TimeStamper(fmt="iso"),
    ]
    last = _json() if kind == "json" else _text()
    # where stderr leads is asked anew for each line: a progress display stands in for it while it is shown
    structlog.configure(
        processors=[*shared, *last], logger_factory=lambda *_: structlog.WriteLogger(sys.stderr)
    )
    _take_over_libraries(shared, last)


def _json() -> list[Processor]:
    return [ExceptionRenderer(ExceptionDictTransformer(show_locals=False)), JSONRenderer()]


def _text() -> list[Processor]:
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


def _take_over_libraries(shared: list[Processor], last: list[Processor]) -> None:
    """Warnings and errors of libraries, whatever handlers they have made for themselves."""
    handler = logging.StreamHandler()
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *last])
    )
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    logging.getLogger("asyncio").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    """Not so what it warns of at the end of each connection with TLS, since nats-py begins them without."""
    return "eof_received()" not in record.getMessage()
