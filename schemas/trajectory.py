"""A trajectory's state, and `fold`, the one function that makes it from events.

Worked example, one tool call:

    admitted  "What is 12 * 34?"                          → next: generator
    turn      [given: prompt][sampled: <python>12*34</python>]  → next: toolbox (python)
    result    "408"                                       → next: generator
    turn      [given: observation][sampled: 408], last    → next: scorer
    scored    1.0                                         → next: nobody; the learner reads it
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from schemas.events import (
    TERMINAL,
    Admitted,
    AnyTrajectoryEvent,
    Call,
    Dropped,
    Evaluated,
    Expired,
    Failed,
    Finished,
    Result,
    Scored,
    Started,
    Turn,
)
from schemas.images import StoredImage
from schemas.tokens import Tokens

_ID = re.compile(r"([A-Za-z0-9_]+)-(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})")


class TrajectoryId(NamedTuple):
    """`g12-3-0`: group g12, member 3, attempt 0."""

    group: str
    member: int
    attempt: int

    @classmethod
    def parse(cls, text: str) -> "TrajectoryId":
        """Read what `str` wrote. Raises ValueError for anything else: a trajectory has one name."""
        parts = _ID.fullmatch(text)
        if parts is None:
            raise ValueError(f"not a trajectory id (<group>-<member>-<attempt>): {text!r}")
        return cls(parts[1], int(parts[2]), int(parts[3]))

    def __str__(self) -> str:
        return f"{self.group}-{self.member}-{self.attempt}"


class Hop(NamedTuple):
    """Where a trajectory goes next."""

    stage: str
    """`gen`, `tool` or `score`."""
    tool: str = ""
    """The queue of the call's tool; see Call."""


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the log says of one trajectory so far; travels in work messages."""

    admitted: Admitted
    turns: list[Turn] = []
    started: Started | None = None
    """The last external effect begun; its result may be missing."""
    results: list[Result] = []
    """Of all turns, in order; a result names its turn and call."""
    scored: Scored | None = None
    end: Evaluated | Expired | Failed | Dropped | Finished | None = None
    seq: int = 0
    """The log sequence of the last event folded; the next append expects it."""

    @property
    def id(self) -> str:
        """`<group>-<member>-<attempt>`."""
        return self.admitted.trajectory

    @property
    def group(self) -> str:
        """The group's part of the id."""
        return TrajectoryId.parse(self.id).group

    @property
    def tokens(self) -> Tokens:
        """All tokens so far, given and sampled, in order."""
        return Tokens.join([turn.tokens for turn in self.turns])

    @property
    def images(self) -> list[StoredImage]:
        """What it shows, in the order of its tokens: in the task's messages, then in results."""
        asked = [image for message in self.admitted.public.messages for image in message.images]
        return asked + [image for result in self.results for image in result.images]

    @property
    def reward(self) -> float | None:
        """What a scorer gave, or None."""
        if isinstance(self.end, Evaluated):
            return self.end.reward
        return self.scored.reward if self.scored else None

    @property
    def turn_text(self) -> str:
        """What the policy wrote in its last turn, joined over partial pieces."""
        return "".join(turn.text for turn in self.open_pieces(include_done=True))

    def open_pieces(self, *, include_done: bool = False) -> list[Turn]:
        """The pieces of a turn that was cut short and goes on; with `include_done`, of the last turn."""
        pieces: list[Turn] = []
        for turn in reversed(self.turns):
            if turn.finish_reason != "partial" and not (include_done and not pieces):
                break
            pieces.append(turn)
        return pieces[::-1]

    @property
    def turn_count(self) -> int:
        """Whole turns so far; a turn cut into pieces counts once."""
        return sum(turn.finish_reason != "partial" for turn in self.turns)

    def results_of(self, turn: int) -> list[Result]:
        """The results of one turn's calls so far, in call order."""
        return [result for result in self.results if result.turn == turn]

    @property
    def next_call(self) -> tuple[int, Call] | None:
        """The index and the first call of the last turn that has no result yet."""
        if not self.turns:
            return None
        done = len(self.results_of(len(self.turns) - 1))
        calls = self.turns[-1].calls
        return (done, calls[done]) if done < len(calls) else None

    @property
    def next_hop(self) -> Hop | None:
        """Who acts next; None once it is scored or ended, and when an external one's policy is to act."""
        if self.end or self.scored:
            return None
        if (self.turns and self.turns[-1].last) or (self.results and self.results[-1].last):
            return Hop("score")
        if call := self.next_call:
            return Hop("tool", call[1].queue)
        return None if self.admitted.purpose == "external" else Hop("gen")


def fold(state: Trajectory | None, event: AnyTrajectoryEvent, seq: int) -> Trajectory:
    """The state after one more event; concatenation only.

    Raises ValueError for an event that cannot follow: the first must be `admitted`, nothing comes after an end, and
    only an end after a score.
    """
    if isinstance(event, Admitted):
        if state is not None:
            raise ValueError(f"{event.trajectory} is admitted twice")
        return Trajectory(admitted=event, seq=seq)
    if state is None:
        raise ValueError(f"{event.trajectory} has {event.kind} before admitted")
    if state.end is not None:
        raise ValueError(f"{event.trajectory} has {event.kind} after {state.end.kind}")
    if state.scored is not None and not isinstance(event, TERMINAL):
        raise ValueError(f"{event.trajectory} has {event.kind} after scored")
    if isinstance(event, Turn):
        return replace(state, turns=[*state.turns, event], seq=seq)
    if isinstance(event, Result):
        return replace(state, results=[*state.results, event], seq=seq)
    if isinstance(event, Started):
        return replace(state, started=event, seq=seq)
    if isinstance(event, Scored):
        return replace(state, scored=event, seq=seq)
    assert isinstance(event, TERMINAL)
    return replace(state, end=event, seq=seq)


def fold_all(events: Iterable[tuple[AnyTrajectoryEvent, int]]) -> Trajectory | None:
    """The state after all events of one trajectory, each with its log sequence."""
    state = None
    for event, seq in events:
        state = fold(state, event, seq)
    return state
