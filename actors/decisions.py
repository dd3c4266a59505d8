"""What the dispatcher sees beside the log, and what it may decide."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from actors.row_images import RowImage
from bus.work import Queue
from schemas.events import Admitted, Dropped, Ended, Expired, Failed


class View(NamedTuple):
    """What the dispatcher sees beside the log."""

    now_s: float
    policy_version: int
    """Of the pointer; -1 before version 0."""
    generators: int = 1
    """Live replicas."""
    held: Mapping[str, float] = {}
    """Trajectories that live replicas say they are working on, each with the seconds since the last one took it."""
    queues: Mapping[str, Queue] = {}
    """The work queues, by `Place.queue`."""
    shortage: str = ""
    """Why there is no room for more; what is in flight goes on."""


class Admit(NamedTuple):
    """Put images and the private part away if there are any, then append these and wake a generator for each."""

    events: list[Admitted]
    private: dict[str, Any] | None = None
    images: tuple[RowImage, ...] = ()
    """Of the messages, which are the same in all of them."""


class End(NamedTuple):
    """Append these in order, each after its sequence; stop at the first that has moved."""

    events: list[tuple[Expired | Failed | Dropped, int]]


class Sweep(NamedTuple):
    """Send the trajectory's next work message again."""

    trajectory: str


class Wake(NamedTuple):
    """Send the trajectory's next work message: the barrier is open."""

    trajectory: str


class Finish(NamedTuple):
    """Append the run's end."""

    event: Ended


Decision = Admit | End | Sweep | Wake | Finish
