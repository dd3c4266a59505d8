"""Images and other large observations of a run, by their sha256; the log holds the hash only.

They are kept for as long as the log that names them: `actors archive` takes them along.
"""

from bus import store
from bus.connection import Bus

BUCKET = "blobs"


async def put_blob(bus: Bus, run: str, data: bytes) -> str:
    """Store bytes and return their sha256."""
    return await store.put_object(bus, BUCKET, run, data)


async def get_blob(bus: Bus, run: str, sha256: str) -> bytes:
    """The bytes of that hash. Raises Missing, Corrupt."""
    return await store.get_object(bus, BUCKET, run, sha256)
