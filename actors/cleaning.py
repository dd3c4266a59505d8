"""Takes away what a run leaves behind as it goes: the learner old weights, the dispatcher orphaned chunks of blobs.

Kept are version 0, the newest few, and what evaluations still need. Who has read a pointer just before its version
goes finds the weights missing, and takes the newest. What goes is replaced by a message, which a full store refuses: so
it goes before the next version comes, and not when that has found no room.
"""

import asyncio
import time

import structlog

from actors.live import ATTEMPTS
from bus import blobs, policy, store
from bus.connection import Bus
from bus.errors import BusError
from schemas.events import TERMINAL, Admitted, AnyEvent, Failed
from schemas.recipe import Recipe
from schemas.trajectory import TrajectoryId

log = structlog.get_logger()

ORPHANED_S = 600.0
"""An upload that has not grown for so long, and has no name, is taken for that of a dead writer."""

_EVERY_S = 60.0


class OldWeights:
    """Deletes a run's old versions; for the learner, before each publication."""

    def __init__(self, bus: Bus, run: str, recipe: Recipe) -> None:
        self._bus = bus
        self._run = run
        self._kept = recipe.learner.weights_kept
        every, evaluated = recipe.evaluation.every_steps, recipe.evaluation
        self._evaluated = (
            range(0, recipe.learner.steps, every)
            if every and (evaluated.rows or evaluated.path)
            else range(0)
        )
        """Versions to evaluate; the dispatcher begins with one when it sees it, perhaps long after."""
        self._begun = -1
        """The newest version whose evaluation has begun: that of older ones has, too."""
        self._pinned: dict[str, tuple[int, int]] = {}
        """An evaluation in flight → the version it is pinned to, and the sequence of its admission."""
        self._looked_s = time.monotonic()

    def observe(self, event: AnyEvent, seq: int) -> None:
        """Take one event of the log in."""
        if isinstance(event, Admitted):
            if event.pinned_policy_version is not None:
                group = TrajectoryId.parse(event.trajectory).group
                self._pinned[group] = (event.pinned_policy_version, seq)
                self._begun = max(self._begun, event.pinned_policy_version)
        elif isinstance(event, TERMINAL):
            group, _, attempt = TrajectoryId.parse(event.trajectory)
            if not isinstance(event, Failed) or attempt + 1 >= ATTEMPTS:
                self._pinned.pop(group, None)

    def keep(self, newest: int) -> set[int]:
        """The versions that must stay beside the one that comes; the newest there is in any case."""
        due = (version for version in self._evaluated if self._begun <= version <= newest)
        pinned = (version for version, _ in self._pinned.values())
        return {0, *range(newest - max(self._kept, 2) + 1, newest + 1), *pinned, *due}

    def needed_from(self, read_seq: int) -> int:
        """As `Planner.needed_from` says."""
        return min([*(seq for _, seq in self._pinned.values()), read_seq + 1]) - 1

    async def delete(self, newest: int) -> None:
        """Delete what need not stay with the version that comes; now and then also what a killed learner left half."""
        try:
            await policy.delete_versions(self._bus, self._run, self.keep(newest))
            if time.monotonic() - self._looked_s > _EVERY_S:
                self._looked_s = time.monotonic()
                await store.delete_orphans(self._bus, policy.BUCKET, ORPHANED_S)
        except BusError as error:
            log.warning("old weights not deleted; next time", error=str(error))


async def delete_orphaned_blobs(bus: Bus) -> None:
    """Delete now and then what a killed toolbox did not finish to upload; never ends."""
    while True:
        await asyncio.sleep(_EVERY_S)
        try:
            await store.delete_orphans(bus, blobs.BUCKET, ORPHANED_S)
        except BusError as error:
            log.warning("orphaned chunks not deleted; next time", error=str(error))
