"""The dispatcher by example: what each situation of a run makes it decide."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
from msgspec.structs import replace

from actors.decisions import Admit, Decision, End, Finish, Sweep, View, Wake
from actors.dispatcher import Dispatcher
from actors.tasks import place_seed
from bus.work import Queue
from schemas.events import (
    Admitted,
    AnyEvent,
    Call,
    Cause,
    Dropped,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Paused,
    Result,
    Resumed,
    Scored,
    Started,
    Step,
    Stepped,
    Turn,
)
from schemas.messages import DeadLetter
from schemas.recipe import (
    Asynchrony,
    Deadlines,
    Evaluation,
    Generator,
    Learner,
    Policy,
    Recipe,
    Sampling,
)
from schemas.task import PublicPart, TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import TrajectoryId

RECIPE = Recipe(
    policy=Policy(model="m"),
    seed=5,
    sampling=Sampling(temperature=0.75),
    learner=Learner(steps=4, groups_per_step=2, group_size=2),
    asynchrony=Asynchrony(max_staleness=1),
    generator=Generator(slots=100),
    evaluation=Evaluation(every_steps=0, temperature=0.25),
    deadlines=Deadlines(gen_s=10, tool_s=5, score_s=3, sweeps=2),
)
PYTHON = Call(tool="python", arguments={})
CAUSE = Cause(boundary="engine", code="gone")


def rows() -> Iterator[TaskRow]:
    public = PublicPart(messages=[])
    return (TaskRow(id=f"r{i}", public=public, private={"answer": i}) for i in itertools.count())


class Played:
    """A dispatcher, and the log that it reads; what it decides is carried out whole."""

    def __init__(self, recipe: Recipe = RECIPE, evaluation: Sequence[TaskRow] = ()) -> None:
        self.dispatcher = Dispatcher(recipe, rows(), evaluation, "dispatcher")
        self.seq = 0
        self.now_s = 0.0
        self.admitted: list[Admitted] = []

    def append(self, *events: AnyEvent) -> None:
        for event in events:
            self.seq += 1
            self.dispatcher.observe(event, self.seq, self.now_s)

    def decide(self, version: int = 0, **view: object) -> list[Decision]:
        return self.dispatcher.decide(View(self.now_s, version, **view))  # type: ignore[arg-type]

    def patrol(self, version: int = 0, **view: object) -> list[Decision]:
        return self.dispatcher.patrol(View(self.now_s, version, **view))  # type: ignore[arg-type]

    def carry_out(self, decisions: Sequence[Decision]) -> list[str]:
        """Returns the ids admitted."""
        new = []
        for decision in decisions:
            if isinstance(decision, Admit):
                self.append(*decision.events)
                new += decision.events
            elif isinstance(decision, End):
                self.append(*(event for event, _ in decision.events))
            elif isinstance(decision, Finish):
                self.append(decision.event)
        self.admitted += new
        return [event.trajectory for event in new]

    def admit(self, version: int = 0) -> list[str]:
        return self.carry_out(self.decide(version))

    def finish(self, *names: str, version: int = 0) -> None:
        """Each trajectory takes one turn and is scored."""
        for name in names:
            self.append(turn(name, version, last=True), Scored(trajectory=name, reward=1.0))

    def train(self, step: int, *names: str) -> None:
        self.append(
            Step(step=step, start_version=step - 1, trajectories=list(names)),
            Stepped(step=step, policy_version=step, weights_sha256="", metrics={}),
        )


def turn(name: str, version: int = 0, *, last: bool = False, calls: int = 0) -> Turn:
    return Turn(
        trajectory=name,
        tokens=Tokens.sampled([1], [0.0], [version]),
        text="",
        calls=[PYTHON] * calls,
        last=last,
    )


def ended(decisions: Sequence[Decision]) -> list[str]:
    return [
        event.trajectory for each in decisions if isinstance(each, End) for event, _ in each.events
    ]


# -- admission -------------------------------------------------------------------------------------


def test_nothing_is_admitted_before_version_0() -> None:
    """The cold start comes first."""
    assert Played().decide(version=-1) == []


def test_rows_fill_the_slots_in_order() -> None:
    """groups_per_step * (max_staleness + 1) groups, each whole, with the row's private part beside it."""
    played = Played()
    decisions = played.decide()
    assert [decision.private for decision in decisions] == [{"answer": i} for i in range(4)]
    assert played.carry_out(decisions) == [f"g{g}-{m}-0" for g in range(4) for m in range(2)]
    assert played.decide() == []
    first = played.admitted[2]
    assert (first.task, first.private_key, first.purpose) == ("r1", "g1", "train")
    assert (first.temperature, first.min_policy_version) == (0.75, 0)
    assert first.pinned_policy_version is None


def test_every_place_has_its_own_seed() -> None:
    """Derived from the run's seed, the group, the member and the attempt; so the same again after a restart."""
    one, other = Played(), Played()
    one.admit()
    other.admit()
    seeds = [event.seed for event in one.admitted]
    assert seeds == [event.seed for event in other.admitted]
    assert len(set(seeds)) == len(seeds)
    assert seeds[3] == place_seed(5, "g1", 1, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_trained_or_filtered_group_frees_its_slot() -> None:
    """And its trajectories are no longer in flight."""
    played = Played()
    played.admit()
    played.finish("g0-0-0", "g0-1-0", "g1-0-0", "g1-1-0")
    assert played.decide() == []
    played.append(Filtered(group="g1", reason="zero_variance", trajectories=["g1-0-0", "g1-1-0"]))
    assert played.admit() == ["g4-0-0", "g4-1-0"]
    played.train(1, "g0-0-0", "g0-1-0")
    assert played.admit(version=1) == ["g5-0-0", "g5-1-0"]
    assert played.admitted[-1].min_policy_version == 1


def test_sampling_runs_no_further_ahead_than_there_are_steps() -> None:
    """Before the last step no groups are admitted that nobody would train."""
    played = Played(replace(RECIPE, learner=replace(RECIPE.learner, steps=1)))
    assert len(played.admit()) == 4


def test_generators_are_given_no_more_than_they_have_room_for() -> None:
    """Twice their slots may wait to be begun; what has begun makes room."""
    played = Played(replace(RECIPE, generator=replace(RECIPE.generator, slots=1)))
    assert played.admit() == ["g0-0-0", "g0-1-0"]
    assert len(played.decide(generators=2)) == 1
    played.append(turn("g0-0-0"), turn("g0-1-0"))
    assert played.admit() == ["g1-0-0", "g1-1-0"]


def test_an_admission_that_was_lost_is_offered_again() -> None:
    """Also by a dispatcher that knows only the log: no prompt is skipped."""
    played = Played()
    lost, *rest = played.decide()
    played.carry_out(rest)
    assert played.decide() == [lost]
    successor = Played()
    successor.append(*played.admitted)
    assert successor.decide() == [lost]


def test_a_group_admitted_in_part_is_completed() -> None:
    """By the patrol, whoever began it."""
    played = Played()
    first = played.decide()[0]
    assert isinstance(first, Admit)
    played.append(first.events[0])
    assert played.patrol() == [Admit([first.events[1]])]


def test_pause_and_resume() -> None:
    """A paused run admits nothing and replaces what fails; a resumed one goes on where it was."""
    played = Played()
    played.append(Paused())
    assert played.dispatcher.paused
    assert played.decide() == []
    played.append(Resumed())
    played.admit()
    played.append(Paused(), Failed(trajectory="g0-0-0", cause=CAUSE))
    assert played.admit() == ["g0-0-1"]


# -- failure ---------------------------------------------------------------------------------------


def test_a_failed_member_is_replaced_in_its_slot() -> None:
    """Once, with another seed and the same task."""
    played = Played()
    played.admit()
    played.append(Failed(trajectory="g2-1-0", cause=CAUSE))
    assert played.admit() == ["g2-1-1"]
    again = played.admitted[-1]
    assert (again.task, again.private_key) == ("r2", "g2")
    assert again.seed == place_seed(5, "g2", 1, 1)


def test_a_member_that_fails_twice_takes_its_group_along() -> None:
    """The unfinished first, so that the group cannot become complete meanwhile; then the next row comes."""
    played = Played(replace(RECIPE, learner=replace(RECIPE.learner, group_size=3)))
    played.admit()
    played.finish("g0-0-0")
    played.append(Failed(trajectory="g0-1-0", cause=CAUSE))
    assert played.admit() == ["g0-1-1"]
    played.append(Failed(trajectory="g0-1-1", cause=CAUSE))
    decisions = played.decide()
    assert ended(decisions) == ["g0-2-0", "g0-0-0"]
    assert {type(event) for event, _ in decisions[0].events} == {Dropped}
    played.carry_out(decisions)
    assert played.admit() == [f"g4-{m}-0" for m in range(3)]


def test_a_group_that_was_dropped_in_part_is_dropped_and_not_repeated() -> None:
    """The rest gets the same end, and the task does not come again."""
    played = Played(replace(RECIPE, learner=replace(RECIPE.learner, group_size=3)))
    played.admit()
    for attempt in (0, 1):
        played.append(Failed(trajectory=f"g0-0-{attempt}", cause=CAUSE))
        if attempt == 0:
            played.admit()
    played.append(Dropped(trajectory="g0-1-0", reason=""))
    ends = [each for each in played.decide() if isinstance(each, End)]
    assert [type(event) for each in ends for event, _ in each.events] == [Dropped]
    played.carry_out(ends)
    assert played.admit() == [f"g4-{m}-0" for m in range(3)]


def test_a_dead_letter_does_not_fail_who_has_its_reward() -> None:
    """Whatever sequence a faulty replica has written into it."""
    played = Played()
    played.admit()
    played.finish("g0-0-0")
    letter = DeadLetter(
        stage="score", run="r", error="", payload=b"", trajectory="g0-0-0", seq=999,
        boundary="scorer", code="crashed",
    )  # fmt: skip
    assert played.dispatcher.fail(letter) == []


def test_a_dead_letter_fails_its_trajectory_with_the_cause() -> None:
    """Unless it has moved since: then another replica did the hop."""
    played = Played()
    played.admit()
    letter = DeadLetter(
        stage="gen",
        run="r",
        error="out of memory",
        payload=b"",
        trajectory="g0-0-0",
        seq=1,
        boundary="engine",
        code="crashed",
    )
    (end,) = played.dispatcher.fail(letter)
    assert isinstance(end, End)
    ((event, after),) = end.events
    assert after == 1
    assert event.cause == Cause(boundary="engine", code="crashed", detail="out of memory")
    assert played.dispatcher.fail(replace(letter, seq=99)) == [end], (
        "junk lies behind its last event"
    )
    played.append(turn("g0-0-0"))
    assert played.dispatcher.fail(letter) == []
    assert played.dispatcher.fail(replace(letter, trajectory="")) == []


def test_admission_backs_off_while_one_cause_fails_most() -> None:
    """One group at a time shows whether it is over; successes end it."""
    played = Played(replace(RECIPE, asynchrony=Asynchrony(max_staleness=7)))
    names = played.admit()
    assert len(names) == 16
    for name in names[:8]:
        played.append(Failed(trajectory=name, cause=CAUSE))
    assert played.dispatcher.failing_cause == "engine.gone"
    played.append(*(Failed(trajectory=t[:-1] + "1", cause=CAUSE) for t in played.admit()))
    assert len(played.dispatcher.groups) == 4
    assert played.admit() == []
    played.finish(*names[8:])
    played.train(1, *names[8:])
    assert played.dispatcher.failing_cause == "engine.gone"
    while played.dispatcher.failing_cause:
        one = played.admit(version=1)
        assert len(one) == 2, "one group at a time"
        played.finish(*one)
        group = TrajectoryId.parse(one[0]).group
        played.append(Filtered(group=group, reason="zero_variance", trajectories=one))
    assert len(played.admit(version=1)) > 2


def test_a_backed_off_admission_still_fills_a_batch() -> None:
    """A group that waits for the learner is no reason to admit nothing: the learner waits for another."""
    played = Played(replace(RECIPE, asynchrony=Asynchrony(max_staleness=7)))
    names = played.admit()
    played.append(*(Failed(trajectory=name, cause=CAUSE) for name in names[:12]))
    played.append(*(Failed(trajectory=name, cause=CAUSE) for name in played.admit()))
    played.finish(*names[12:])
    assert played.dispatcher.failing_cause == "engine.gone"
    assert len(played.dispatcher.groups) == 2, "scored, and too few for a batch"
    assert len(played.admit()) == 2, "one group more"


# -- deadlines -------------------------------------------------------------------------------------


def test_a_silent_trajectory_is_swept_and_then_fails() -> None:
    """Its work message is sent again `sweeps` times, a deadline apart; each event begins the count anew."""
    played = Played()
    played.admit()
    played.append(*(turn(event.trajectory, calls=1) for event in played.admitted[1:]))
    others = {event.trajectory: 0.0 for event in played.admitted[1:]}
    played.now_s = 9.0
    assert played.patrol(held=others) == []
    for now in (10.0, 20.0):
        played.now_s = now
        assert played.patrol(held=others) == [Sweep("g0-0-0")]
        assert played.patrol(held=others) == []
    played.now_s = 30.0
    (end,) = played.patrol(held=others)
    assert isinstance(end, End)
    ((event, after),) = end.events
    assert (event.trajectory, after) == ("g0-0-0", 1)
    assert event.cause == Cause(
        boundary="deadline", code="gen", detail="no event for 10 s, 2 times"
    )


def test_an_event_begins_the_sweeps_anew() -> None:
    played = Played()
    played.admit()
    others = {event.trajectory: 0.0 for event in played.admitted[1:]}
    for now in (10.0, 20.0):
        played.now_s = now
        played.patrol(held=others)
    played.append(turn("g0-0-0", calls=1))
    played.now_s = 25.0
    assert played.patrol(held=others) == [Sweep("g0-0-0")]


def test_what_another_dispatcher_admitted_and_nobody_took_is_swept_soon() -> None:
    """It may have died before it woke a generator. Once: then, and for what moved, the deadline counts."""
    played = Played()
    (own,) = (each for each in played.admit() if each == "g0-0-0")
    orphans = [
        replace(each, trajectory=f"g9-{n}-0", replica="gone")
        for n, each in enumerate(played.admitted[:3])
    ]
    played.append(*orphans)
    orphan, held, moved = (each.trajectory for each in orphans)
    played.append(turn(moved, calls=1))
    elsewhere = {event.trajectory: 0.0 for event in played.admitted if event.trajectory != own}
    played.now_s = 4.9
    assert played.patrol(held={held: 0.0, **elsewhere}) == []
    played.now_s = 5.0
    assert played.patrol(queues={"gen": Queue(waiting=8, taken=100)}) == [Sweep(moved)], "in line"
    assert played.patrol(held={held: 0.0, **elsewhere}) == [Sweep(orphan)]
    played.now_s = 10.0
    assert played.patrol(held={held: 0.0, **elsewhere}) == [Sweep(own), Sweep(moved)]
    played.now_s = 15.0
    assert Sweep(orphan) in played.patrol(held={held: 0.0, **elsewhere})


def test_each_stage_has_its_own_deadline() -> None:
    """A scored trajectory waits for its group as long as it takes."""
    played = Played()
    names = played.admit()
    tool, score, scored, *rest = names
    played.append(turn(tool, calls=1), turn(score, last=True))
    played.finish(scored)
    played.now_s = 3.0
    assert played.patrol() == [Sweep(score)]
    played.now_s = 5.0
    assert played.patrol() == [Sweep(tool)]
    played.now_s = 1e6
    assert scored not in {each.trajectory for each in played.patrol() if isinstance(each, Sweep)}
    assert rest


def test_what_is_held_is_not_swept() -> None:
    """Silence behind a live replica that took it lately is work and not loss; it uses up no sweep."""
    played = Played()
    names = played.admit()
    for now in (10.0, 20.0, 30.0, 40.0):
        played.now_s = now
        assert played.patrol(held=dict.fromkeys(names, 5.0)) == []
    played.now_s = 50.0
    assert played.patrol() == [Sweep(name) for name in names]


def test_what_is_held_too_long_is_swept_all_the_same() -> None:
    """After one more deadline another replica may take it; in the end it fails like any silent one."""
    played = Played()
    (name, *others) = played.admit()
    fine = dict.fromkeys(others, 0.0)
    for now, decided in (
        (10.0, []),
        (19.0, []),
        (20.0, [Sweep(name)]),
        (29.0, []),
        (30.0, [Sweep(name)]),
    ):
        played.now_s = now
        assert played.patrol(held={name: now, **fine}) == decided
    played.now_s = 40.0
    assert played.patrol(held={name: 3.0, **fine}) == [], "another has taken it"
    played.now_s = 57.0
    assert ended(played.patrol(held={name: 20.0, **fine})) == [name]


def test_what_may_lie_in_its_queue_is_not_swept() -> None:
    """Overload is waiting: until all that was before it has been given out, however long that takes."""
    played = Played()
    names = played.admit()
    for now in (10.0, 20.0, 3000.0):
        played.now_s = now
        assert played.patrol(queues={"gen": Queue(waiting=8, taken=100)}) == []
    played.now_s = 3010.0
    assert played.patrol(queues={"gen": Queue(waiting=50, taken=107)}) == []
    assert played.patrol(queues={"gen": Queue(waiting=50, taken=108), "score": Queue(9, 0)}) == [
        Sweep(name) for name in names
    ]


def test_each_tool_has_its_own_queue() -> None:
    """A call that waits for a busy tool is not lost because another tool's queue moves."""
    played = Played()
    (name, *others) = played.admit()
    calls = [Call(tool=tool, arguments={}) for tool in ("search", "python")]
    played.append(replace(turn(name), calls=calls))
    fine = dict.fromkeys(others, 0.0)
    busy = {"tool.search": Queue(waiting=1, taken=0), "tool.python": Queue(waiting=0, taken=9)}
    played.now_s = 5.0
    assert played.patrol(held=fine, queues=busy) == []
    played.append(Result(trajectory=name, turn=0, call=0, text=""))
    played.now_s = 10.0
    assert played.patrol(held=fine, queues=busy) == [Sweep(name)]


def test_every_event_that_moves_the_log_is_seen() -> None:
    """An end is appended after the last one, `started` too; what comes after the score moves nothing."""
    played = Played()
    (name, *_) = played.admit()
    played.append(turn(name, calls=1), Started(trajectory=name, turn=0, call=0))
    live = played.dispatcher.live[name]
    assert (live.seq, live.stage) == (played.seq, "tool")
    played.append(Result(trajectory=name, turn=0, call=0, text=""))
    played.finish(name)
    last = played.seq
    played.append(turn(name, calls=1))
    assert (live.seq, live.stage) == (last, "scored")


def test_calls_of_a_turn_keep_it_with_the_tools_until_the_last() -> None:
    """The stage is folded from the log, results and all."""
    played = Played()
    (name, *others) = played.admit()
    played.append(turn(name, calls=2))
    stages = []
    for call in range(2):
        stages.append(played.dispatcher.live[name].stage)
        played.append(Result(trajectory=name, turn=0, call=call, text=""))
    assert [*stages, played.dispatcher.live[name].stage] == ["tool", "tool", "gen"]
    assert others


# -- staleness -------------------------------------------------------------------------------------


def test_a_group_with_a_stale_member_is_expired_and_its_task_comes_again() -> None:
    """By its oldest token; unfinished members end first. The repeat has a name of its own, and comes first."""
    played = Played()
    played.admit()
    played.finish("g0-0-0")
    played.append(turn("g0-1-0", version=0, calls=1), turn("g1-0-0", version=1, calls=1))
    assert played.patrol(version=1) == []
    decisions = played.patrol(version=2)
    assert ended(decisions) == ["g0-1-0", "g0-0-0"]
    assert {type(event) for event, _ in decisions[0].events} == {Expired}
    played.carry_out(decisions)
    assert played.admit(version=2) == ["g0r1-0-0", "g0r1-1-0"]
    again = played.admitted[-1]
    assert (again.task, again.private_key, again.min_policy_version) == ("r0", "g0", 2)


@pytest.mark.parametrize("versions", [(0, 1), (1, 0)])
def test_a_member_is_as_old_as_its_oldest_turn(versions: tuple[int, int]) -> None:
    """The second may come from a replica that lags behind."""
    played = Played()
    played.admit()
    for version in versions:
        played.append(turn("g0-1-0", version=version, calls=1))
    assert sorted(ended(played.patrol(version=2))) == ["g0-0-0", "g0-1-0"]


def test_a_member_admitted_after_its_group_was_closed_is_dropped() -> None:
    """By a dispatcher that had lost its lease. It makes no new group, holds no slot, and the run can end."""
    played = Played()
    first = next(each for each in played.decide() if isinstance(each, Admit))
    early, late = first.events
    played.append(early, Expired(trajectory="g0-0-0", reason=""))
    assert "g0r1-0-0" in played.admit()
    groups = set(played.dispatcher.groups)
    played.append(late)
    assert set(played.dispatcher.groups) == groups
    decisions = played.decide()
    assert ended(decisions) == [late.trajectory] == ["g0-1-0"]
    assert played.carry_out(decisions) == []
    assert played.decide() == []


def test_a_group_expired_in_part_is_repeated_once() -> None:
    """Only when all of it is ended: the prompt is never in two groups at a time."""
    played = Played()
    played.admit()
    played.append(Expired(trajectory="g0-0-0", reason=""))
    played.finish("g1-0-0", "g1-1-0")
    played.append(Filtered(group="g1", reason="stale", trajectories=["g1-0-0", "g1-1-0"]))
    decisions = played.decide()
    assert ended(decisions) == ["g0-1-0"]
    assert played.carry_out(decisions) == ["g4-0-0", "g4-1-0"]
    assert played.admit() == ["g0r1-0-0", "g0r1-1-0"]
    assert played.admit() == []


def test_a_complete_group_is_the_learner_s_to_filter() -> None:
    """However old it is."""
    played = Played()
    played.admit()
    played.finish("g0-0-0", "g0-1-0")
    assert played.patrol(version=3) == []


# -- evaluation ------------------------------------------------------------------------------------

HELD_OUT = [
    TaskRow(id=f"h{i}", public=PublicPart(messages=[]), private={"answer": i}) for i in range(2)
]


def evaluated(played: Played) -> list[tuple[str, int | None]]:
    return [
        (event.trajectory, event.pinned_policy_version)
        for event in played.admitted
        if event.purpose == "eval"
    ]


def test_version_0_is_evaluated_first() -> None:
    """Pinned, at its own temperature, and without taking a slot."""
    played = Played(evaluation=HELD_OUT)
    played.admit()
    assert evaluated(played) == [("e0x0-0-0", 0), ("e0x1-0-0", 0)]
    event = played.admitted[0]
    assert (event.temperature, event.task, event.private_key) == (0.25, "h0", "e0x0")
    assert len(played.dispatcher.groups) == 4
    assert played.admit() == []


def test_every_so_many_steps_and_the_last_version_are_evaluated() -> None:
    """Also one that went by between two looks."""
    recipe = replace(RECIPE, evaluation=Evaluation(every_steps=2))
    played = Played(recipe, HELD_OUT[:1])
    for version in (0, 1, 3, 4):
        played.admit(version)
    assert evaluated(played) == [("e0x0-0-0", 0), ("e2x0-0-0", 2), ("e4x0-0-0", 4)]


def test_without_a_rhythm_only_the_first_and_the_last_version_are_evaluated() -> None:
    played = Played(evaluation=HELD_OUT[:1])
    for version in range(5):
        played.admit(version)
    assert [version for _, version in evaluated(played)] == [0, 4]


def test_an_evaluation_that_fails_is_tried_once_more() -> None:
    """Its loss ends nobody else."""
    played = Played(evaluation=HELD_OUT[:1])
    played.admit()
    for attempt, expected in ((0, ["e0x0-0-1"]), (1, [])):
        played.append(Failed(trajectory=f"e0x0-0-{attempt}", cause=CAUSE))
        assert played.admit() == expected


# -- barriers --------------------------------------------------------------------------------------


def test_with_barriers_all_are_woken_when_the_last_arrives() -> None:
    """Nobody goes on alone; the next batch begins when the last is scored and trained."""
    played = Played(replace(RECIPE, asynchrony=Asynchrony(max_staleness=0, barriers=True)))
    names = played.admit()
    assert len(names) == 4
    played.append(*(turn(name, last=True) for name in names[:3]))
    assert played.decide() == []
    played.append(turn(names[3], calls=1))
    assert played.decide() == [Wake(name) for name in names]
    assert played.decide() == []
    played.append(*(Scored(trajectory=name, reward=1.0) for name in names[:3]))
    assert played.decide() == []
    played.append(Result(trajectory=names[3], turn=0, call=0, text=""))
    assert played.decide() == [Wake(names[3])]
    played.finish(names[3])
    assert played.decide() == [], "the batch is not trained yet"
    played.train(1, *names)
    assert len(played.admit(version=1)) == 4


# -- the end ---------------------------------------------------------------------------------------


def test_the_run_ends_when_all_steps_are_done_and_all_is_closed() -> None:
    """What is left is expired, the last version is evaluated, and the end is said once."""
    played = Played(evaluation=HELD_OUT[:1])
    played.admit()
    played.append(Evaluated(trajectory="e0x0-0-0", reward=1.0))
    played.finish("g0-0-0", "g0-1-0", "g1-0-0")
    played.append(Failed(trajectory="g2-0-0", cause=CAUSE))
    for step in range(1, 5):
        played.train(step, *(["g0-0-0", "g0-1-0"] if step == 1 else []))
    assert not any(isinstance(each, Finish) for each in played.decide(version=3))
    decisions = played.decide(version=4)
    assert sorted(ended(decisions)) == ["g1-0-0", "g1-1-0", "g2-1-0", "g3-0-0", "g3-1-0"]
    assert played.carry_out(decisions) == ["e4x0-0-0"]
    assert played.decide(version=4) == []
    played.append(Evaluated(trajectory="e4x0-0-0", reward=1.0))
    (finish,) = played.decide(version=4)
    assert isinstance(finish, Finish)
    assert finish.event.reason == "all steps done"
    played.append(finish.event)
    assert played.dispatcher.ended
    assert played.decide(version=4) == []
    assert played.patrol(version=4) == []


def test_a_paused_run_does_not_end() -> None:
    """Its last evaluation is still to be admitted."""
    played = Played(
        replace(RECIPE, learner=replace(RECIPE.learner, steps=0)), evaluation=HELD_OUT[:1]
    )
    played.append(Paused())
    assert played.decide() == []
    played.append(Resumed())
    assert played.admit() == ["e0x0-0-0"]


def test_without_steps_the_run_is_its_evaluation() -> None:
    played = Played(
        replace(RECIPE, learner=replace(RECIPE.learner, steps=0)), evaluation=HELD_OUT[:1]
    )
    assert played.admit() == ["e0x0-0-0"]
    played.append(Evaluated(trajectory="e0x0-0-0", reward=1.0))
    assert [type(each) for each in played.decide()] == [Finish]
