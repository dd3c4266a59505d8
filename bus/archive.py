"""What the stores hold of one run: to copy it elsewhere, and to delete it.

Copied: the log, the answers, the pointers to weights, dead letters, blobs. Deleted with them: wake-ups, the weights,
leases. The run's own few events (`log.<run>.r.>`) stay, so that nobody takes its name for a new one.

A server of a cluster that is behind gives less than there is: what a copy does not hold is not deleted.
"""

from collections.abc import AsyncIterator, Iterable

from bus import blobs, policy, store
from bus.connection import Bus
from bus.log import Raw
from bus.permissions import covers
from bus.provision import delete_consumers

_BLOBS = f"OBJ_{blobs.BUCKET}"
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


class Copied:
    """How far a copy goes: on each pattern of subjects, and which objects are in it."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._through = dict.fromkeys(_of(run, _COPIED), 0)
        self._objects: set[str] = set()
        """Of theirs, the subjects."""

    def add(self, stream: str, subject: str, seq: int) -> None:
        """One of its messages, in order."""
        if stream == _BLOBS:
            self._objects.add(subject)
        for known, pattern in self._through:
            if stream == known and covers(pattern, subject):
                self._through[known, pattern] = seq

    def through(self, stream: str, pattern: str) -> int | None:
        """The last sequence on a pattern; 0 for none, None for what no copy is made of."""
        return next(
            (
                seq
                for (known, copied), seq in self._through.items()
                if stream == known and covers(copied, pattern)
            ),
            None,
        )

    async def delete(self, bus: Bus) -> int:
        """Delete from the stores what it holds, and what no copy is made of but the weights; returns how many messages.

        Takes `provision`. Harmless when it was done before, or cut short.
        """
        deleted = 0
        for stream, pattern in _of(self._run, _DELETED):
            through_seq = self.through(stream, pattern)
            if through_seq != 0:
                deleted += await store.purge(bus, stream, pattern, through_seq=through_seq or 0)
        for found in await store.objects(bus, blobs.BUCKET, self._run):
            if store.name_subject(blobs.BUCKET, found) in self._objects:
                deleted += await store.purge_object(bus, blobs.BUCKET, found)
        await delete_consumers(bus, self._run)
        return deleted


def _of(run: str, patterns: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(stream, pattern.format(run=run)) for stream, pattern in patterns]


async def messages(bus: Bus, run: str) -> AsyncIterator[tuple[str, Raw]]:
    """Every stored message of a run that is worth keeping, with its stream. Raises Unavailable."""
    for stream, pattern in _of(run, _COPIED):
        async for raw in store.messages(bus, stream, pattern):
            yield stream, raw
    for found in await store.objects(bus, blobs.BUCKET, run):
        async for raw in store.object_messages(bus, blobs.BUCKET, found):
            yield _BLOBS, raw


async def delete_weights(bus: Bus, run: str) -> int:
    """Delete the weights of a run; returns how many messages. Takes `provision`."""
    found = await store.objects(bus, policy.BUCKET, run)
    return sum([await store.purge_object(bus, policy.BUCKET, each) for each in found])
