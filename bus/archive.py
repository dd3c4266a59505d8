"""What the stores hold of one run: to copy it elsewhere, and to delete it.

Copied: the log, the answers, the pointers to weights, dead letters, blobs. Deleted with them: wake-ups, the weights,
leases. The run's own few events (`log.<run>.r.>`) stay, so that nobody takes its name for a new one.
"""

from collections.abc import AsyncIterator

from bus import blobs, policy, store, subjects
from bus.connection import Bus
from bus.log import Raw
from bus.provision import delete_consumers

_COPIED = (
    ("LOG", "log.{run}.>"),
    ("KV_policy", "$KV.policy.{run}"),
    ("KV_policy", "$KV.policy.{run}.>"),
    ("KV_private", "$KV.private.{run}.>"),
    ("DEAD", "dead.*.{run}"),
)
_DELETED = (
    ("GEN", "gen.{run}"),
    ("TOOL", "tool.{run}.>"),
    ("SCORE", "score.{run}"),
    ("LOG", "log.{run}.t.>"),
    ("LOG", "log.{run}.l.>"),
    ("KV_policy", "$KV.policy.{run}"),
    ("KV_policy", "$KV.policy.{run}.>"),
    ("KV_private", "$KV.private.{run}.>"),
    ("KV_lease", "$KV.lease.{run}.>"),
    ("KV_session", "$KV.session.{run}.>"),
    ("DEAD", "dead.*.{run}"),
)


async def messages(bus: Bus, run: str) -> AsyncIterator[tuple[str, Raw]]:
    """Every stored message of a run that is worth keeping, with its stream. Raises Unavailable."""
    for stream, subject in _COPIED:
        async for raw in store.messages(bus, stream, subject.format(run=run)):
            yield stream, raw
    for found in await store.objects(bus, blobs.BUCKET, run):
        async for raw in store.object_messages(bus, blobs.BUCKET, found):
            yield f"OBJ_{blobs.BUCKET}", raw


async def delete(bus: Bus, run: str, through_seq: int) -> int:
    """Delete all of a run but its weights and its own events, the log up to a sequence; returns how many messages.

    Takes `provision`. Harmless when it was done before, or cut short.
    """
    deleted = 0
    for stream, subject in _DELETED:
        through = through_seq if stream == subjects.LOG_STREAM else 0
        deleted += await store.purge(bus, stream, subject.format(run=run), through_seq=through)
    deleted += await _delete_objects(bus, blobs.BUCKET, run)
    await delete_consumers(bus, run)
    return deleted


async def delete_weights(bus: Bus, run: str) -> int:
    """Delete the weights of a run; returns how many messages. Takes `provision`."""
    return await _delete_objects(bus, policy.BUCKET, run)


async def _delete_objects(bus: Bus, bucket: str, run: str) -> int:
    found = await store.objects(bus, bucket, run)
    return sum([await store.purge_object(bus, bucket, each) for each in found])
