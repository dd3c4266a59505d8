"""Joins the recorder to the log and to the archive's files.

A recorder that is killed at any moment begins again after the last range of the log whose files are done. Where a
range ends depends on the log alone, so the same log always gives the same files, byte for byte.
"""

import asyncio
from typing import Any

import structlog

from actors.archive_files import Archive, RangeFiles
from actors.process import Process
from actors.recorder import Closing, Cut, Lives, closings, rows
from actors.run_folder import RunFolder
from bus import subjects
from bus.connection import wait
from bus.errors import Unavailable
from bus.lease import Lease
from bus.log import POLL_S, Log, Stored
from schemas.events import Ended

log = structlog.get_logger()

_READS_AT_ONCE = 16
_AGAIN_S = 5.0
"""How long to wait when a file could not be written."""


# -- the log ---------------------------------------------------------------------------------------


async def record(run_log: Log, archive: Archive, replica: str, stopping: asyncio.Event) -> None:
    """Write the archive until the run's end or, when told to stop, to the end of what is stored.

    Raises OSError when a file cannot be written.
    """
    done = archive.prepare()
    ends = await _read(run_log, subjects.run_event(run_log.run, "ended"))
    if any(stored.seq <= done for stored in ends):
        return
    lives = Lives()
    first, cut, files = done + 1, Cut(), RangeFiles(archive, replica)
    try:
        async for found in run_log.follow(done):
            for stored in found:
                lives.observe(stored)
                closed = closings(stored)
                await _add(run_log, closed, lives, files)
                if cut.after(stored, len(closed)):
                    files.finish(first, stored.seq)
                    if isinstance(stored.event, Ended):
                        return
                    first, cut, files = stored.seq + 1, Cut(), RangeFiles(archive, replica)
            if stopping.is_set() and not found:
                return
    finally:
        files.close()


async def _add(run_log: Log, closed: list[Closing], lives: Lives, files: RangeFiles) -> None:
    for at in range(0, len(closed), _READS_AT_ONCE):
        some = closed[at : at + _READS_AT_ONCE]
        histories = await asyncio.gather(*(_history(run_log, each, lives) for each in some))
        for history, closing in zip(histories, some, strict=True):
            if (found := rows(history, closing)) is not None:
                files.add(found)


async def _history(run_log: Log, closing: Closing, lives: Lives) -> list[Stored]:
    """A trajectory's events up to its fate."""
    kept = lives.take(closing.trajectory)
    if kept is not None:
        return kept
    stored = await _read(run_log, subjects.trajectory(run_log.run, closing.trajectory))
    return [each for each in stored if each.seq <= closing.seq]


async def _read(run_log: Log, subject: str) -> list[Stored]:
    """What is stored on a subject; waits for a server that does not answer."""
    while True:
        try:
            return [stored async for stored in run_log.read(subject)]
        except Unavailable as error:
            log.warning("log not readable; trying again", error=str(error))
            await asyncio.sleep(POLL_S)


class Recording:
    """One recorder process: the holder of the lease, or its standby."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._archive = Archive(RunFolder(process.run).path / "archive")

    async def serve(self) -> None:
        """Record whenever the lease is ours, until the run ends or we are told to stop."""
        process = self._process
        process.vitals.phase = "standby"
        lease = Lease(process.bus, process.run, "recorder", process.replica)
        while await process.unless_stopping(lease.acquire()):
            process.vitals.phase = ""
            try:
                if await self._record_while(lease):
                    return
            except OSError as error:
                # a full disk, or a folder that was taken away: the run goes on, and so do we once we can
                log.error("archive not written; trying again", error=str(error))
                process.vitals.phase = f"archive not written: {error}"
                await wait(process.stopping, _AGAIN_S)
            finally:
                await lease.release()
            process.vitals.phase = "standby"

    async def _record_while(self, lease: Lease) -> bool:
        """Whether the archive is whole or we were told to stop; False when the lease was lost."""
        process = self._process
        recording = asyncio.ensure_future(
            record(process.log, self._archive, process.replica, process.stopping)
        )
        keeping = asyncio.ensure_future(lease.keep())
        stop = asyncio.ensure_future(process.stopping.wait())
        tasks: set[asyncio.Future[Any]] = {recording, keeping}
        await asyncio.wait(tasks | {stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            drain_s = process.recipe.deadlines.drain_s
            await asyncio.wait(tasks, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()
        return process.stopping.is_set() or not recording.cancelled()
