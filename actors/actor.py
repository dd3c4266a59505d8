"""What an actor is: a trajectory in, its next event out, and nothing about how they travel."""

from typing import ClassVar, Protocol

from bus.subjects import Stage
from schemas.events import AnyTrajectoryEvent, Boundary, Event
from schemas.trajectory import Trajectory


class HopFailed(Exception):
    """An actor could not take its hop: infrastructure, never the policy."""

    def __init__(self, boundary: Boundary, code: str, detail: str, *, final: bool = False) -> None:
        """`final`: it is not to be tried again."""
        super().__init__(f"{boundary}.{code}: {detail}")
        self.final = final
        self.boundary = boundary
        self.code = code
        self.detail = detail


class Actor(Protocol):
    """One stage of the flow. Several hops run at once."""

    stage: ClassVar[Stage]
    produces: ClassVar[tuple[type[Event], ...]]

    async def handle(self, state: Trajectory) -> AnyTrajectoryEvent:
        """The event that follows; after `started`, when that is appended, the one that follows it.

        Raises HopFailed when infrastructure fails.
        """
        ...

    async def drain(self) -> None:
        """Bring running hops to an end soon: what is begun may come back as a partial turn."""
        ...

    async def close(self) -> None:
        """Free everything."""
        ...
