"""Key-value buckets and objects named by their content, over plain streams.

The object store's wire format is NATS's own (ADR-20), so other clients read what we write; nats-py's is not used
because its `get` takes quadratic time (issue 703). Values and objects are read by direct gets, which need no consumer.

An object is chunks on a subject of their upload's own, and then a message that names them: a writer that dies before it
leaves chunks that nobody names, and `delete_orphans` takes them away. A run owns its objects: nothing is shared between
runs, so that what one deletes no other misses.
"""

import asyncio
import base64
import hashlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import structlog

from bus.connection import Bus, Message
from bus.errors import Corrupt, Full, Missing, Unavailable
from bus.log import Raw, is_stored, open_reader, raw_message, timestamp_s

log = structlog.get_logger()

_CHUNK_BYTES = 512 << 10
_CHUNKS_IN_FLIGHT = 8
_UPLOAD_S = 60.0
"""How long an upload is begun again after the server has not confirmed it once."""
_AGAIN_S = 0.5

_REPLACES = {"Nats-Rollup": "sub"}
_CLEARED = "KV-Operation"
"""The header of a message that stands for none; NATS's own."""

_NO_MESSAGE = frozenset({10037, 10043, 10057})
"""The server's codes for a sequence that is not there, or not any more."""


class Value(NamedTuple):
    """What a key holds."""

    data: bytes
    seq: int
    """Its revision: the next put may expect it."""


async def _last(bus: Bus, stream: str, subject: str) -> Message | None:
    read = partial(bus.request, f"$JS.API.DIRECT.GET.{stream}.{subject}", b"")
    message = await bus.patiently(read)
    return message if is_stored(message) and _CLEARED not in (message.headers or ()) else None


async def purge(bus: Bus, stream: str, subject: str, *, through_seq: int = 0) -> int:
    """Delete a stream's messages on a subject, up to a sequence when one is given; returns how many."""
    query: dict[str, Any] = {"filter": subject}
    if through_seq:
        query["seq"] = through_seq + 1
    return int((await bus.ask(f"STREAM.PURGE.{stream}", query))["purged"])


async def clear(bus: Bus, subject: str) -> None:
    """Delete what a bucket holds on one subject: a message takes its place, and goes by itself a second later.

    For whoever may publish there; `purge` takes the right to manage the stream. Tried once: no wait for room helps what
    is to make room. Raises Full, Unavailable.
    """
    headers = {"Nats-TTL": "1s", _CLEARED: "PURGE"}
    if subject.startswith("$O."):  # a key has room for one message
        headers |= _REPLACES
    await bus.store(subject, b"", headers, deadline_s=0.0)


async def delete_message(bus: Bus, stream: str, seq: int) -> bool:
    """Delete one message; False when it is not there any more."""
    query = {"seq": seq, "no_erase": True}
    answer = await bus.ask(f"STREAM.MSG.DELETE.{stream}", query, expected=_NO_MESSAGE)
    return "error" not in answer


async def messages(bus: Bus, stream: str, subject: str) -> AsyncIterator[Raw]:
    """Everything that a stream holds on a subject now, in order."""
    bucket = stream.startswith(("KV_", "OBJ_"))
    async with open_reader(bus, stream) as reader:
        async for raw in reader.read(subject):
            if raw.data or not bucket:  # else it was cleared
                yield raw


# -- keys ------------------------------------------------------------------------------------------


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


async def delete(bus: Bus, bucket: str, key: str) -> None:
    """Remove a key and its value."""
    await clear(bus, f"$KV.{bucket}.{key}")


# -- objects ---------------------------------------------------------------------------------------


class Object(NamedTuple):
    """An object as its bucket lists it."""

    run: str
    sha256: str
    upload: str
    """The token under which its chunks lie."""
    chunks: int
    size_bytes: int


def _chunks(bucket: str, upload: str) -> str:
    return f"$O.{bucket}.C.{upload}"


def _meta_subject(bucket: str, run: str, sha256: str) -> str:
    name = base64.urlsafe_b64encode(f"{run}.{sha256}".encode()).decode()
    return f"$O.{bucket}.M.{name}"


def name_subject(bucket: str, found: Object) -> str:
    """Where the message lies that makes an object of chunks."""
    return _meta_subject(bucket, found.run, found.sha256)


def _object(data: bytes) -> Object:
    meta = json.loads(data)
    run, _, sha256 = meta["name"].rpartition(".")
    return Object(run, sha256, meta["nuid"], meta["chunks"], meta["size"])


async def _find(bus: Bus, bucket: str, run: str, sha256: str) -> Object | None:
    message = await _last(bus, f"OBJ_{bucket}", _meta_subject(bucket, run, sha256))
    return None if message is None else _object(message.data)


async def _is_whole(bus: Bus, bucket: str, found: Object) -> bool:
    subject = _chunks(bucket, found.upload)
    stream = f"OBJ_{bucket}"
    state = (await bus.ask(f"STREAM.INFO.{stream}", {"subjects_filter": subject}))["state"]
    whole = (state.get("subjects") or {}).get(subject, 0) == found.chunks
    # a single message may be the one that has cleared them
    return whole and (found.chunks != 1 or await _last(bus, stream, subject) is not None)


async def put_object(bus: Bus, bucket: str, run: str, data: bytes) -> str:
    """Store a run's bytes under their sha256 and return it; what is there already, whole, is not sent again.

    Raises Full (see `Bus.waits_when_full`), Unavailable.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    found = await _find(bus, bucket, run, sha256)
    if found is not None and await _is_whole(bus, bucket, found):
        return sha256
    end = math.inf
    while True:
        upload = uuid.uuid4().hex
        chunks = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
        made = Object(run, sha256, upload, len(chunks), len(data))
        try:
            await _send(bus, _chunks(bucket, upload), chunks)
            whole = await _is_whole(bus, bucket, made)
        except (Full, Unavailable) as error:
            waits = isinstance(error, Full) and bus.waits_when_full
            end = min(end, time.monotonic() + _UPLOAD_S)
            if bus.closed.is_set() or not (waits or time.monotonic() < end):
                raise
            log.warning("upload begun again", bucket=bucket, error=str(error))
            await asyncio.sleep(_AGAIN_S)
            continue
        if whole:  # else it was stopped for so long that its chunks were taken for orphans
            break
    await bus.store(_meta_subject(bucket, run, sha256), _meta(bucket, made), _REPLACES)
    return sha256


async def _send(bus: Bus, subject: str, chunks: list[bytes]) -> None:
    """Several at once: one connection keeps the order. One sent again would come late, so none is."""
    for first in range(0, len(chunks), _CHUNKS_IN_FLIGHT):
        window = chunks[first : first + _CHUNKS_IN_FLIGHT]
        sent = await asyncio.gather(
            *(bus.store(subject, chunk, deadline_s=0.0) for chunk in window),
            return_exceptions=True,
        )
        for outcome in sent:
            if isinstance(outcome, BaseException):
                raise outcome


def _meta(bucket: str, made: Object) -> bytes:
    digest = base64.urlsafe_b64encode(bytes.fromhex(made.sha256)).decode()
    meta = {
        "name": f"{made.run}.{made.sha256}",
        "bucket": bucket,
        "nuid": made.upload,
        "size": made.size_bytes,
        "chunks": made.chunks,
        "digest": f"SHA-256={digest}",
        "mtime": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "options": {"max_chunk_size": _CHUNK_BYTES},
    }
    return json.dumps(meta).encode()


async def get_object(bus: Bus, bucket: str, run: str, sha256: str) -> bytes:
    """A run's bytes of that hash. Raises Missing, also when it is deleted meanwhile, or Corrupt."""
    found = await _find(bus, bucket, run, sha256)
    while found is not None:
        subject = _chunks(bucket, found.upload)
        data = b"".join([raw.data async for raw in messages(bus, f"OBJ_{bucket}", subject)])
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        read, found = found, await _find(bus, bucket, run, sha256)
        if found == read:
            raise Corrupt(bucket, sha256)
    raise Missing(f"object {sha256} of {run} in {bucket}")


async def objects(bus: Bus, bucket: str, run: str = "") -> list[Object]:
    """All objects of a run, or of all."""
    found = [_object(raw.data) async for raw in messages(bus, f"OBJ_{bucket}", f"$O.{bucket}.M.>")]
    return [each for each in found if not run or each.run == run]


async def object_messages(bus: Bus, bucket: str, found: Object) -> AsyncIterator[Raw]:
    """What an object is made of: its chunks, then the message that names them; nothing when chunks are missing."""
    stream = f"OBJ_{bucket}"
    chunks = [raw async for raw in messages(bus, stream, _chunks(bucket, found.upload))]
    if len(chunks) == found.chunks:
        for raw in chunks:
            yield raw
        async for raw in messages(bus, stream, name_subject(bucket, found)):
            yield raw


async def delete_object(bus: Bus, bucket: str, found: Object) -> None:
    """Remove an object: its name first, so that no reader begins on what is going."""
    await clear(bus, name_subject(bucket, found))
    await clear(bus, _chunks(bucket, found.upload))


async def purge_object(bus: Bus, bucket: str, found: Object) -> int:
    """The same, for who manages streams; returns how many messages went."""
    stream = f"OBJ_{bucket}"
    named = await purge(bus, stream, name_subject(bucket, found))
    return named + await purge(bus, stream, _chunks(bucket, found.upload))


async def delete_orphans(bus: Bus, bucket: str, older_s: float) -> int:
    """Delete chunks that no object names and to which none was added for so long; returns how many.

    They were left by a writer that died, or by one that lost to another with the same bytes.
    """
    stream = f"OBJ_{bucket}"
    answer = await bus.ask(f"STREAM.INFO.{stream}", {"subjects_filter": f"$O.{bucket}.C.*"})
    now_s = timestamp_s(answer["ts"])
    uploads = answer["state"].get("subjects") or {}
    # read after the chunks: what was named in between is seen
    found = await objects(bus, bucket)
    names = {name_subject(bucket, each) for each in found}
    query = {"subjects_filter": f"$O.{bucket}.M.*"}
    state = (await bus.ask(f"STREAM.INFO.{stream}", query))["state"]
    if names != set(state.get("subjects") or ()):
        return 0  # who answered is behind who leads, or a name comes or goes just now: next time
    named = {_chunks(bucket, each.upload) for each in found}
    deleted = 0
    for subject in uploads.keys() - named:
        last = await _last(bus, stream, subject)
        if last is not None and now_s - raw_message(last).time_s > older_s:
            await clear(bus, subject)
            deleted += uploads[subject]
    if deleted:
        log.info("orphaned chunks deleted", bucket=bucket, chunks=deleted)
    return deleted
