"""The watchdog: names what stands still, who has it and for how long. Pure; it is shown what there is to see.

    look(sight)          what the acting dispatcher sees, once a second
    why_hung(...)        why a supervisor should kill a child of its own
    known_stalls(beats)  what all of them say, for people; a missing dispatcher shows in the beats alone

A wait is a stall when it has lasted for its patience: a stage's deadline where work is being done, seconds where
nobody is there to do it. Each has a key (kind and subject) by which its beginning and its end are told once.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from actors.fleet import HEARD_S, Heard
from actors.heartbeat import STARTING
from bus.work import Queue
from schemas.messages import Heartbeat, RoleName, Stall, StallKind
from schemas.recipe import Deadlines, Recipe, stage_limits_s
from schemas.trajectory import TrajectoryId

ROLE_OF: dict[str, RoleName] = {
    "gen": "generator",
    "tool": "toolbox",
    "score": "scorer",
    "scored": "learner",
}
"""Who is to act at a trajectory's stage."""

_ABSENT_S = 2.0
"""A role may be away for so long, e.g. while it is restarted."""
SILENT_S = 5.0
"""A replica that holds something may be silent, or its loop blocked, for so long."""
_STARTING_FACTOR = 4.0
"""How much longer a replica may block while it loads libraries and models."""
_NAMED = 3
"""Groups of a waiting learner, and members of each, that are named."""


Key = tuple[StallKind, str]
"""A stall's kind and subject."""


class Waiting(NamedTuple):
    """A trajectory that has not ended."""

    stage: str
    """As in actors/place.py."""
    queue: str
    since_s: float
    """When its last event was seen, on the clock of `now_s`."""
    trained: bool = True
    """False for an evaluation, which the learner does not wait for."""


class Sight(NamedTuple):
    """What there is to see."""

    now_s: float
    live: Mapping[str, Waiting]
    heard: Sequence[Heard]
    queues: Mapping[str, Queue] = {}
    policy_version: int = 0


class Changes(NamedTuple):
    """What one look found."""

    stalls: list[Stall]
    """All there are, the longest first."""
    begun: list[Stall]
    ended: list[Stall]
    """As they were when last seen."""


class _Finding(NamedTuple):
    """Something that waits, whether or not it is a stall yet."""

    kind: StallKind
    subject: str
    detail: str
    patience_s: float
    since_s: float | None = None
    """None when only the looks tell: since the first that found it."""


class Watchdog:
    """Looks again and again, and remembers since when."""

    def __init__(self, recipe: Recipe) -> None:
        self._limits = stage_limits_s(recipe.deadlines)
        self._since: dict[Key, float] = {}
        self._taken: dict[str, tuple[int, float]] = {}
        """Of each queue: messages given out, and when that number was first seen."""
        self._open: dict[Key, Stall] = {}

    def look(self, sight: Sight) -> Changes:
        """What stands still now, and what has begun or ceased to since the last look."""
        found = {(each.kind, each.subject): each for each in self._findings(sight)}
        self._since = {
            key: self._since.get(key, sight.now_s) if each.since_s is None else each.since_s
            for key, each in found.items()
        }
        stalls = {
            key: Stall(
                kind=each.kind,
                subject=each.subject,
                detail=each.detail,
                for_s=for_s,
            )
            for key, each in found.items()
            if (for_s := sight.now_s - self._since[key]) >= each.patience_s
        }
        begun = [stall for key, stall in stalls.items() if key not in self._open]
        ended = [stall for key, stall in self._open.items() if key not in stalls]
        self._open = stalls
        longest_first = sorted(stalls.values(), key=lambda stall: -stall.for_s)
        return Changes(longest_first, begun, ended)

    def _findings(self, sight: Sight) -> Iterator[_Finding]:
        alive = [beat for beat, silent_s in sight.heard if silent_s < HEARD_S]
        holders = _holders(alive)
        yield from _absent(sight, alive)
        yield from _silent(sight, holders)
        yield from _blocked(sight)
        yield from self._held(sight, alive)
        yield from self._lost(sight, holders)
        yield from self._queues(sight, alive)
        yield from self._learner(sight, alive, holders)

    def _held(self, sight: Sight, alive: Sequence[Heartbeat]) -> Iterator[_Finding]:
        for beat in alive:
            for held in beat.held:
                limit = self._limits.get(held.stage)
                if limit is not None and held.for_s > limit:
                    detail = f"{held.trajectory} ({held.stage}) is held by {beat.replica}"
                    since_s = sight.now_s - held.for_s
                    yield _Finding("held", held.trajectory, detail, limit, since_s)

    def _lost(self, sight: Sight, holders: Mapping[str, str]) -> Iterator[_Finding]:
        for name, waiting in sight.live.items():
            limit = self._limits.get(waiting.stage)
            if limit is None or sight.now_s - waiting.since_s < limit or name in holders:
                continue
            if not sight.queues.get(waiting.queue, Queue()).waiting:
                detail = f"{name} ({waiting.stage}) has no event and nobody holds it"
                yield _Finding("lost", name, detail, limit, waiting.since_s)

    def _queues(self, sight: Sight, alive: Sequence[Heartbeat]) -> Iterator[_Finding]:
        roles = {beat.role for beat in alive}
        for name, queue in sight.queues.items():
            if queue.taken != self._taken.get(name, (None, 0.0))[0]:
                self._taken[name] = (queue.taken, sight.now_s)
            stage = name.partition(".")[0]
            if not queue.waiting:
                self._taken[name] = (queue.taken, sight.now_s)
            elif ROLE_OF[stage] in roles:
                detail = f"{queue.waiting} messages wait in {name} and none is taken"
                yield _Finding("queue", name, detail, self._limits[stage], self._taken[name][1])

    def _learner(
        self, sight: Sight, alive: Sequence[Heartbeat], holders: Mapping[str, str]
    ) -> Iterator[_Finding]:
        for beat in alive:
            if beat.role != "learner" or not beat.phase.startswith("waiting for "):
                continue
            patience_s = max(self._limits.values()) if "groups" in beat.phase else SILENT_S
            missing = _missing_members(sight.live, holders)
            detail = f"{beat.replica} is {beat.phase} at version {beat.policy_version}: "
            detail += missing or "no group is in flight"
            # with each version it waits anew
            subject = f"{beat.replica} {beat.phase} {beat.policy_version}"
            yield _Finding("learner", subject, detail, patience_s)


def _holders(alive: Sequence[Heartbeat]) -> dict[str, str]:
    """Trajectory → the replica that says it works on it."""
    return {held.trajectory: beat.replica for beat in alive for held in beat.held}


def _absent(sight: Sight, alive: Sequence[Heartbeat]) -> Iterator[_Finding]:
    """Roles that nobody plays while work waits for them."""
    roles = {beat.role for beat in alive}
    waiting: dict[str, list[str]] = defaultdict(list)
    for name, each in sight.live.items():
        waiting[each.stage].append(name)
    for stage, role in ROLE_OF.items():
        names = waiting[stage]
        if role in roles or not names:
            continue
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        wait = "waits" if len(names) == 1 else "wait"
        detail = (
            f"no {role} is there; {names[0]}{more} {wait} for one (`actors run {role}` adds one)"
        )
        yield _Finding("no_replica", role, detail, _ABSENT_S)
    if sight.policy_version < 0 and "learner" not in roles:
        detail = "no learner is there to make version 0; nothing is admitted before"
        yield _Finding("no_replica", "learner", detail, _ABSENT_S)


def _silent(sight: Sight, holders: Mapping[str, str]) -> Iterator[_Finding]:
    """Replicas that held something when they were last heard of, which nobody has moved or taken since."""
    last_holder = {
        held.trajectory: beat.replica
        for beat, _ in sorted(sight.heard, key=lambda heard: -heard.silent_s)
        for held in beat.held
    }
    for beat, silent_s in sight.heard:
        if silent_s < HEARD_S:
            continue
        heard_at_s = sight.now_s - silent_s
        kept = [
            held.trajectory
            for held in beat.held
            if (live := sight.live.get(held.trajectory)) is not None
            and (live.stage == held.stage and live.since_s < heard_at_s)
            and held.trajectory not in holders
            and last_holder[held.trajectory] == beat.replica
        ]
        if kept:
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            detail = f"{beat.replica} gives no sign of life and had {kept[0]}{more}"
            yield _Finding("silent", beat.replica, detail, SILENT_S, heard_at_s)


def _blocked(sight: Sight) -> Iterator[_Finding]:
    """Replicas whose heartbeat thread runs and whose event loop does not."""
    for beat, silent_s in sight.heard:
        if silent_s < HEARD_S and beat.phase not in STARTING:
            detail = f"{beat.replica}'s event loop does not run"
            if beat.held:
                detail += f"; it has {beat.held[0].trajectory} ({beat.held[0].stage})"
            if beat.loop_lag_s > SILENT_S:
                since_s = sight.now_s - silent_s - beat.loop_lag_s
                yield _Finding("blocked", beat.replica, detail, SILENT_S, since_s)


def _missing_members(live: Mapping[str, Waiting], holders: Mapping[str, str]) -> str:
    """Which groups miss which members, and where those are; the groups nearest to completion."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, waiting in live.items():
        if waiting.trained and waiting.stage != "scored":
            holder = f", held by {holders[name]}" if name in holders else ""
            groups[TrajectoryId.parse(name).group].append(f"{name} ({waiting.stage}{holder})")
    nearest = sorted(groups.items(), key=lambda group: len(group[1]))[:_NAMED]
    return "; ".join(
        f"group {group} misses {', '.join(members[:_NAMED])}"
        + (f" and {len(members) - _NAMED} more" if len(members) > _NAMED else "")
        for group, members in nearest
    )


# -- a supervisor and its children -----------------------------------------------------------------


def why_hung(heard: Heard | None, up_s: float, flows_s: float, deadlines: Deadlines) -> str:
    """Why a child, whose process is alive, is to be killed and replaced; empty when all is well.

    Only what happened while heartbeats flowed counts (`flows_s`): a server that is away is nobody's hang.
    """
    starting = heard is None or heard.beat.phase in STARTING
    patience_s = deadlines.hang_s * (_STARTING_FACTOR if starting else 1.0)
    silent_s = min(heard.silent_s if heard else up_s, flows_s)
    if silent_s > patience_s:
        return f"no sign of life for {silent_s:.0f} s"
    if heard is None or heard.silent_s > HEARD_S:
        return ""
    if min(heard.beat.loop_lag_s, flows_s) > patience_s:
        return f"its event loop has not run for {heard.beat.loop_lag_s:.0f} s"
    limits = stage_limits_s(deadlines)
    for held in heard.beat.held:
        if min(held.for_s, flows_s) > 2 * limits.get(held.stage, float("inf")):
            return f"{held.trajectory} ({held.stage}) has been held for {held.for_s:.0f} s"
    return ""


# -- for people ------------------------------------------------------------------------------------


def without_dispatcher(beats: Sequence[Heartbeat]) -> str:
    """Why nobody coordinates; empty when somebody does."""
    dispatchers = [beat for beat in beats if beat.role == "dispatcher"]
    if not dispatchers:
        return "no dispatcher is there: nothing is admitted, replaced or swept"
    waiting = [beat for beat in dispatchers if beat.phase in ("starting", "standby")]
    if len(waiting) < len(dispatchers):
        return ""
    return f"no dispatcher holds the lease: {len(waiting)} wait for it"


def known_stalls(beats: Sequence[Heartbeat]) -> dict[Key, Stall]:
    """What the beats tell of, each stall once, the longest first."""
    told: dict[Key, Stall] = {}
    for stall in sorted((each for beat in beats for each in beat.stalls), key=lambda e: -e.for_s):
        told.setdefault((stall.kind, stall.subject), stall)
    return told
