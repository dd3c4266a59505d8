"""The dispatcher: admits, paces, replaces, expires and sweeps. Its whole state is folded from the log.

    observe(event)  what the log says
    decide(view)    whom to admit, replace and close, after each batch of events
    patrol(view)    what has become too late or too old, once a second

Slots: a group is charged when it is admitted and freed when it is trained, filtered, expired or dropped; there are
groups_per_step * (max_staleness + 1), so sampling cannot run further ahead of learning than that.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from schemas.events import (
    Admitted,
    AnyEvent,
    Cause,
    Dropped,
    Ended,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Paused,
    Result,
    Resumed,
    Scored,
    Step,
    Stepped,
    Turn,
)
from schemas.messages import DeadLetter
from schemas.recipe import Recipe
from schemas.task import TaskRow
from schemas.trajectory import TrajectoryId

ATTEMPTS = 2
"""Of each member of a group, before the group is dropped."""

_RECENT = 32
"""Ends looked at to see whether admissions keep failing."""


class View(NamedTuple):
    """What the dispatcher sees beside the log."""

    now_s: float
    policy_version: int
    """Of the pointer; -1 before version 0."""
    generators: int = 1
    """Live replicas."""
    held: frozenset[str] = frozenset()
    """Trajectories that live replicas say they are working on."""
    backlog: frozenset[str] = frozenset()
    """Stages whose queue is not empty: there silence means waiting, not loss."""


class Admit(NamedTuple):
    """Put the private part away if there is one, then append these and wake a generator for each."""

    events: list[Admitted]
    private: dict[str, Any] | None = None


class End(NamedTuple):
    """Append these in order, each after its sequence; stop at the first that has moved."""

    events: list[tuple[Expired | Failed | Dropped, int]]


class Sweep(NamedTuple):
    """Send the trajectory's next work message, again or after a barrier."""

    trajectory: str


class Finish(NamedTuple):
    """Append the run's end."""

    event: Ended


Decision = Admit | End | Sweep | Finish


class Live:
    """A trajectory that has not ended."""

    def __init__(self, admitted: Admitted, seq: int, now_s: float) -> None:
        self.admitted = admitted
        self.seq = seq
        self.moved_s = now_s
        self.stage = "gen"
        self.calls = 0
        """Of the last turn, still without a result."""
        self.oldest_version: int | None = None
        self.sweeps = 0
        self.fresh = True
        """Nothing has been sampled yet."""
        self.woken_seq = seq
        """With barriers: the sequence at which its next stage was last woken."""


class Group:
    """The members of one task's group that holds a slot."""

    def __init__(self, first: Admitted) -> None:
        self.first = first
        self.attempts: dict[int, int] = {}
        """Member → its newest attempt."""
        self.failed: set[int] = set()
        """Members whose newest attempt has failed."""
        self.ended: set[int] = set()
        """Members whose newest attempt was expired or dropped."""

    @property
    def lost(self) -> bool:
        """It can no longer become complete."""
        return bool(self.ended) or any(self.attempts[m] + 1 >= ATTEMPTS for m in self.failed)

    @property
    def over(self) -> bool:
        """It is lost and nothing of it is alive."""
        return self.lost and len(self.ended | self.failed) == len(self.attempts)


class Dispatcher:
    """Folds the log and decides. Knows no bus."""

    def __init__(
        self,
        recipe: Recipe,
        rows: Iterator[TaskRow],
        evaluation: Sequence[TaskRow],
        replica: str = "",
    ) -> None:
        self._recipe = recipe
        self._rows = rows
        self._rows_read = 0
        self._rows_ready: dict[int, TaskRow] = {}
        """Rows read and not yet seen admitted, by the number of their group."""
        self._evaluation = evaluation
        self._replica = replica
        self.live: dict[str, Live] = {}
        self.groups: dict[str, Group] = {}
        """Training groups that hold a slot."""
        self._attention: set[str] = set()
        """Groups with a failed or ended member."""
        self._again: dict[str, Admitted] = {}
        """Tasks to be admitted again, by the name of the group that was expired."""
        self._repeats: Counter[str] = Counter()
        """How often each task was admitted again, by the name of its first group."""
        self._next_group = 0
        self._evaluated: dict[int, set[str]] = {}
        """Policy version → evaluation groups admitted."""
        self._evaluation_again: dict[str, Admitted] = {}
        self._fresh = 0
        self._steps_begun = 0
        self._steps_done = 0
        self.paused = False
        self.ended = False
        self._recent: deque[str] = deque(maxlen=_RECENT)

    # -- what the log says -------------------------------------------------------------------------

    def observe(self, event: AnyEvent, seq: int, now_s: float) -> None:
        """Take one event in; one that was taken in before changes nothing."""
        if isinstance(event, Admitted):
            self._admitted(event, seq, now_s)
        elif isinstance(event, Turn | Result | Scored):
            self._moved(event, seq, now_s)
        elif isinstance(event, Evaluated | Expired | Failed | Dropped):
            self._end(event)
        elif isinstance(event, Step):
            self._steps_begun = max(self._steps_begun, event.step)
            self._free(event.trajectories)
        elif isinstance(event, Filtered):
            self._free(event.trajectories)
        elif isinstance(event, Stepped):
            self._steps_done = max(self._steps_done, event.step)
        elif isinstance(event, Paused | Resumed):
            self.paused = isinstance(event, Paused)
        elif isinstance(event, Ended):
            self.ended = True

    def _admitted(self, event: Admitted, seq: int, now_s: float) -> None:
        if event.trajectory in self.live:
            return
        name, member, attempt = TrajectoryId.parse(event.trajectory)
        if event.purpose == "eval":
            assert event.pinned_policy_version is not None, "evaluation is pinned"
            self._evaluated.setdefault(event.pinned_policy_version, set()).add(name)
            self._evaluation_again.pop(name, None)
        else:
            group = self.groups.get(name) or self._new_group(name, event)
            if attempt < group.attempts.get(member, 0):
                return
            group.attempts[member] = attempt
            group.failed.discard(member)
        self.live[event.trajectory] = Live(event, seq, now_s)
        self._fresh += 1

    def _new_group(self, name: str, first: Admitted) -> Group:
        base, _, repeat = name.partition("r")
        number = int(base[1:])
        self._next_group = max(self._next_group, number + 1)
        self._rows_ready.pop(number, None)
        if repeat:
            self._repeats[base] = max(self._repeats[base], int(repeat))
            self._again = {old: task for old, task in self._again.items() if base_of(old) != base}
        group = self.groups[name] = Group(first)
        return group

    def _moved(self, event: Turn | Result | Scored, seq: int, now_s: float) -> None:
        live = self.live.get(event.trajectory)
        if live is None or seq <= live.seq:
            return
        live.seq, live.moved_s, live.sweeps = seq, now_s, 0
        if isinstance(event, Turn):
            self._fresh -= live.fresh
            live.fresh = False
            if live.oldest_version is None:
                live.oldest_version = event.tokens.oldest_version
            live.calls = 0 if event.last else len(event.calls)
            live.stage = "score" if event.last else "tool" if live.calls else "gen"
        elif isinstance(event, Result):
            live.calls -= 1
            live.stage = "tool" if live.calls else "gen"
        else:
            live.stage = "scored"
            self._recent.append("")

    def _end(self, event: Evaluated | Expired | Failed | Dropped) -> None:
        live = self.live.pop(event.trajectory, None)
        if live is None:
            return
        self._fresh -= live.fresh
        self._recent.append(str(event.cause) if isinstance(event, Failed) else "")
        name, member, attempt = TrajectoryId.parse(event.trajectory)
        group = self.groups.get(name)
        if group is None:
            if isinstance(event, Failed) and attempt + 1 < ATTEMPTS:
                retry = str(TrajectoryId(name, member, attempt + 1))
                self._evaluation_again[name] = structs.replace(live.admitted, trajectory=retry)
            return
        (group.failed if isinstance(event, Failed) else group.ended).add(member)
        if isinstance(event, Expired):
            self._again[name] = group.first
        self._attention.add(name)
        if group.over:
            self._forget(name)

    def _free(self, trajectories: Sequence[str]) -> None:
        for trajectory in trajectories:
            live = self.live.pop(trajectory, None)
            self._fresh -= bool(live and live.fresh)
            self._forget(TrajectoryId.parse(trajectory).group)

    def _forget(self, group: str) -> None:
        self.groups.pop(group, None)
        self._attention.discard(group)

    # -- what to do --------------------------------------------------------------------------------

    def decide(self, view: View) -> list[Decision]:
        """Whom to admit, replace and close; the same again until the log shows it done."""
        if self.ended:
            return []
        decisions: list[Decision] = list(self._mend())
        if self._recipe.asynchrony.barriers:
            decisions += self._release()
        steps = self._recipe.learner.steps
        over = self._steps_done >= steps and view.policy_version >= steps
        if over:
            # what is left will not be trained
            decisions += [self._close(name, Expired, "the run has ended") for name in self.groups]
        if view.policy_version >= 0 and not self.paused:
            decisions += self._evaluate(view.policy_version)
            decisions += () if over else self._admit(view)
        if over and not decisions and not self.live:
            decisions.append(Finish(Ended(replica=self._replica, reason="all steps done")))
        return decisions

    def patrol(self, view: View) -> list[Decision]:
        """What has become too late or too old, and members whose admission was cut short."""
        if self.ended:
            return []
        return [*self._overdue(view), *self._stale(view), *self._missing()]

    def fail(self, letter: DeadLetter) -> list[Decision]:
        """End a trajectory whose message was put aside, unless it has moved since."""
        live = self.live.get(letter.trajectory)
        if live is None or live.seq != letter.seq:
            return []
        cause = Cause(boundary=letter.boundary, code=letter.code, detail=letter.error)
        failed = Failed(trajectory=letter.trajectory, replica=self._replica, cause=cause)
        return [End([(failed, live.seq)])]

    @property
    def failing_cause(self) -> str:
        """The one cause of which most recent trajectories fail; empty when all is well."""
        if len(self._recent) < _RECENT // 4:
            return ""
        cause, count = Counter(self._recent).most_common(1)[0]
        return cause if cause and 2 * count > len(self._recent) else ""

    def _overdue(self, view: View) -> Iterator[Decision]:
        deadlines = self._recipe.deadlines
        limits = {"gen": deadlines.gen_s, "tool": deadlines.tool_s, "score": deadlines.score_s}
        for name, live in self.live.items():
            limit = limits.get(live.stage)
            if limit is None or view.now_s - live.moved_s < limit:
                continue
            live.moved_s = view.now_s
            if name in view.held or live.stage in view.backlog:
                continue
            live.sweeps += 1
            if live.sweeps <= deadlines.sweeps:
                yield Sweep(name)
            else:
                detail = f"no event for {limit:g} s, {deadlines.sweeps} times"
                cause = Cause(boundary="deadline", code=live.stage, detail=detail)
                failed = Failed(trajectory=name, replica=self._replica, cause=cause)
                yield End([(failed, live.seq)])

    def _stale(self, view: View) -> Iterator[Decision]:
        """Groups with an unfinished member too old to be trained any more."""
        oldest_allowed = view.policy_version - self._recipe.asynchrony.max_staleness
        stale = {
            TrajectoryId.parse(name).group
            for name, live in self.live.items()
            if live.admitted.purpose == "train"
            and live.stage != "scored"
            and live.oldest_version is not None
            and live.oldest_version < oldest_allowed
        }
        return (self._close(name, Expired, "too stale") for name in stale)

    def _missing(self) -> Iterator[Decision]:
        for name, group in self.groups.items():
            missing = set(range(self._recipe.learner.group_size)) - group.attempts.keys()
            if missing and not group.lost:
                yield Admit([self._member(group.first, name, member, 0) for member in missing])

    def _mend(self) -> Iterator[Decision]:
        """Replace failed members; a group that is lost is closed whole."""
        for name in self._attention:
            group = self.groups[name]
            if group.ended:
                yield self._close(name, Expired, "its group was closed")
            elif group.lost:
                yield self._close(name, Dropped, "a member of its group failed for good")
            elif group.failed:
                yield Admit(
                    [
                        self._member(group.first, name, member, group.attempts[member] + 1)
                        for member in group.failed
                    ]
                )

    def _close(self, name: str, kind: type[Expired] | type[Dropped], reason: str) -> End:
        """End a group whole, unfinished members first, so that it cannot become complete meanwhile."""
        slots = self.groups[name].attempts.items()
        members = [str(TrajectoryId(name, *slot)) for slot in slots]
        alive = [member for member in members if member in self.live]
        alive.sort(key=lambda member: self.live[member].stage == "scored")
        return End(
            [
                (
                    kind(trajectory=member, replica=self._replica, reason=reason),
                    self.live[member].seq,
                )
                for member in alive
            ]
        )

    # -- admission ---------------------------------------------------------------------------------

    def _evaluate(self, version: int) -> Iterator[Decision]:
        if self._evaluation_again:
            yield Admit(list(self._evaluation_again.values()))
        every, steps = self._recipe.evaluation.every_steps, self._recipe.learner.steps
        if not (version in (0, steps) or (every and version % every == 0)):
            return
        known = self._evaluated.get(version, set())
        for index, row in enumerate(self._evaluation):
            name = f"e{version}x{index}"
            if name not in known:
                template = Admitted(
                    trajectory="",
                    task=row.id,
                    public=row.public,
                    private_key=name,
                    purpose="eval",
                    min_policy_version=version,
                    pinned_policy_version=version,
                    temperature=self._recipe.evaluation.temperature,
                )
                yield Admit([self._member(template, name, 0, 0)], row.private)

    def _release(self) -> Iterator[Decision]:
        """Wake all at a barrier, once the last has reached it."""
        running = [live for live in self.live.values() if live.stage != "scored"]
        if all(live.seq > live.woken_seq for live in running):
            for live in running:
                live.woken_seq = live.seq
                yield Sweep(live.admitted.trajectory)

    def _admit(self, view: View) -> Iterator[Decision]:
        learner = self._recipe.learner
        if self._recipe.asynchrony.barriers and self.live:
            return
        ahead = min(self._recipe.asynchrony.max_staleness + 1, learner.steps - self._steps_begun)
        slots = learner.groups_per_step * ahead
        if self.failing_cause:
            slots = min(slots, 1)  # one group at a time shows whether it is over
        room = 2 * self._recipe.generator.slots * max(1, view.generators) - self._fresh
        free = min(slots - len(self.groups), -(-room // learner.group_size))
        again = list(self._again.items())
        for index in range(max(0, free)):
            if index < len(again):
                name, template = self._repeat(*again[index], view.policy_version)
                private = None
            else:
                number = self._next_group + index - len(again)
                name, template, private = self._next_task(number, view.policy_version)
            members = range(learner.group_size)
            yield Admit([self._member(template, name, m, 0) for m in members], private)

    def _repeat(self, old: str, first: Admitted, policy_version: int) -> tuple[str, Admitted]:
        base = base_of(old)
        template = structs.replace(first, min_policy_version=policy_version)
        return f"{base}r{self._repeats[base] + 1}", template

    def _next_task(self, number: int, policy_version: int) -> tuple[str, Admitted, dict[str, Any]]:
        while self._rows_read <= number:
            row = next(self._rows)
            if self._rows_read >= self._next_group:
                self._rows_ready[self._rows_read] = row
            self._rows_read += 1
        row = self._rows_ready[number]
        name = f"g{number}"
        template = Admitted(
            trajectory="",
            task=row.id,
            public=row.public,
            private_key=name,
            min_policy_version=policy_version,
            temperature=self._recipe.sampling.temperature,
        )
        return name, template, row.private

    def _member(self, template: Admitted, group: str, member: int, attempt: int) -> Admitted:
        return structs.replace(
            template,
            trajectory=str(TrajectoryId(group, member, attempt)),
            replica=self._replica,
            seed=place_seed(self._recipe.seed, group, member, attempt),
        )


def base_of(group: str) -> str:
    """`g12` of g12 and of its repeats g12r1, g12r2, …"""
    return group.partition("r")[0]


def place_seed(seed: int, group: str, member: int, attempt: int) -> int:
    """A trajectory's seed, derived from its place."""
    place = f"{seed}.{group}.{member}.{attempt}".encode()
    return int.from_bytes(hashlib.sha256(place).digest()[:8], "little") >> 1
