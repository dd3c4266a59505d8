"""Where a trajectory is in the flow, from its events alone, for those who need no more of it than that."""

from typing import NamedTuple

from schemas.events import AnyTrajectoryEvent, Result, Scored, Turn


class Place(NamedTuple):
    """The stage whose turn it is: what `Trajectory.next_hop` says, without the trajectory."""

    stage: str = "gen"
    """`gen`, `tool`, `score`, or `scored`: its group or the learner is waited for."""
    tools: tuple[str, ...] = ()
    """The queues of the last turn's calls that have no result yet, in order."""

    @property
    def queue(self) -> str:
        """Where its work message lies, in the words of `bus.work.backlog`."""
        return f"tool.{self.tools[0]}" if self.tools else self.stage

    def after(self, event: AnyTrajectoryEvent) -> "Place":
        """Where the event leaves it; one that ends it leaves it where it was."""
        if isinstance(event, Turn | Result) and event.last:
            return Place("score")
        if isinstance(event, Turn):
            return _with_tools(tuple(call.queue for call in event.calls))
        if isinstance(event, Result):
            return _with_tools(self.tools[1:])
        return Place("scored") if isinstance(event, Scored) else self


def _with_tools(tools: tuple[str, ...]) -> Place:
    return Place("tool", tools) if tools else Place("gen")
