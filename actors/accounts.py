"""The accounts of a run, folded from its log: what became of every trajectory, and which rules are broken.

    admitted = trained + filtered + evaluated + finished + expired + failed + dropped + in flight      each id once

An id is trained or filtered because the learner's log says so (`step`, `filtered`); every other fate is its own last
event. Of a trajectory that has its fate only the name and the fate are kept, of a living one a few numbers.

Shapes: T tokens of a turn, K of them sampled.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from actors.learner import NAME
from actors.live import ATTEMPTS
from actors.rules import FATES, RULES, Fate, Report, Rule
from schemas.events import (
    Admitted,
    AnyEvent,
    Archived,
    Dropped,
    Ended,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Finished,
    Opened,
    Result,
    Scored,
    Step,
    Stepped,
    TrajectoryEvent,
    Turn,
)
from schemas.recipe import Asynchrony, Learner
from schemas.trajectory import TrajectoryId

_PLACE = re.compile(r"(g(0|[1-9][0-9]{0,8}))(?:r([1-9][0-9]{0,8}))?")
"""A group of the data: `g12`, or `g12r1` once that has expired; see actors/tasks.py."""


class _Life:
    """A trajectory without a fate."""

    __slots__ = ("admitted", "answered", "calls", "last", "oldest", "rewarded", "task", "turns")

    def __init__(self, event: Admitted) -> None:
        self.admitted = (event.purpose, event.min_policy_version, event.pinned_policy_version)
        self.task = event.task
        self.turns = 0
        self.calls = 0
        """Of the last turn; none when nothing follows it but the score."""
        self.answered = 0
        self.last = False
        self.rewarded = False
        self.oldest: int | None = None
        """The oldest version that sampled a token of it."""

    @property
    def stage(self) -> str:
        if self.rewarded:
            return "scored"
        if self.last:
            return "score"
        return "tool" if self.answered < self.calls else "gen"


class _Group:
    """One group that was admitted."""

    __slots__ = ("expired", "living", "task")

    def __init__(self, task: str) -> None:
        self.task = task
        self.living = 0
        self.expired = False


class Accounts:
    """Folds a whole log, in its order. Knows no bus."""

    def __init__(self) -> None:
        self.ended = False
        self.archived = False
        self.admitted = 0
        self.fates: dict[str, Fate] = {}
        self.live: dict[str, _Life] = {}
        self.broken: defaultdict[Rule, list[str]] = defaultdict(list)
        self._failed_by_cause: Counter[str] = Counter()
        self._filtered_by_reason: Counter[str] = Counter()
        self._groups: dict[str, _Group] = {}
        self._learner, self._max_staleness = Learner(), Asynchrony().max_staleness
        self._slots = 0
        """The most groups that may be admitted at once."""
        self._next_place = 0
        self._missing_places: set[int] = set()
        """Numbers below `_next_place` of which no group was admitted."""
        self._begun = 0
        self._made = 0
        self._version = 0
        """The newest that may be published."""
        self._filtered: set[str] = set()
        """Groups filtered since the last step began."""

    def observe(self, event: AnyEvent, learner: str = NAME) -> None:
        """Take one event in; `learner` says in whose write-ahead log it stands, if in any."""
        if isinstance(event, TrajectoryEvent):
            self._follow(event)
        elif isinstance(event, Opened):
            self._learner = event.recipe.learner
            self._max_staleness = event.recipe.asynchrony.max_staleness
            slots = self._learner.groups_per_step * (self._max_staleness + 1)
            self._slots = max(self._slots, slots)
        elif isinstance(event, Ended):
            self.ended = True
        elif isinstance(event, Archived):
            self.archived = True
        elif learner == NAME:  # what another learner trains is no fate
            self._learn(event)

    def report(self, run: str = "", *, junk: int = 0, dead_letters: int = 0) -> Report:
        """What it comes to at this point of the log."""
        broken = {
            rule: list(dict.fromkeys(self.broken[rule])) for rule in RULES if rule in self.broken
        }
        # a lost admission is the next one made, so only those made together with it can be ahead of it
        skipped = [n for n in sorted(self._missing_places) if n + self._slots < self._next_place]
        if skipped:
            broken["prompt_skipped"] = [f"g{number}" for number in skipped]
        if self.ended and self.live:
            broken["in_flight_at_end"] = list(self.live)
        fates = Counter(self.fates.values())
        return Report(
            run=run,
            balanced=not broken,
            ended=self.ended,
            archived=self.archived,
            steps=self._made,
            admitted=self.admitted,
            fates={fate: fates[fate] for fate in FATES},
            in_flight=len(self.live),
            in_flight_by_stage=dict(Counter(life.stage for life in self.live.values())),
            failed_by_cause=dict(self._failed_by_cause),
            filtered_by_reason=dict(self._filtered_by_reason),
            broken=broken,
            junk=junk,
            dead_letters=dead_letters,
        )

    # -- trajectories ------------------------------------------------------------------------------

    def _follow(self, event: TrajectoryEvent) -> None:
        name = event.trajectory
        if isinstance(event, Admitted):
            self._admit(event)
        elif isinstance(event, Evaluated | Expired | Failed | Dropped | Finished):
            self._end(event)
        elif (life := self.live.get(name)) is None:
            self._break("after_end" if name in self.fates else "never_admitted", name)
        elif isinstance(event, Turn):
            self._turn(event, life)
        elif isinstance(event, Result):
            self._result(event, life)
        elif isinstance(event, Scored):
            if life.stage != "score" or life.admitted[0] != "train":
                self._break("out_of_turn", name)
            life.rewarded = True

    def _admit(self, event: Admitted) -> None:
        name = event.trajectory
        if name in self.live or name in self.fates:
            self._break("admitted_twice", name)
            return
        self.admitted += 1
        self.live[name] = _Life(event)
        place = _parse(name)
        if place.attempt >= ATTEMPTS:
            self._break("too_many_attempts", name)
        before = str(place._replace(attempt=place.attempt - 1))
        if place.attempt and self.fates.get(before) != "failed":
            self._break("replaced_unfailed", name)
        group = self._groups.get(place.group)
        if group is None:
            group = self._groups[place.group] = _Group(event.task)
            if event.purpose == "train":
                self._place(place.group, event.task)
        elif group.task != event.task:
            self._break("broken_group", name)
        group.living += 1

    def _place(self, name: str, task: str) -> None:
        """Each row once and in order; again only after its group was expired whole."""
        place = _PLACE.fullmatch(name)
        if place is None:
            return  # not from the data
        first, number, repeat = place[1], int(place[2]), int(place[3] or 0)
        if repeat:
            before = self._groups.get(f"{first}r{repeat - 1}" if repeat > 1 else first)
            if before is None or before.living or not before.expired:
                self._break("prompt_repeated", name)
            elif before.task != task:
                self._break("broken_group", name)
            return
        self._missing_places |= set(range(self._next_place, number))
        self._missing_places.discard(number)
        self._next_place = max(self._next_place, number + 1)

    def _turn(self, event: Turn, life: _Life) -> None:
        if life.stage != "gen":
            self._break("out_of_turn", event.trajectory)
        life.turns += 1
        life.last = event.last
        life.calls = 0 if event.last else len(event.calls)
        life.answered = 0
        mask_T = np.frombuffer(event.tokens.mask, np.bool_)
        versions_K = np.frombuffer(event.tokens.versions, "<i4")[mask_T]
        if not len(versions_K):
            return
        _, at_least, pinned = life.admitted
        oldest, newest = int(versions_K.min()), int(versions_K.max())
        asked = oldest >= at_least if pinned is None else oldest == newest == pinned
        if newest > self._version or not asked:
            self._break("unpublished_version", event.trajectory)
        life.oldest = oldest if life.oldest is None else min(life.oldest, oldest)

    def _result(self, event: Result, life: _Life) -> None:
        current = event.turn == life.turns - 1
        if event.turn < life.turns - 1 or (current and event.call < life.answered):
            self._break("result_twice", event.trajectory)
        elif not current or event.call >= life.calls:
            self._break("unasked_result", event.trajectory)
        else:
            if event.call > life.answered:
                self._break("out_of_turn", event.trajectory)
            life.answered = event.call + 1
            life.last = event.last

    def _end(self, event: Evaluated | Expired | Failed | Dropped | Finished) -> None:
        life = self.live.get(event.trajectory)
        if isinstance(event, Evaluated) and life is not None:
            if life.stage != "score" or life.admitted[0] != "eval":
                self._break("out_of_turn", event.trajectory)
        elif isinstance(event, Finished) and life is not None:
            # at any time: its trainer may have given up on a call
            if life.admitted[0] != "external":
                self._break("out_of_turn", event.trajectory)
        elif isinstance(event, Failed) and life is not None:
            self._failed_by_cause[str(event.cause)] += 1
        elif isinstance(event, Expired) and life is not None:
            self._groups[_parse(event.trajectory).group].expired = True
        fate: Fate = event.kind  # type: ignore[assignment] # the terminal kinds are fates
        self._settle(event.trajectory, fate)

    def _settle(self, name: str, fate: Fate) -> None:
        """Give a trajectory its one fate."""
        if self.live.pop(name, None) is not None:
            self.fates[name] = fate
            self._groups[_parse(name).group].living -= 1
        elif name not in self.fates:
            self._break("never_admitted", name)
        elif self.fates[name] != fate:
            self._break("two_fates", name)
        elif fate == "trained":
            self._break("trained_twice", name)
        else:
            self._break("filtered_twice" if fate == "filtered" else "after_end", name)

    def _break(self, rule: Rule, what: str) -> None:
        self.broken[rule].append(what)

    # -- the learner -------------------------------------------------------------------------------

    def _learn(self, event: AnyEvent) -> None:
        if isinstance(event, Filtered):
            self._filter(event)
        elif isinstance(event, Step):
            self._begin(event)
        elif isinstance(event, Stepped):
            self._finish(event)

    def _filter(self, event: Filtered) -> None:
        if event.group in self._filtered:
            self._break("filtered_twice", event.group)
        self._filtered.add(event.group)
        self._filtered_by_reason[event.reason] += len(event.trajectories)
        if any(_group_of(name) != event.group for name in event.trajectories):
            self._break("broken_group", event.group)
        self._check_group(event.group, event.trajectories)
        for name in event.trajectories:
            self._settle(name, "filtered")

    def _begin(self, event: Step) -> None:
        step = f"step {event.step}"
        if event.step <= self._begun:
            self._break("step_repeated", step)
        elif not self._begun == self._made == event.start_version == event.step - 1:
            self._break("step_order", step)
        if set(event.filtered) != self._filtered or len(event.filtered) != len(self._filtered):
            self._break("filtered_unlisted", step)
        self._begun = max(self._begun, event.step)
        self._filtered.clear()
        for group, members in itertools.groupby(event.trajectories, _group_of):
            names = list(members)
            self._check_group(group, names)
            for name in names:
                self._check_age(name, event.start_version)
                self._settle(name, "trained")

    def _finish(self, event: Stepped) -> None:
        step = f"step {event.step}"
        if event.step <= self._made:
            self._break("step_repeated", step)
        elif event.step > self._begun:
            self._break("stepped_unbegun", step)
        elif event.step != self._made + 1:
            self._break("step_order", step)
        if event.policy_version != event.step:
            self._break("version_not_step", step)
        self._made = max(self._made, event.step)
        self._version = max(self._version, event.policy_version)

    def _check_group(self, group: str, names: Sequence[str]) -> None:
        """A group is taken whole: every slot once, scored, on one task."""
        slots = sorted(_parse(name).member for name in names)
        lives = [life for name in names if (life := self.live.get(name)) is not None]
        whole = slots == list(range(self._learner.group_size))
        # one that is not alive breaks a rule of its own
        if not whole or not all(life.rewarded for life in lives):
            self._break("broken_group", group)

    def _check_age(self, name: str, start_version: int) -> None:
        life = self.live.get(name)
        if life is None or life.oldest is None:
            return
        if start_version - life.oldest > self._max_staleness:
            self._break("too_stale", name)


def _parse(name: str) -> TrajectoryId:
    """The parts of a name; one that has none is a group of its own, without members."""
    try:
        return TrajectoryId.parse(name)
    except ValueError:
        return TrajectoryId(name, -1, 0)


def _group_of(name: str) -> str:
    return _parse(name).group
