"""Key-value buckets and objects named by their content, over plain streams.

The object store's wire format is NATS's own (ADR-20), so other clients read what we write; nats-py's is not used
because its `get` takes quadratic time (issue 703). Values and objects are read by direct gets, which need no consumer.
"""

import asyncio
import base64
import hashlib
import json
import uuid
from datetime import UTC, datetime
from typing import NamedTuple

from bus.connection import Bus, Message
from bus.errors import Corrupt, Missing
from bus.log import open_reader

_CHUNK_BYTES = 512 << 10
_CHUNKS_IN_FLIGHT = 8


class Value(NamedTuple):
    """What a key holds."""

    data: bytes
    seq: int
    """Its revision: the next put may expect it."""


async def _last(bus: Bus, stream: str, subject: str) -> Message | None:
    message = await bus.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"")
    return None if (message.headers or {}).get("Status") else message


async def get(bus: Bus, bucket: str, key: str) -> Value | None:
    """A key's value; None when there is none or it has expired."""
    message = await _last(bus, f"KV_{bucket}", f"$KV.{bucket}.{key}")
    if message is None:
        return None
    headers = message.headers or {}
    if headers.get("KV-Operation") or headers.get("Nats-Marker-Reason"):
        return None
    return Value(message.data, int(headers["Nats-Sequence"]))


async def put(
    bus: Bus,
    bucket: str,
    key: str,
    data: bytes,
    *,
    expected_seq: int | None = None,
    ttl_s: int | None = None,
) -> int:
    """Set a key and return its revision.

    With `expected_seq` (0: it must not exist) it raises Conflict when the key has moved. With `ttl_s` it expires.
    """
    headers = {}
    if expected_seq is not None:
        headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_seq)
    if ttl_s is not None:
        headers["Nats-TTL"] = f"{ttl_s}s"
    return await bus.store(f"$KV.{bucket}.{key}", data, headers or None)


def _meta_subject(bucket: str, name: str) -> str:
    return f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


async def put_object(bus: Bus, bucket: str, data: bytes) -> str:
    """Store bytes under their sha256 and return it; bytes that are there already are not sent again."""
    digest = hashlib.sha256(data)
    name = digest.hexdigest()
    if await _last(bus, f"OBJ_{bucket}", _meta_subject(bucket, name)) is not None:
        return name
    upload = uuid.uuid4().hex
    subject = f"$O.{bucket}.C.{upload}"
    chunks = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
    # one connection keeps the order, but a chunk that is sent again would come late: each expects its place
    for first in range(0, len(chunks), _CHUNKS_IN_FLIGHT):
        await asyncio.gather(
            *(bus.store(subject, chunk) for chunk in chunks[first : first + _CHUNKS_IN_FLIGHT])
        )
    meta = {
        "name": name,
        "bucket": bucket,
        "nuid": upload,
        "size": len(data),
        "chunks": len(chunks),
        "digest": "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode(),
        "mtime": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "options": {"max_chunk_size": _CHUNK_BYTES},
    }
    await bus.store(_meta_subject(bucket, name), json.dumps(meta).encode(), {"Nats-Rollup": "sub"})
    return name


async def get_object(bus: Bus, bucket: str, sha256: str) -> bytes:
    """The bytes of that hash. Raises Missing or Corrupt."""
    message = await _last(bus, f"OBJ_{bucket}", _meta_subject(bucket, sha256))
    if message is None:
        raise Missing(f"object {sha256} in {bucket}")
    meta = json.loads(message.data)
    parts: list[bytes] = []
    async with open_reader(bus, f"OBJ_{bucket}") as reader:
        async for raw in reader.read(f"$O.{bucket}.C.{meta['nuid']}"):
            parts.append(raw.data)
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Corrupt(bucket, sha256)
    return data
