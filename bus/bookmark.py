"""Where a run's dispatchers begin to read the log, in a key of its own; a cache, which may always be absent."""

import structlog

from bus import store
from bus.codec import decode, encode
from bus.connection import Bus
from bus.errors import BadMessage
from schemas.messages import Bookmark

log = structlog.get_logger()

_LIMIT_BYTES = 512 << 10


def _key(run: str) -> str:
    return f"{run}.bookmark"


async def read_bookmark(bus: Bus, run: str, last_seq: int) -> Bookmark | None:
    """The newest bookmark; None when there is none that fits a log of this length. Raises Unavailable."""
    value = await store.get(bus, "lease", _key(run))
    if value is None:
        return None
    try:
        bookmark: Bookmark = decode(value.data, Bookmark, _key(run))
    except BadMessage as error:
        log.warning("bookmark not readable; the whole log is read", error=str(error))
        return None
    return bookmark if bookmark.seq <= last_seq else None


async def write_bookmark(bus: Bus, run: str, bookmark: Bookmark) -> None:
    """Replace the bookmark; one too large for a message is left out. Raises BusError."""
    data = encode(bookmark)
    if len(data) <= _LIMIT_BYTES:
        await store.put(bus, "lease", _key(run), data)
