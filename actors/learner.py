"""The learner: reads the log, forms batches of complete groups, and says what to train.

    observe(event)   what the log says
    plan(version)    groups to filter, and the next step once its batch is full

A batch closes at `groups_per_step` groups with signal, or at `refill_limit` times as many completed groups with at
least one. What was trained or filtered is what the write-ahead log says; there is no second ledger.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from learner.groups import outcome, refusal, zero_variance
from schemas.events import (
    Admitted,
    AnyEvent,
    AnyLearnerEvent,
    Failed,
    Filtered,
    Scored,
    Step,
    Stepped,
    TrajectoryEvent,
    Turn,
)
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory, TrajectoryId, fold

_NEVER = 1 << 30
"""The version of who sampled nothing."""

NAME = "main"
"""The name in the log of the learner whose steps make the run's versions."""


LOG_PLACE = "log.json"
"""The file of a checkpoint that says where to read on; without it a learner reads the whole log."""


def is_shadow(learner: str) -> bool:
    """Whether a name in the log is that of a learner that trains beside the main one: it is no part of the run."""
    return learner not in ("", NAME)


class LogPlace(msgspec.Struct, frozen=True):
    """Where a checkpoint stands in the log; lies in it as `LOG_PLACE`."""

    read_seq: int = 0
    """All that is still needed was admitted after this sequence."""
    learner_seq: int = 0
    """The last sequence of the learner's own log."""


class Batch(NamedTuple):
    """What one step trains, and what it reports on."""

    step: Step
    groups: list[list[Trajectory]]
    """In batch order; members by slot."""
    filtered: list[Trajectory]
    """Of zero-variance groups completed since the last step: they count in the step's rewards."""


class Planner:
    """Folds the log into groups. Knows no bus and no torch."""

    def __init__(
        self, recipe: Recipe, checkpoint_step: int, replica: str = "", seq: int = 0
    ) -> None:
        """`seq`: that of our own log when the checkpoint was taken, for who does not read all before it."""
        self._recipe = recipe
        self._replica = replica
        self._checkpoint_step = checkpoint_step
        self.step = checkpoint_step
        """The last step begun."""
        self._checkpoint_seq = seq
        self._followed_seq = 0
        """The last sequence of our own write-ahead log that was observed."""
        self.stepped: dict[int, Stepped] = {}
        self.batches: dict[int, Batch] = {}
        """Steps begun and not in the checkpoint: to be trained, or trained again."""
        self.trajectories: dict[str, Trajectory] = {}
        self._admitted: dict[str, int] = {}
        """Trajectory → the sequence of its admission, while it may be needed."""
        self._oldest: dict[str, int] = {}
        """Live trajectory → the oldest version that sampled a token of it."""
        self._scored: dict[str, dict[int, str]] = {}
        """Group → member → its scored trajectory."""
        self._ready: list[str] = []
        """Complete groups in the order in which they became so."""
        self._checked: set[str] = set()
        """Ready groups that `filters` has found good for the version below."""
        self._checked_version = -1
        self._filtered: dict[str, list[Trajectory]] = {}
        """Groups filtered since the last step, with those of their members that count in its rewards."""
        self._filtered_seq = 0
        """Of the first of them."""
        self.failed_by_cause: Counter[str] = Counter()
        """Since the last step, as are the next two."""
        self.sampled_tokens = 0
        self.since_s = 0.0
        self.now_s = 0.0
        """Server time of the newest event."""

    # -- what the log says -------------------------------------------------------------------------

    def observe(self, event: AnyEvent, seq: int, time_s: float) -> None:
        """Take one event in, in log order."""
        self.now_s = max(self.now_s, time_s)
        if isinstance(event, TrajectoryEvent):
            self._follow(event, seq)
        elif isinstance(event, AnyLearnerEvent) and seq > self._followed_seq:
            self._followed_seq = seq
            if isinstance(event, Filtered):
                self._filtered_seq = self._filtered_seq or seq
            self._remember(event)

    @property
    def seq(self) -> int:
        """The last sequence of our own write-ahead log."""
        return max(self._followed_seq, self._checkpoint_seq)

    def needed_from(self, read_seq: int) -> int:
        """After which sequence a learner with a checkpoint of this moment reads on; `read_seq`: up to where we have."""
        self._forget_admissions()
        filtered = [self._filtered_seq] if self._filtered_seq else []
        return min([*self._admitted.values(), *filtered, read_seq + 1]) - 1

    def _forget_admissions(self) -> None:
        batches = self.batches.values()
        kept = [*(batch.filtered for batch in batches), *self._filtered.values()]
        kept += [group for batch in batches for group in batch.groups]
        members = [member for each in kept for member in each]
        needed = self.trajectories.keys() | {member.id for member in members}
        self._admitted = {name: seq for name, seq in self._admitted.items() if name in needed}

    def _remember(self, event: AnyLearnerEvent) -> None:
        """Take in our own write-ahead log: at start-up from the log, later as we append."""
        if isinstance(event, Filtered):
            self._filter(event)
        elif isinstance(event, Step):
            self._begin(event)
        elif isinstance(event, Stepped):
            self.stepped[event.step] = event
            self._forget_admissions()
            self.failed_by_cause.clear()
            self.sampled_tokens = 0
            self.since_s = self.now_s

    def _follow(self, event: TrajectoryEvent, seq: int) -> None:
        known = self.trajectories.get(event.trajectory)
        if isinstance(event, Admitted):
            if event.purpose != "train":
                return
            self.since_s = self.since_s or self.now_s
            self._admitted.setdefault(event.trajectory, seq)
        if known is None and not isinstance(event, Admitted):
            return  # of an evaluation, or trained and forgotten
        try:
            state = fold(known, event, seq)  # type: ignore[arg-type]
        except ValueError:
            return  # junk, written past the commit rule, changes nothing
        self.trajectories[event.trajectory] = state
        if isinstance(event, Turn):
            self.sampled_tokens += event.tokens.sampled_count
            self._oldest[event.trajectory] = oldest_version([state])
        elif isinstance(event, Scored):
            self._oldest.pop(event.trajectory, None)
            self._complete(state)
        elif state.end is not None:
            if isinstance(event, Failed):
                self.failed_by_cause[str(event.cause)] += 1
                self._unscore(event.trajectory)
            else:
                self._lose(TrajectoryId.parse(event.trajectory).group)
            self._oldest.pop(event.trajectory, None)
            del self.trajectories[event.trajectory]

    def _complete(self, state: Trajectory) -> None:
        name, member, _ = TrajectoryId.parse(state.id)
        members = self._scored.setdefault(name, {})
        members[member] = state.id
        if len(members) == self._recipe.learner.group_size:
            self._ready.append(name)

    def _unscore(self, trajectory: str) -> None:
        """It failed after all, and is replaced."""
        name, member, _ = TrajectoryId.parse(trajectory)
        if self._scored.get(name, {}).get(member) == trajectory:
            del self._scored[name][member]
            if name in self._ready:
                self._ready.remove(name)

    def _lose(self, group: str) -> None:
        """One of its members was expired or dropped: it will not be trained."""
        self._scored.pop(group, None)
        if group in self._ready:
            self._ready.remove(group)

    def _take(self, group: str) -> list[Trajectory]:
        members = self._scored.pop(group)
        self._ready.remove(group)
        return [self.trajectories.pop(members[member]) for member in sorted(members)]

    def _filter(self, event: Filtered) -> None:
        if (
            event.group not in self._ready
        ):  # of a step before our checkpoint; not all of it was read
            self._discard(event.trajectories)
            self._filtered[event.group] = []  # the next step names it all the same
            return
        members = self._take(event.group)
        self._filtered[event.group] = [] if event.reason == "stale" else members

    def _begin(self, event: Step) -> None:
        self.step = max(self.step, event.step)
        if event.step > self._checkpoint_step:
            names = dict.fromkeys(TrajectoryId.parse(t).group for t in event.trajectories)
            groups = [self._take(name) for name in names]
            filtered = [m for name in event.filtered for m in self._filtered.get(name, [])]
            self.batches[event.step] = Batch(event, groups, filtered)
        else:
            self._discard(event.trajectories)
        self._filtered.clear()
        self._filtered_seq = 0

    def _discard(self, trajectories: Iterable[str]) -> None:
        """Forget what was taken before our checkpoint, as far as it was read."""
        for trajectory in trajectories:
            name = TrajectoryId.parse(trajectory).group
            self._scored.pop(name, None)
            if name in self._ready:
                self._ready.remove(name)
            self.trajectories.pop(trajectory, None)

    # -- what to do --------------------------------------------------------------------------------

    def filters(self, policy_version: int) -> list[Filtered]:
        """Complete groups that will not be trained, and why; each is looked at once per version.

        None after the last step: then the dispatcher closes what is left, and no group may be ended twice.
        """
        learner = self._recipe.learner
        if self.step >= learner.steps:
            return []
        if policy_version != self._checked_version:
            self._checked_version = policy_version
            self._checked.clear()
        oldest_allowed = policy_version - self._recipe.asynchrony.max_staleness
        found = []
        for name in self._ready:
            if name in self._checked:
                continue
            members = [self.trajectories[member] for member in self._scored[name].values()]
            reason: Literal["stale", "zero_variance", "range"] | None
            oldest = oldest_version(members)
            if oldest < oldest_allowed:
                reason = "stale"
            elif oldest == _NEVER:
                # no prompt left room for a token: there is nothing to train
                reason = "zero_variance"
            else:
                rewards = [member.reward or 0.0 for member in members]
                outcomes = [outcome(member, learner.advantage) for member in members]
                reason = refusal(rewards, learner.filter, outcomes)
            if reason is None:
                self._checked.add(name)
            else:
                found.append(
                    Filtered(
                        replica=self._replica,
                        group=name,
                        reason=reason,
                        trajectories=[member.id for member in members],
                    )
                )
        return found

    def plan(self, policy_version: int) -> Step | None:
        """The next step, once its batch is full; call it when `filters` has nothing more."""
        learner = self._recipe.learner
        if self.step >= learner.steps:
            return None
        completed = len(self._ready) + len(self._filtered)
        full = len(self._ready) >= learner.groups_per_step
        refilled = self._ready and completed >= learner.refill_limit * learner.groups_per_step
        if not (full or refilled):
            return None
        groups = self._ready[: learner.groups_per_step]
        return Step(
            replica=self._replica,
            step=self.step + 1,
            start_version=policy_version,
            trajectories=[
                self._scored[name][member]
                for name in groups
                for member in sorted(self._scored[name])
            ],
            filtered=list(self._filtered),
            seed=self._recipe.seed,
            threads=learner.threads,
        )

    @property
    def without_signal(self) -> int:
        """Groups completed since the last step, when they would make a batch and none has signal; else 0."""
        learner = self._recipe.learner
        full = len(self._filtered) >= learner.refill_limit * learner.groups_per_step
        return len(self._filtered) if full and not self._ready else 0

    def stragglers(self, policy_version: int) -> list[str]:
        """Live trajectories that the next step would make too stale."""
        oldest_allowed = policy_version + 1 - self._recipe.asynchrony.max_staleness
        return [name for name, oldest in self._oldest.items() if oldest < oldest_allowed]


def oldest_version(trajectories: Iterable[Trajectory]) -> int:
    """The oldest policy version that sampled a token of any of them; huge when none did."""
    versions = (state.tokens.oldest_version for state in trajectories)
    return min((version for version in versions if version is not None), default=_NEVER)


def step_rewards(batch: Batch) -> list[float]:
    """The rewards of all trajectories that a step reports on."""
    members = [member for group in batch.groups for member in group]
    return [member.reward or 0.0 for member in (*members, *batch.filtered)]


def _without_variance(members: Iterable[Trajectory]) -> int:
    """How many of them are of groups whose rewards are all equal."""
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    for member in members:
        rewards[member.group].append(member.reward or 0.0)
    return sum(len(found) for found in rewards.values() if zero_variance(found))


def step_metrics(batch: Batch) -> dict[str, float]:
    """What a step's row says of its trajectories, filtered groups included."""
    trained = [member for group in batch.groups for member in group]
    members = [*trained, *batch.filtered]
    rewards = step_rewards(batch)
    count = len(members)
    mean = sum(rewards) / count
    version = batch.step.start_version
    # whoever found no room for a token has none
    ages = [version - oldest_version([m]) for m in trained if m.tokens.oldest_version is not None]
    return {
        "reward_mean": mean,
        "reward_std": (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5,
        "trajectories": count,
        "trained_trajectories": len(trained),
        "tool_call_rate": sum(any(t.calls for t in member.turns) for member in members) / count,
        "truncated_fraction": sum(m.turns[-1].finish_reason == "length" for m in members) / count,
        "zero_variance_fraction": _without_variance(batch.filtered) / count,
        "filtered_fraction": len(batch.filtered) / count,
        "staleness_mean": sum(ages) / max(1, len(ages)),
        "staleness_max": max(ages, default=0),
    }
