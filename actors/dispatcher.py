"""The dispatcher: admits, paces, replaces, expires and sweeps. Its whole state is folded from the log.

    observe(event)  what the log says
    decide(view)    whom to admit, replace and close, after each batch of events
    patrol(view)    what has become too late or too old, once a second

Slots: a group is charged when it is admitted and freed when it is trained, filtered, expired or dropped; there are
groups_per_step * (max_staleness + 1), so sampling cannot run further ahead of learning than that.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from msgspec import structs

from actors.bookmarks import Bookmarks
from actors.decisions import Admit, Decision, End, Finish, Sweep, View, Wake
from actors.live import ATTEMPTS, Group, Live
from actors.tasks import Evaluations, Tasks, place_seed
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
    Finished,
    Paused,
    Result,
    Resumed,
    Scored,
    Started,
    Step,
    Stepped,
    Turn,
)
from schemas.messages import Bookmark, DeadLetter
from schemas.recipe import Recipe, stage_limits_s
from schemas.task import TaskRow
from schemas.trajectory import TrajectoryId

_ORPHANED_S = 5.0
"""What another dispatcher admitted and nobody has taken for so long is woken again: it may have died in between."""
_RECENT = 32
"""Ends looked at to see whether admissions keep failing."""


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
        self._tasks = Tasks(recipe, rows)
        self._evaluations = Evaluations(recipe, evaluation)
        self._replica = replica
        self.live: dict[str, Live] = {}
        self.groups: dict[str, Group] = {}
        """Training groups that hold a slot."""
        self._attention: set[str] = set()
        """Groups with a failed or ended member."""
        self._strays: set[str] = set()
        """Admitted, by a dispatcher that had lost its lease, after their group was closed."""
        self._evaluation_again: dict[str, Admitted] = {}
        """Second attempts of evaluations that failed, by group."""
        self._fresh = 0
        self._steps_begun = 0
        self._steps_done = 0
        self.paused = False
        self.ended = False
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self._bookmarks = Bookmarks()

    # -- what the log says -------------------------------------------------------------------------

    def observe(self, event: AnyEvent, seq: int, now_s: float) -> None:
        """Take one event in; one that was taken in before changes nothing."""
        if isinstance(event, Admitted):
            self._admitted(event, seq, now_s)
        elif isinstance(event, Turn | Started | Result | Scored):
            self._moved(event, seq, now_s)
        elif isinstance(event, Evaluated | Expired | Failed | Dropped | Finished):
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
            self._evaluations.admitted(name)
            self._evaluation_again.pop(name, None)
        elif event.purpose == "external":
            pass  # of no group
        elif (group := self.groups.get(name) or self._new_group(name, event, seq)) is None:
            self._strays.add(event.trajectory)
        elif attempt < group.attempts.get(member, 0):
            return
        else:
            group.first_seq = min(group.first_seq, seq)
            group.attempts[member] = attempt
            group.failed.discard(member)
        self.live[event.trajectory] = Live(event, seq, now_s)
        self._fresh += 1

    def _new_group(self, name: str, first: Admitted, seq: int) -> Group | None:
        if not self._tasks.admitted(name):
            return None
        group = self.groups[name] = Group(first, seq)
        return group

    def _moved(self, event: Turn | Started | Result | Scored, seq: int, now_s: float) -> None:
        live = self.live.get(event.trajectory)
        if live is None or seq <= live.seq or live.stage == "scored":
            return
        live.move(live.place.after(event), seq, now_s)
        if isinstance(event, Turn):
            self._fresh -= live.fresh
            live.fresh = False
            versions = (live.oldest_version, event.tokens.oldest_version)
            live.oldest_version = min((each for each in versions if each is not None), default=None)
        elif isinstance(event, Scored):
            self._recent.append("")

    def _end(self, event: Evaluated | Expired | Failed | Dropped | Finished) -> None:
        live = self.live.pop(event.trajectory, None)
        if live is None:
            return
        self._fresh -= live.fresh
        self._strays.discard(event.trajectory)
        if live.admitted.purpose == "external":
            return  # its gateway says what became of it
        self._recent.append(str(event.cause) if isinstance(event, Failed) else "")
        name, member, attempt = TrajectoryId.parse(event.trajectory)
        group = self.groups.get(name)
        if group is None:
            again = isinstance(event, Failed) and attempt + 1 < ATTEMPTS
            if again and live.admitted.purpose == "eval":
                retry = str(TrajectoryId(name, member, attempt + 1))
                self._evaluation_again[name] = structs.replace(live.admitted, trajectory=retry)
            return
        (group.failed if isinstance(event, Failed) else group.ended).add(member)
        group.expired |= isinstance(event, Expired)
        self._attention.add(name)
        if group.over:
            if group.expired:
                self._tasks.expired(name, group.first)
            self._forget(name)

    def _free(self, trajectories: Sequence[str]) -> None:
        for trajectory in trajectories:
            live = self.live.pop(trajectory, None)
            self._fresh -= bool(live and live.fresh)
            self._strays.discard(trajectory)
            self._forget(TrajectoryId.parse(trajectory).group)

    def _forget(self, group: str) -> None:
        self.groups.pop(group, None)
        self._attention.discard(group)

    # -- bookmarks ---------------------------------------------------------------------------------

    def mark(self, seq: int) -> Bookmark | None:
        """All that the log holds up to here, and no more, was observed. Returns a new bookmark now and then."""
        if self._tasks.repeating or self._evaluation_again or self._strays:
            return None  # something that has ended is still to be admitted again, or to be ended
        if self._bookmarks.due(seq):
            next_row, lost_rows, repeats = self._tasks.marked(self.groups)
            evaluated, evaluations = self._evaluations.marked()
            self._bookmarks.take(
                Bookmark(
                    seq=seq,
                    next_row=next_row,
                    lost_rows=lost_rows,
                    repeats=repeats,
                    evaluated=evaluated,
                    evaluations=evaluations,
                    steps_begun=self._steps_begun,
                    steps_done=self._steps_done,
                    recent=list(self._recent),
                )
            )
        opened = [group.first_seq for group in self.groups.values()]
        opened += [live.admitted_seq for live in self.live.values()]
        return self._bookmarks.closed(min(opened, default=seq + 1))

    def resume(self, bookmark: Bookmark) -> None:
        """Begin there instead of at the log's beginning; the run's own events before it are still to be observed."""
        self._bookmarks = Bookmarks(bookmark.seq)
        self._tasks.resume(bookmark.next_row, bookmark.lost_rows, bookmark.repeats)
        self._evaluations.resume(bookmark.evaluated, bookmark.evaluations)
        self._steps_begun, self._steps_done = bookmark.steps_begun, bookmark.steps_done
        self._recent.extend(bookmark.recent)

    # -- what to do --------------------------------------------------------------------------------

    def decide(self, view: View) -> list[Decision]:
        """Whom to admit, replace and close; the same again until the log shows it done."""
        if self.ended:
            return []
        steps = self._recipe.learner.steps
        over = self._steps_done >= steps and view.policy_version >= steps
        decisions = [*self._drop_strays(), *(self._close_all() if over else self._mend())]
        if self._recipe.asynchrony.barriers:
            decisions += self._release()
        if view.policy_version >= 0 and not self.paused:
            wanted = [*self._evaluate(view.policy_version), *(() if over else self._admit(view))]
            decisions += () if view.shortage else wanted
            if over and not (decisions or wanted) and not self.live:
                decisions.append(Finish(Ended(replica=self._replica, reason="all steps done")))
        return decisions

    def patrol(self, view: View) -> list[Decision]:
        """What has become too late or too old, and members whose admission was cut short."""
        if self.ended:
            return []
        return [*self._overdue(view), *self._stale(view), *self._missing(), *self._left(view)]

    def fail(self, letter: DeadLetter) -> list[Decision]:
        """End a trajectory whose message was put aside; nothing when it has moved since, or has ended."""
        live = self.live.get(letter.trajectory)
        if live is None or live.seq > letter.seq or live.stage == "scored":
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
        limits = stage_limits_s(self._recipe.deadlines)
        sweeps = self._recipe.deadlines.sweeps
        for name, live in self.live.items():
            limit = limits.get(live.stage)
            if limit is None or live.outside:
                continue
            orphaned = live.fresh and not live.sweeps and live.admitted.replica != self._replica
            if view.now_s - live.due_since_s < (min(limit, _ORPHANED_S) if orphaned else limit):
                continue
            # one deadline more for a holder that lives: then another may take it, and the commit rule settles it
            held_s = view.held.get(name)
            if live.in_line(view.queues) if held_s is None else held_s < 2 * limit:
                continue
            live.due_since_s = view.now_s
            live.sweeps += 1
            if live.sweeps <= sweeps:
                yield Sweep(name)
            else:
                detail = f"no event for {limit:g} s, {sweeps} times"
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
        for name in stale:
            yield from self._close(name, Expired, "too stale")

    def _left(self, view: View) -> Iterator[Decision]:
        """External trajectories that nobody has asked anything of for long."""
        idle_s = self._recipe.gateway.idle_s
        for name, live in self.live.items():
            if live.outside and view.now_s - live.moved_s > idle_s:
                reason = f"no action for {idle_s:g} s"
                yield End(
                    [(Expired(trajectory=name, replica=self._replica, reason=reason), live.seq)]
                )

    def _missing(self) -> Iterator[Decision]:
        for name, group in self.groups.items():
            missing = set(range(self._recipe.learner.group_size)) - group.attempts.keys()
            if missing and not group.lost:
                yield Admit([self._member(group.first, name, member, 0) for member in missing])

    def _mend(self) -> Iterator[Decision]:
        """Replace failed members; a group that is lost is closed whole."""
        for name in self._attention:
            group = self.groups[name]
            if group.expired:
                yield from self._close(name, Expired, "its group was closed")
            elif group.lost:
                yield from self._close(name, Dropped, "a member of its group failed for good")
            elif group.failed:
                yield Admit(
                    [
                        self._member(group.first, name, member, group.attempts[member] + 1)
                        for member in group.failed
                    ]
                )

    def _drop_strays(self) -> Iterator[Decision]:
        for name in self._strays:
            reason = "its group was closed before it was admitted"
            dropped = Dropped(trajectory=name, replica=self._replica, reason=reason)
            yield End([(dropped, self.live[name].seq)])

    def _close_all(self) -> Iterator[Decision]:
        """What is left at the end will not be trained."""
        for name in self.groups:
            yield from self._close(name, Expired, "the run has ended")

    def _close(
        self, name: str, kind: type[Expired] | type[Dropped], reason: str
    ) -> Iterator[Decision]:
        """End a group whole, unfinished members first, so that it cannot become complete meanwhile."""
        slots = self.groups[name].attempts.items()
        members = [str(TrajectoryId(name, *slot)) for slot in slots]
        alive = [(member, self.live[member]) for member in members if member in self.live]
        alive.sort(key=lambda pair: pair[1].stage == "scored")
        if alive:
            yield End(
                [
                    (kind(trajectory=member, replica=self._replica, reason=reason), live.seq)
                    for member, live in alive
                ]
            )

    # -- admission ---------------------------------------------------------------------------------

    def _evaluate(self, policy_version: int) -> Iterator[Decision]:
        if self._evaluation_again:
            yield Admit(list(self._evaluation_again.values()))
        for task in self._evaluations.upcoming(policy_version):
            event = self._member(task.template, task.group, 0, 0)
            yield Admit([event], task.private, task.images)

    def _release(self) -> Iterator[Decision]:
        """Wake all at a barrier, once the last has reached it."""
        running = [live for live in self.live.values() if live.stage != "scored"]
        if all(live.seq > live.woken_seq for live in running):
            for live in running:
                live.woken_seq = live.seq
                yield Wake(live.admitted.trajectory)

    def _admit(self, view: View) -> Iterator[Decision]:
        learner = self._recipe.learner
        if self._recipe.asynchrony.barriers and self.live:
            return
        ahead = min(self._recipe.asynchrony.max_staleness + 1, learner.steps - self._steps_begun)
        slots = learner.groups_per_step * ahead
        room = 2 * self._recipe.generator.slots * max(1, view.generators) - self._fresh
        free = min(slots - len(self.groups), -(-room // learner.group_size))
        if self.failing_cause:  # one group at a time shows whether it is over
            free = min(free, 1 - self._unfinished_groups())
        for task in itertools.islice(self._tasks.upcoming(view.policy_version), max(0, free)):
            members = range(learner.group_size)
            events = [self._member(task.template, task.group, m, 0) for m in members]
            yield Admit(events, task.private, task.images)

    def _unfinished_groups(self) -> int:
        """Training groups of which something is still to come; those that wait for the learner are not among them."""
        moving = {
            TrajectoryId.parse(name).group
            for name, live in self.live.items()
            if live.stage != "scored"
        }
        return len(self.groups.keys() & (moving | self._attention))

    def _member(self, template: Admitted, group: str, member: int, attempt: int) -> Admitted:
        return structs.replace(
            template,
            trajectory=str(TrajectoryId(group, member, attempt)),
            replica=self._replica,
            seed=place_seed(self._recipe.seed, group, member, attempt),
        )
