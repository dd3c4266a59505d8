"""`actors archive`: a closed run's stores copied to one file, and only then deleted.

`<run>.archive` is frames, each four bytes of length (big-endian) and that much msgpack:

    Head                    once: which run
    Kept, Kept, …           each stored message as it was: the log in order, then pointers, answers, dead letters, blobs
    Tail                    once: how many, and the SHA-256 of every byte before this frame

It is written beside its name, synced, read back whole and compared; then named; then the log says that it is there;
then, on request, the stores are emptied. Killed anywhere in this, the same command goes on.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import click
import msgspec

from actors.errors import UserError
from actors.fleet import HEARD_S, Fleet
from actors.joining import reach_all
from actors.run_folder import RunFolder
from bus import archive as stores
from bus import subjects
from bus.codec import decode, encode
from bus.connection import Bus, wait
from bus.errors import BadMessage
from bus.log import Log
from schemas.events import Archived, Ended, Opened

VERSION = 1
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_LENGTH = struct.Struct(">I")
_FRAME_LIMIT_BYTES = 64 << 20
"""More than any message that a server takes: what says that it is longer is not read into memory."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """An archive's first frame."""

    run: str
    version: int = VERSION


class Kept(NamedTuple):
    """One stored message; on the wire an array."""

    stream: str
    seq: int
    time_s: float
    """Server time when it was stored, in seconds since the epoch."""
    subject: str
    data: bytes


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """An archive's last frame."""

    messages: int
    sha256: str
    log_seq: int
    """The last sequence of the log among them."""


class Checked(NamedTuple):
    """A run's archive that was read whole."""

    tail: Tail
    copied: stores.Copied


class BadArchive(UserError):
    """A file that is no archive, or not a whole one."""


# -- the file --------------------------------------------------------------------------------------


class Writer:
    """Writes an archive, frame by frame."""

    def __init__(self, file: BinaryIO, run: str) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._messages = 0
        self._log_seq = 0
        self._frame(encode(Head(run=run)))

    def _frame(self, data: bytes) -> None:
        for part in (_LENGTH.pack(len(data)), data):
            self._file.write(part)
            self._hash.update(part)

    def add(self, message: Kept) -> None:
        """One more message."""
        self._frame(encode(message))
        self._messages += 1
        if message.stream == subjects.LOG_STREAM:
            self._log_seq = message.seq

    def close(self) -> Tail:
        """The end; all of it is on the disk then."""
        tail = Tail(messages=self._messages, sha256=self._hash.hexdigest(), log_seq=self._log_seq)
        self._frame(encode(tail))
        self._file.flush()
        os.fsync(self._file.fileno())
        return tail


def read_archive(file: BinaryIO) -> Iterator[Head | Kept | Tail]:
    """What an archive holds, head and tail included. Raises BadArchive for anything but a whole one."""
    try:
        frame = _read_frame(file)
        head: Head = decode(frame[4:], Head)
        if head.version != VERSION:
            raise BadArchive(f"an archive of version {head.version}, not {VERSION}")
        yield head
        digest = hashlib.sha256(frame)
        messages, log_seq = 0, 0
        while True:
            frame = _read_frame(file)
            entry: Kept | Tail = decode(frame[4:], Kept | Tail)
            if isinstance(entry, Tail):
                break
            digest.update(frame)
            messages += 1
            if entry.stream == subjects.LOG_STREAM:
                log_seq = entry.seq
            yield entry
    except BadMessage as error:
        raise BadArchive(f"no archive: {error.why}") from error
    if entry != Tail(messages=messages, sha256=digest.hexdigest(), log_seq=log_seq):
        raise BadArchive("an archive with other bytes than were written")
    if file.read(1):
        raise BadArchive("an archive with something after its end")
    yield entry


def _read_frame(file: BinaryIO) -> bytes:
    """Length and content."""
    head = file.read(_LENGTH.size)
    if len(head) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        data = file.read(min(length, _FRAME_LIMIT_BYTES))
        if len(data) == length:
            return head + data
    raise BadArchive("an archive that was cut short")


def check_archive(path: Path, run: str) -> Checked:
    """What a run's archive holds, read whole. Raises BadArchive."""
    copied = stores.Copied(run)
    try:
        with path.open("rb") as file:
            last: Head | Kept | Tail | None = None
            for entry in read_archive(file):
                if isinstance(entry, Head) and entry.run != run:
                    raise BadArchive(f"{path}: an archive of run {entry.run!r}")
                if isinstance(entry, Kept):
                    copied.add(entry.stream, entry.subject, entry.seq)
                last = entry
    except OSError as error:
        raise BadArchive(f"{path}: {error.strerror}") from error
    except BadArchive as error:
        raise BadArchive(f"{path}: {error}") from error
    assert isinstance(last, Tail)
    return Checked(last, copied)


# -- the command -----------------------------------------------------------------------------------


async def archive(run: str, folder: Path | None, nats_url: str, *, drop: bool, force: bool) -> None:
    """Copy a closed run to its file; with `drop`, then delete it from the stores. Raises UserError."""
    home = RunFolder(run)
    if home.live():
        raise UserError(f"run {run!r} is alive: `actors stop {run}` first")
    path = (folder or home.path) / f"{run}.archive"
    async with reach_all(run, nats_url) as reached:
        bus, log, _ = reached
        if nats_url:
            await _refuse_live(bus, run)
        before = await _archived(log, may_drop=force or not drop)
        tail, copied = await _write(bus, run, path) if before is None else check_archive(path, run)
        if before is not None and before.sha256 != tail.sha256:
            raise UserError(f"{path} is not the archive that the log names; --to says where it is")
        size_bytes = path.stat().st_size
        click.echo(f"{path}: {tail.messages} messages, {size_bytes} bytes, read back and equal")
        if drop:
            async with reached.provisioning() as provisioning:
                # first: they are not in the file, and where the store is full the note needs their room
                deleted = await stores.delete_weights(provisioning, run)
                if before is None:
                    await _note(log, tail)
                deleted += await copied.delete(provisioning)
            click.echo(f"run {run}: {deleted} messages deleted from the stores")


async def _refuse_live(bus: Bus, run: str) -> None:
    """Listen for signs of life. Raises UserError when there is one."""
    fleet = Fleet()
    await fleet.hear(bus, run)
    await wait(bus.closed, HEARD_S)
    if alive := fleet.alive():
        raise UserError(f"run {run!r} is alive ({alive[0].replica}): `actors stop {run}` first")


async def _archived(log: Log, *, may_drop: bool) -> Archived | None:
    """What the log says of an archive made before. Raises UserError when it says that the run may go on."""
    found: Archived | None = None
    opened = ended = False
    async for stored in log.read(subjects.run_event(log.run)):
        opened |= isinstance(stored.event, Opened)
        ended |= isinstance(stored.event, Ended)
        found = stored.event if isinstance(stored.event, Archived) else found
    if not opened:
        raise UserError(f"there is no run {log.run!r}")
    if not (ended or found or may_drop):
        raise UserError(
            f"run {log.run!r} has not ended and could be resumed; --force gives that up"
        )
    return found


async def _write(bus: Bus, run: str, path: Path) -> Checked:
    """Write, sync, read back and compare; only then give the file its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    try:
        # answers are in it: for the owner's eyes
        with os.fdopen(os.open(unfinished, _NEW_FILE, 0o600), "wb") as file:
            writer = Writer(file, run)
            async for stream, raw in stores.messages(bus, run):
                writer.add(Kept(stream, raw.seq, raw.time_s, raw.subject, raw.data))
            tail = writer.close()
        checked = check_archive(unfinished, run)
        if checked.tail != tail:
            raise BadArchive(f"{unfinished} reads back as something else: nothing was deleted")
        unfinished.rename(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{unfinished}: {error.strerror}: nothing was deleted") from error
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return checked


async def _note(log: Log, tail: Tail) -> None:
    """Let the log say that the rest of it is elsewhere."""
    await log.append_run(
        Archived(
            replica="operator", messages=tail.messages, sha256=tail.sha256, log_seq=tail.log_seq
        )
    )
