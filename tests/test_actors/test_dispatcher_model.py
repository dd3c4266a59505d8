"""The dispatcher against everything that may happen: a machine that plays random logs, losses and restarts.

The other side of the log is real where it is pure (`fold`, the learner's planner) and hostile where it can be: what the
dispatcher decides is carried out whole, in part or not at all, trajectories move at any time between, and any process
may be replaced by one that knows only the log.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actors import bookmarks
from actors.accounts import Accounts
from actors.decisions import Admit, Decision, End, Finish, Sweep, View
from actors.dispatcher import ATTEMPTS, Dispatcher
from actors.learner import LogPlace, Planner
from actors.tasks import base_of
from bus.work import Queue
from schemas.events import (
    Admitted,
    AnyEvent,
    Call,
    Dropped,
    Ended,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Opened,
    Paused,
    Result,
    Resumed,
    Scored,
    Step,
    Stepped,
    TrajectoryEvent,
    Turn,
)
from schemas.messages import Bookmark, DeadLetter
from schemas.recipe import (
    Asynchrony,
    Deadlines,
    Evaluation,
    Generator,
    Learner,
    Policy,
    Recipe,
)
from schemas.task import PublicPart, TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, TrajectoryId, fold

RECIPE = Recipe(
    policy=Policy(model="m"),
    learner=Learner(steps=3, groups_per_step=2, group_size=2, refill_limit=1.5),
    asynchrony=Asynchrony(max_staleness=1),
    generator=Generator(slots=3),
    evaluation=Evaluation(rows="m:f", every_steps=2),
    deadlines=Deadlines(gen_s=5, tool_s=5, score_s=5, sweeps=1),
)
SLOTS = RECIPE.learner.groups_per_step * (RECIPE.asynchrony.max_staleness + 1)
HELD_OUT = [TaskRow(id=f"h{i}", public=PublicPart(messages=[])) for i in range(2)]
REWARD = st.sampled_from([0.0, 0.0, 1.0])


def know(dispatcher: Dispatcher) -> tuple[object, ...]:
    """All that its decisions follow from, but for the times."""
    live = {name: (each.place, each.seq, each.fresh) for name, each in dispatcher.live.items()}
    groups = {name: vars(group) for name, group in dispatcher.groups.items()}
    tasks = [task.group for task in itertools.islice(dispatcher._tasks.upcoming(0), 9)]
    held_out = [task.group for task in dispatcher._evaluations.upcoming(3)]
    steps = (dispatcher._steps_begun, dispatcher._steps_done, dispatcher.paused, dispatcher.ended)
    return live, groups, tasks, held_out, steps, dispatcher._fresh, dispatcher._strays


@pytest.fixture(autouse=True)
def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bookmarks."""
    monkeypatch.setattr(bookmarks, "EVERY", 3)


def rows() -> Iterator[TaskRow]:
    return (TaskRow(id=f"r{i}", public=PublicPart(messages=[])) for i in itertools.count())


class Run(RuleBasedStateMachine):
    """One run. The log is the list of events, an event's sequence its place in it."""

    @initialize()
    def begin(self) -> None:
        self.log: list[AnyEvent] = []
        self.accounts = Accounts()
        self.accounts.observe(Opened(recipe=RECIPE))
        self.last: dict[str, int] = {}
        self.states: dict[str, Trajectory] = {}
        self.version = 0
        self.now_s = 0.0
        self.letters: list[DeadLetter] = []
        self.bookmark: Bookmark | None = None
        self.checkpoint = (0, LogPlace())
        self.restart_dispatcher()
        self.restart_learner()

    # -- the log -----------------------------------------------------------------------------------

    def append(self, event: AnyEvent) -> int:
        self.log.append(event)
        self.accounts.observe(event)
        seq = len(self.log)
        if isinstance(event, TrajectoryEvent):
            self.states[event.trajectory] = fold(
                self.states.get(event.trajectory),
                event,  # type: ignore[arg-type]
                seq,
            )
            self.last[event.trajectory] = seq
        return seq

    def of(self, *kinds: type) -> list:
        return [event for event in self.log if isinstance(event, kinds)]

    def trained(self) -> list[str]:
        return [t for event in self.of(Step, Filtered) for t in event.trajectories]

    def moving(self) -> list[Trajectory]:
        return [state for state in self.states.values() if state.next_hop is not None]

    # -- the dispatcher ----------------------------------------------------------------------------

    @rule()
    def restart_dispatcher(self) -> None:
        """A standby takes over: it knows the log and nothing else, and reads it from the bookmark on."""
        whole = self.new_dispatcher(None)
        self.dispatcher = self.new_dispatcher(self.bookmark)
        self.read = len(self.log)
        assert know(self.dispatcher) == know(whole)

    def new_dispatcher(self, bookmark: Bookmark | None) -> Dispatcher:
        made = Dispatcher(RECIPE, rows(), HELD_OUT, "dispatcher")
        if bookmark:
            made.resume(bookmark)
        for seq, event in enumerate(self.log, 1):
            if not bookmark or seq > bookmark.seq or isinstance(event, Paused | Resumed | Ended):
                made.observe(event, seq, self.now_s)
        return made

    def view(self, data: st.DataObject | None = None) -> View:
        while self.read < len(self.log):
            self.dispatcher.observe(self.log[self.read], self.read + 1, self.now_s)
            self.read += 1
        self.bookmark = self.dispatcher.mark(self.read) or self.bookmark
        held = data.draw(st.booleans()) if data else False
        backlog = data.draw(st.booleans()) if data else False
        return View(
            now_s=self.now_s,
            policy_version=self.version,
            held=dict.fromkeys(self.states, 1.0) if held else {},
            queues={"tool.python": Queue(2, 0), "score": Queue(2, 0)} if backlog else {},
        )

    @rule(data=st.data())
    def decide(self, data: st.DataObject) -> None:
        view = self.view(data)
        decisions = self.dispatcher.decide(view)
        assert self.dispatcher.decide(view) == decisions, "decides the same until the log moves"
        self.carry_out(decisions, data)

    @rule(data=st.data(), seconds=st.floats(0.1, 6.0))
    def patrol(self, data: st.DataObject, seconds: float) -> None:
        self.now_s += seconds
        self.carry_out(self.dispatcher.patrol(self.view(data)), data)

    @rule(data=st.data())
    def decide_on_a_letter(self, data: st.DataObject) -> None:
        if self.letters:
            letter = self.letters.pop()
            self.view()
            self.carry_out(self.dispatcher.fail(letter), data)

    def carry_out(self, decisions: list[Decision], data: st.DataObject | None) -> None:
        """In any order; each whole, in part or not at all, as a bus that fails or a kill would have it."""
        if data:
            decisions = data.draw(st.permutations(decisions))
        for decision in decisions:
            if isinstance(decision, Sweep):
                assert decision.trajectory in self.states
                continue
            if isinstance(decision, Finish):
                if data is None or data.draw(st.booleans()):
                    self.append(decision.event)
                continue
            pairs = (
                [(event, 0) for event in decision.events]
                if isinstance(decision, Admit)
                else decision.events
            )
            done = data.draw(st.integers(0, len(pairs))) if data else len(pairs)
            for event, after in pairs[:done]:
                if self.last.get(event.trajectory, 0) != after:
                    if isinstance(decision, End):
                        break
                    continue
                seq = self.append(event)
                self.dispatcher.observe(event, seq, self.now_s)

    @rule()
    def pause(self) -> None:
        self.append(Paused())

    @rule()
    def resume(self) -> None:
        self.append(Resumed())

    # -- generators, toolboxes, scorers ------------------------------------------------------------

    @rule(data=st.data(), count=st.integers(1, 6))
    def move(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            moving = self.moving()
            if moving:
                state = moving[data.draw(st.integers(0, len(moving) - 1))]
                self.hop(state, data)

    def hop(self, state: Trajectory, data: st.DataObject | None = None) -> None:
        """One hop, by whatever version a generator may hold."""
        name, hop = state.id, state.next_hop
        assert hop is not None
        if hop.stage == "gen":
            lowest = state.admitted.min_policy_version
            pinned = state.admitted.pinned_policy_version
            version = data.draw(st.integers(lowest, self.version)) if data else self.version
            call = data.draw(st.booleans()) if data and len(state.turns) < 2 else False
            self.append(
                Turn(
                    trajectory=name,
                    tokens=Tokens.sampled([1], [0.0], [version if pinned is None else pinned]),
                    text="",
                    calls=[Call(tool="python", arguments={})] if call else [],
                    last=not call,
                )
            )
        elif hop.stage == "tool":
            self.append(Result(trajectory=name, turn=len(state.turns) - 1, call=0, text=""))
        else:
            member = TrajectoryId.parse(name).member
            reward = data.draw(REWARD) if data else float(member)
            kind = Evaluated if state.admitted.purpose == "eval" else Scored
            self.append(kind(trajectory=name, reward=reward))

    @rule(data=st.data())
    def hop_fails(self, data: st.DataObject) -> None:
        """A handler gives up on a trajectory, which may then move all the same."""
        if moving := self.moving():
            state = moving[data.draw(st.integers(0, len(moving) - 1))]
            self.letters.append(
                DeadLetter(
                    stage="gen",
                    run="r",
                    error="",
                    payload=b"",
                    trajectory=state.id,
                    seq=state.seq,
                    boundary="engine",
                    code="broken",
                )
            )

    # -- the learner -------------------------------------------------------------------------------

    @rule(whole=st.booleans())
    def restart_learner(self, whole: bool = True) -> None:
        """Every step begun and not in the checkpoint is a batch again; without one all of them are."""
        step, place = (0, LogPlace()) if whole else self.checkpoint
        self.planner = Planner(RECIPE, step, "learner", place.learner_seq)
        self.planned = place.read_seq
        if not whole:
            self.catch_up_learner()
            self.compare_with_one_that_read_all(step)

    def compare_with_one_that_read_all(self, step: int) -> None:
        planner = Planner(RECIPE, step, "learner")
        for seq, event in enumerate(self.log, 1):
            planner.observe(event, seq, float(seq))
        for what in ("seq", "step", "batches", "trajectories", "without_signal"):
            assert getattr(self.planner, what) == getattr(planner, what)
        assert self.planner.filters(self.version) == planner.filters(self.version)
        assert self.planner.plan(self.version) == planner.plan(self.version)

    @rule(back=st.integers(0, 2))
    def take_checkpoint(self, back: int) -> None:
        """After a step, with whatever was read by then; who trains steps again has later ones before it."""
        step = len(self.of(Stepped)) - back
        if step > self.checkpoint[0] and self.planner.step >= step:
            for done in [each for each in self.planner.batches if each <= step]:
                del self.planner.batches[done]
            place = LogPlace(self.planner.needed_from(self.planned), self.planner.seq)
            self.checkpoint = (step, place)

    def catch_up_learner(self) -> None:
        while self.planned < len(self.log):
            self.planned += 1
            self.planner.observe(self.log[self.planned - 1], self.planned, float(self.planned))

    @rule(reads=st.booleans())
    def learn(self, reads: bool = True) -> None:
        """The next of its hops: publish, finish the step begun, filter, or begin a step; it may not have read all."""
        if reads or self.planned < self.planner.seq:
            self.catch_up_learner()
        begun, done = len(self.of(Step)), len(self.of(Stepped))
        if self.version < done:
            self.version = done
        elif begun > done:
            self.write(Stepped(step=begun, policy_version=begun, weights_sha256="", metrics={}))
        elif filters := self.planner.filters(self.version):
            self.write(filters[0])
        elif step := self.planner.plan(self.version):
            self.write(step)

    def write(self, event: Filtered | Step | Stepped) -> None:
        seq = self.append(event)
        self.planner.observe(event, seq, float(seq))

    @rule(rounds=st.integers(1, 3))
    def go_on(self, rounds: int = 1) -> None:
        """Everybody does everything that there is to do."""
        for _ in range(rounds):
            self.now_s += 1.0
            view = self.view()
            self.carry_out([*self.dispatcher.patrol(view), *self.dispatcher.decide(view)], None)
            for _ in range(3):
                for state in self.moving():
                    self.hop(state)
            for _ in range(8):
                self.learn()

    # -- what is true at any moment ----------------------------------------------------------------

    def open_groups(self) -> set[str]:
        over = set(self.trained())
        return {
            state.group
            for name, state in self.states.items()
            if state.admitted.purpose == "train" and state.end is None and name not in over
        }

    @invariant()
    def no_more_groups_than_slots(self) -> None:
        assert len(self.open_groups()) <= SLOTS

    @invariant()
    def a_prompt_is_in_one_group_at_a_time(self) -> None:
        bases = Counter(base_of(group) for group in self.open_groups())
        assert all(count == 1 for count in bases.values()), bases

    @invariant()
    def a_failed_member_is_replaced_once(self) -> None:
        failed = {event.trajectory for event in self.of(Failed)}
        for event in self.of(Admitted):
            group, member, attempt = TrajectoryId.parse(event.trajectory)
            assert attempt < ATTEMPTS
            assert member < RECIPE.learner.group_size
            if attempt:
                assert str(TrajectoryId(group, member, attempt - 1)) in failed

    @invariant()
    def a_group_is_its_own_row(self) -> None:
        """And a repeat follows the expiry of the one before it."""
        expired = {TrajectoryId.parse(event.trajectory).group for event in self.of(Expired)}
        for event in self.of(Admitted):
            group = TrajectoryId.parse(event.trajectory).group
            if event.purpose == "train":
                base, _, repeat = group.partition("r")
                assert event.task == f"r{base[1:]}"
                if repeat:
                    before = f"{base}r{int(repeat) - 1}" if int(repeat) > 1 else base
                    assert before in expired

    @invariant()
    def only_complete_groups_with_signal_are_trained(self) -> None:
        for event in self.of(Step):
            groups = Counter(TrajectoryId.parse(t).group for t in event.trajectories)
            assert set(groups.values()) == {RECIPE.learner.group_size}
            assert all(self.states[t].scored and not self.states[t].end for t in event.trajectories)
            for group in groups:
                members = [t for t in event.trajectories if t.startswith(f"{group}-")]
                assert len({self.states[t].reward for t in members}) > 1

    @invariant()
    def evaluation_is_pinned(self) -> None:
        for event in self.of(Admitted):
            if event.purpose == "eval":
                assert event.pinned_policy_version in (0, 2, 3)
                assert event.min_policy_version == event.pinned_policy_version

    @invariant()
    def the_end_comes_once(self) -> None:
        ends = self.of(Ended)
        assert len(ends) <= 1
        if ends:
            assert self.dispatcher.decide(self.view()) == []
            assert self.dispatcher.patrol(self.view()) == []

    @invariant()
    def the_accounts_balance(self) -> None:
        """`actors verify` would find nothing, whatever was lost or restarted on the way."""
        assert self.accounts.report().broken == {}

    # -- what is true in the end -------------------------------------------------------------------

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.go_on_to_the_end()
            self.check_conservation()

    def go_on_to_the_end(self) -> None:
        """With nothing in the way any more, the run ends by itself."""
        self.append(Resumed())
        for _ in range(60):
            if not self.of(Ended):
                self.go_on()
        assert len(self.of(Ended)) == 1
        assert len(self.of(Stepped)) == RECIPE.learner.steps

    def check_conservation(self) -> None:
        """Each id that was admitted has one fate, each prompt was admitted, and each version evaluated."""
        ends = [e.trajectory for e in self.of(Evaluated, Expired, Failed, Dropped)]
        fates = Counter([*self.trained(), *ends])
        assert set(fates) == set(self.states)
        assert set(fates.values()) == {1}, [name for name, count in fates.items() if count > 1]
        bases = {base_of(s.group) for s in self.states.values() if s.admitted.purpose == "train"}
        assert bases == {f"g{number}" for number in range(len(bases))}, "a prompt was skipped"
        for version, index in itertools.product((0, 2, 3), range(len(HELD_OUT))):
            name = f"e{version}x{index}"
            fate = [type(s.end) for s in self.states.values() if s.group == name]
            assert fate in ([Evaluated], [Failed, Evaluated], [Failed, Failed]), name


Run.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRun = Run.TestCase
