"""The recorder: what the log says, as rows for analytics. Knows no bus and no files.

    closings(stored)          the trajectories whose fate this event is
    Lives                     the events of trajectories that have none yet
    rows(history, closing)    such a trajectory's row, and one for each of its turns
    Cut                       which events end a file

All are functions of the log alone, so the same log gives the same files. actors/archive_files.py has the columns.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import structlog

from actors.learner import NAME as LEARNER
from actors.rules import Fate
from bus.log import Stored, fold_stored
from schemas.events import (
    Admitted,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Expired,
    Failed,
    Filtered,
    Finished,
    Result,
    Scored,
    Started,
    Step,
    TrajectoryEvent,
    Turn,
)
from schemas.trajectory import Trajectory, TrajectoryId

log = structlog.get_logger()

TRAJECTORIES_PER_FILE = 512
SECONDS_PER_FILE = 60.0
"""By the server's clock, from the first fate in a file."""
BYTES_KEPT = 256 << 20
"""Of the events of trajectories under way."""

Row = dict[str, Any]


class Closing(NamedTuple):
    """What became of one trajectory."""

    trajectory: str
    fate: Fate
    seq: int
    time_s: float
    step: int | None = None
    reason: str | None = None


def closings(stored: Stored) -> list[Closing]:
    """The trajectories whose fate this event is, in its order; none for most events."""
    return [each for each in _closings(stored) if _is_id(each.trajectory)]


def _closings(stored: Stored) -> list[Closing]:
    event, seq, time_s = stored.event, stored.seq, stored.time_s
    if isinstance(event, Step | Filtered) and stored.subject.split(".")[3] != LEARNER:
        return []  # what another learner trains is no fate
    if isinstance(event, Step):
        return [Closing(name, "trained", seq, time_s, event.step) for name in event.trajectories]
    if isinstance(event, Filtered):
        return [
            Closing(name, "filtered", seq, time_s, reason=event.reason)
            for name in event.trajectories
        ]
    if isinstance(event, Evaluated):
        return [Closing(event.trajectory, "evaluated", seq, time_s)]
    if isinstance(event, Finished):
        return [Closing(event.trajectory, "finished", seq, time_s, reason=event.reason)]
    if isinstance(event, Expired):
        return [Closing(event.trajectory, "expired", seq, time_s, reason=event.reason)]
    if isinstance(event, Dropped):
        return [Closing(event.trajectory, "dropped", seq, time_s, reason=event.reason)]
    if isinstance(event, Failed):
        # without its detail: a scorer's exception may quote what it compares with
        return [Closing(event.trajectory, "failed", seq, time_s, reason=str(event.cause))]
    return []


def _is_id(text: str) -> bool:
    try:
        TrajectoryId.parse(text)
    except ValueError:
        return False
    return True


class Lives:
    """The events of trajectories under way, the oldest forgotten when there is no room.

    Only what began here is kept, so what is kept is whole: under the commit rule `admitted` comes once, and first.
    """

    def __init__(self) -> None:
        self._events: dict[str, list[Stored]] = {}
        self._bytes = 0

    def observe(self, stored: Stored) -> None:
        """Take one event in, in log order."""
        event = stored.event
        if not isinstance(event, TrajectoryEvent):
            return
        if isinstance(event, Admitted):
            self._events.setdefault(event.trajectory, [])
        known = self._events.get(event.trajectory)
        if known is not None:
            known.append(stored)
            self._bytes += _size(stored)
            while self._bytes > BYTES_KEPT:
                self.take(next(iter(self._events)))

    def take(self, trajectory: str) -> list[Stored] | None:
        """Its events so far, which are no longer kept; None when they are not: the log has them."""
        events = self._events.pop(trajectory, None)
        if events is not None:
            self._bytes -= sum(map(_size, events))
        return events


def _size(stored: Stored) -> int:
    """About what an event takes in memory."""
    event = stored.event
    if isinstance(event, Turn):
        return 2048 + 13 * len(event.tokens) + len(event.text)
    if isinstance(event, Result):
        return 2048 + len(event.text) + len(event.handed_in)
    return 2048


class Cut:
    """Says which event is the last of a file; one for each file."""

    def __init__(self) -> None:
        self._count = 0
        self._first_s = 0.0

    def after(self, stored: Stored, closed: int) -> bool:
        """Whether the file ends with this event, which closes so many. Call it with each, in log order."""
        if closed and not self._count:
            self._first_s = stored.time_s
        self._count += closed
        full = self._count >= TRAJECTORIES_PER_FILE
        late = self._count > 0 and stored.time_s - self._first_s >= SECONDS_PER_FILE
        return full or late or isinstance(stored.event, Ended)


# -- rows ------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What is written of one trajectory."""

    trajectory: Row
    turns: list[Row]

    @property
    def tokens(self) -> int:
        """How many tokens they hold."""
        return int(self.trajectory["tokens_given"] + self.trajectory["tokens_sampled"])


def rows(history: Iterable[Stored], closing: Closing) -> Rows | None:
    """The rows of a trajectory from its stored events up to its fate.

    None for a fate of no trajectory. Events that cannot follow one another are junk, and skipped as everywhere.
    """
    state: Trajectory | None = None
    accepted: list[Stored] = []
    for stored in history:
        folded = fold_stored(state, stored)
        if folded is not state:
            accepted.append(stored)
        state = folded
    by_learner = closing.fate in ("trained", "filtered")
    if state is None or not (by_learner or state.seq == closing.seq):
        log.warning(
            "a fate of no trajectory; skipped", trajectory=closing.trajectory, seq=closing.seq
        )
        return None
    return Rows(_trajectory_row(state, accepted, closing), _turn_rows(state, accepted, closing))


def _trajectory_row(state: Trajectory, accepted: Sequence[Stored], closing: Closing) -> Row:
    admitted, tokens = state.admitted, state.tokens
    name = TrajectoryId.parse(state.id)
    versions = set(tokens.versions_T) - {-1}
    scored = state.end if isinstance(state.end, Evaluated) else state.scored
    return {
        "trajectory": state.id,
        "group": name.group,
        "member": name.member,
        "attempt": name.attempt,
        "task": admitted.task,
        "purpose": admitted.purpose,
        "fate": closing.fate,
        "step": closing.step,
        "reason": closing.reason,
        "reward": state.reward,
        "reward_parts": sorted(scored.parts.items()) if scored else [],
        "messages": [{"role": m.role, "content": m.content} for m in admitted.public.messages],
        "turns": state.turn_count,
        "tool_calls": sum(len(turn.calls) for turn in state.turns),
        "tool_errors": sum(not result.ok for result in state.results),
        "finish_reason": state.turns[-1].finish_reason if state.turns else None,
        "tokens_given": len(tokens) - tokens.sampled_count,
        "tokens_sampled": tokens.sampled_count,
        "version_min": min(versions, default=None),
        "version_max": max(versions, default=None),
        "min_policy_version": admitted.min_policy_version,
        "pinned_policy_version": admitted.pinned_policy_version,
        "temperature": admitted.temperature,
        "seed": admitted.seed,
        **_times(accepted, closing),
        "tool_run_s": sum(result.duration_ms for result in state.results) / 1e3,
        "replicas": list(dict.fromkeys(stored.event.replica for stored in accepted)),
        "admitted_seq": accepted[0].seq,
        "closed_seq": closing.seq,
    }


_STAGES: dict[type[Event], str] = {
    Turn: "generating_s",
    Started: "tools_s",
    Result: "tools_s",
    Scored: "scoring_s",
    Evaluated: "scoring_s",
}
"""What the time before an event was spent on."""


def _times(accepted: Sequence[Stored], closing: Closing) -> Row:
    """When a trajectory was where; the spans add up to its whole life."""
    spent_us = dict.fromkeys(("generating_s", "tools_s", "scoring_s", "closing_s"), 0)
    scored_us = None
    before_us = admitted_us = _microseconds(accepted[0].time_s)
    for stored in accepted[1:]:
        at_us = _microseconds(stored.time_s)
        spent_us[_STAGES.get(type(stored.event), "closing_s")] += at_us - before_us
        before_us = at_us
        if isinstance(stored.event, Scored | Evaluated):
            scored_us = at_us
    closed_us = _microseconds(closing.time_s)
    spent_us["closing_s"] += closed_us - before_us
    return {
        "admitted_at": admitted_us,
        "scored_at": scored_us,
        "closed_at": closed_us,
        **{name: us / 1e6 for name, us in spent_us.items()},
    }


def _turn_rows(state: Trajectory, accepted: Sequence[Stored], closing: Closing) -> list[Row]:
    results: dict[int, list[Row]] = {}
    found: list[Row] = []
    for stored in accepted:
        event = stored.event
        if isinstance(event, Result):
            results.setdefault(event.turn, []).append(_result(event, stored))
    for stored in accepted:
        event = stored.event
        if isinstance(event, Turn):
            number = len(found)
            found.append(
                {
                    "trajectory": state.id,
                    "closed_seq": closing.seq,
                    "turn": number,
                    "seq": stored.seq,
                    "at": _microseconds(stored.time_s),
                    "replica": event.replica,
                    "text": event.text,
                    "finish_reason": event.finish_reason,
                    "last": event.last,
                    "feedback": event.feedback,
                    "ids": event.tokens.ids,
                    "mask": event.tokens.mask,
                    "logprobs": event.tokens.logprobs,
                    "versions": event.tokens.versions,
                    "calls": [
                        {
                            "tool": call.tool,
                            "version": call.version,
                            "arguments": _as_json(call.arguments),
                        }
                        for call in event.calls
                    ],
                    "results": results.get(number, []),
                }
            )
    return found


def _as_json(arguments: dict[str, Any]) -> str:
    """What JSON has no word for, and a message may hold, as Python writes it."""
    try:
        return msgspec.json.encode(arguments).decode()
    except TypeError:
        return msgspec.json.encode(repr(arguments)).decode()


def _result(event: Result, stored: Stored) -> Row:
    return {
        "call": event.call,
        "text": event.text,
        "ok": event.ok,
        "duration_ms": event.duration_ms,
        "tier": event.tier,
        "replica": event.replica,
        "at": _microseconds(stored.time_s),
    }


def _microseconds(time_s: float) -> int:
    return round(time_s * 1e6)
