"""What the dispatcher knows of each trajectory and group that has not ended."""

from collections.abc import Mapping

from actors.place import Place
from bus.work import Queue
from schemas.events import Admitted

ATTEMPTS = 2
"""Of each member of a group, before the group is dropped."""


class Live:
    """A trajectory that has not ended."""

    def __init__(self, admitted: Admitted, seq: int, now_s: float) -> None:
        self.admitted = admitted
        self.admitted_seq = seq
        self.oldest_version: int | None = None
        self.fresh = True
        """Nothing has been sampled yet."""
        self.woken_seq = seq
        """With barriers: the sequence at which its next stage was last woken."""
        self.move(Place(), seq, now_s)

    def move(self, place: Place, seq: int, now_s: float) -> None:
        """It has a new event: whatever was late is forgiven."""
        self.place = place
        self.seq = seq
        self.moved_s = self.due_since_s = now_s
        """When it moved, and when it was last swept, or moved."""
        self.sweeps = 0
        self.queue_end: int | None = None
        """How many messages its queue will have given out when all that lay there is taken."""

    @property
    def stage(self) -> str:
        """Who acts next; see Place."""
        return self.place.stage

    def in_line(self, queues: Mapping[str, Queue]) -> bool:
        """Whether its message may still lie in its queue, behind others: then silence is waiting and not loss."""
        queue = queues.get(self.place.queue)
        if queue is None or not queue.waiting:
            return False
        if self.queue_end is None:
            self.queue_end = queue.taken + queue.waiting
        return queue.taken < self.queue_end

    @property
    def outside(self) -> bool:
        """Whoever asks the gateway acts next: nobody here is waited for."""
        return self.admitted.purpose == "external" and self.stage == "gen"


class Group:
    """The members of one task's group that holds a slot."""

    def __init__(self, first: Admitted, seq: int) -> None:
        self.first = first
        self.first_seq = seq
        """The lowest sequence of an admission."""
        self.attempts: dict[int, int] = {}
        """Member → its newest attempt."""
        self.failed: set[int] = set()
        """Members whose newest attempt has failed."""
        self.ended: set[int] = set()
        """Members whose newest attempt was expired or dropped."""
        self.expired = False
        """One of them was expired: the task is to be admitted again."""

    @property
    def lost(self) -> bool:
        """It can no longer become complete."""
        return bool(self.ended) or any(self.attempts[m] + 1 >= ATTEMPTS for m in self.failed)

    @property
    def over(self) -> bool:
        """It is lost and nothing of it is alive."""
        return self.lost and len(self.ended | self.failed) == len(self.attempts)
