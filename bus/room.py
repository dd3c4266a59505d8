"""How much room the stores have left. The log never ages out: near its limit nothing new may be begun."""

import time

from bus.connection import Bus
from bus.subjects import LOG_STREAM

NEAR = 0.9
"""The part of a limit at which admission stops; the rest is for what is in flight."""

_REFUSED_S = 10.0
"""How long after a refusal the store counts as full; then whoever begins something finds out."""


async def shortage(bus: Bus) -> str:
    """Why nothing new may be begun, with the figure; empty while there is room. Raises Unavailable."""
    log = await bus.ask(f"STREAM.INFO.{LOG_STREAM}")
    account = await bus.ask("INFO")
    for what, used_bytes, limit_bytes in (
        ("the log", log["state"]["bytes"], log["config"]["max_bytes"]),
        ("the server's store", account["storage"], account["limits"]["max_storage"]),
    ):
        if 0 < limit_bytes <= used_bytes / NEAR:
            return f"{what} holds {_size(used_bytes)} of {_size(limit_bytes)}"
    if time.monotonic() - bus.full_s < _REFUSED_S:
        return f"the server's store is full; it holds {_size(account['storage'])}"
    return ""


def _size(count_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.4g} GB"
