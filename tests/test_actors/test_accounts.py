"""The accounts: whole runs balance, and every single change of the log that breaks a rule is found, by name."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import json, structs
from msgspec.structs import replace

from actors.accounts import Accounts
from actors.decisions import Admit, End, Finish, View
from actors.dispatcher import ATTEMPTS, Dispatcher
from actors.learner import Planner
from actors.rules import RULES, Report, Rule
from actors.verify import audit, verify
from bus import subjects
from bus.codec import encode
from bus.connection import Bus
from bus.embedded import EmbeddedServer
from bus.log import Log as BusLog
from schemas.events import (
    TERMINAL,
    Admitted,
    AnyEvent,
    Call,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Opened,
    Result,
    Scored,
    Step,
    Stepped,
    TrajectoryEvent,
    Turn,
    Warmed,
)
from schemas.messages import DeadLetter
from schemas.recipe import Asynchrony, Evaluation, Generator, Learner, Policy, Recipe
from schemas.task import PublicPart, TaskRow
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, TrajectoryId, fold

RECIPE = Recipe(
    policy=Policy(model="m"),
    learner=Learner(steps=5, groups_per_step=1, group_size=2, refill_limit=2.0),
    asynchrony=Asynchrony(max_staleness=1),
    generator=Generator(slots=4),
    evaluation=Evaluation(rows="m:f", every_steps=3),
)
SLOTS = RECIPE.learner.groups_per_step * (RECIPE.asynchrony.max_staleness + 1)
HELD_OUT = [TaskRow(id="h0", public=PublicPart(messages=[]))]

Log = list[AnyEvent]


def rows() -> Iterator[TaskRow]:
    return (TaskRow(id=f"r{i}", public=PublicPart(messages=[])) for i in itertools.count())


class Play:
    """A run from `opened` to `ended`: the real dispatcher and planner; the rest by chance."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.log: Log = []
        self.states: dict[str, Trajectory] = {}
        self.dispatcher = Dispatcher(RECIPE, rows(), HELD_OUT)
        self.planner = Planner(RECIPE, 0)
        self.version = 0
        self.append(Opened(recipe=RECIPE))
        self.append(Warmed(step=1, steps=1, metrics={}))
        while not self.dispatcher.ended:
            self.round()

    def append(self, event: AnyEvent) -> None:
        self.log.append(event)
        seq = len(self.log)
        if isinstance(event, TrajectoryEvent):
            state = self.states.get(event.trajectory)
            self.states[event.trajectory] = fold(state, event, seq)  # type: ignore[arg-type]
        self.dispatcher.observe(event, seq, 0.0)
        self.planner.observe(event, seq, float(seq))

    def round(self) -> None:
        view = View(now_s=0.0, policy_version=self.version)
        for decision in [*self.dispatcher.patrol(view), *self.dispatcher.decide(view)]:
            if isinstance(decision, Finish):
                self.append(decision.event)
            elif isinstance(decision, Admit):
                for event in decision.events:
                    self.append(event)
            elif isinstance(decision, End):
                for event, after in decision.events:
                    if self.states[event.trajectory].seq == after:
                        self.append(event)
        for state in list(self.states.values()):
            slow = state.id.endswith("1-0") and self.rng.random() < 0.8
            if state.next_hop is not None and not slow and self.rng.random() < 0.7:
                self.hop(state)
        self.learn()

    def hop(self, state: Trajectory) -> None:
        name, hop = state.id, state.next_hop
        assert hop is not None
        if self.rng.random() < 0.1:
            letter = DeadLetter(
                stage=hop.stage, run="r", error="", payload=b"", trajectory=name, seq=state.seq
            )
            for decision in self.dispatcher.fail(letter):
                assert isinstance(decision, End)
                self.append(decision.events[0][0])
        elif hop.stage == "gen":
            pinned = state.admitted.pinned_policy_version
            version = self.version if pinned is None else pinned
            calls = self.rng.choice([0, 0, 1, 2]) if len(state.turns) < 3 else 0
            self.append(
                Turn(
                    trajectory=name,
                    tokens=Tokens.given([1]) + Tokens.sampled([2], [-0.5], [version]),
                    text="",
                    calls=[Call(tool="python", arguments={})] * calls,
                    last=not calls,
                )
            )
        elif hop.stage == "tool":
            assert state.next_call is not None
            turn, call = len(state.turns) - 1, state.next_call[0]
            self.append(Result(trajectory=name, turn=turn, call=call, text=""))
        else:
            kind = Evaluated if state.admitted.purpose == "eval" else Scored
            self.append(kind(trajectory=name, reward=self.rng.choice([0.0, 1.0])))

    def learn(self) -> None:
        for event in self.planner.filters(self.version):
            self.append(event)
        if step := self.planner.plan(self.version):
            self.append(step)
            made = Stepped(step=step.step, policy_version=step.step, weights_sha256="", metrics={})
            self.append(made)
            self.version = step.step


def report(log: Log, learner: str = "main") -> Report:
    accounts = Accounts()
    for event in log:
        accounts.observe(event, learner)
    return accounts.report("r")


@functools.cache
def played(seed: int) -> Log:
    return Play(seed).log


LOGS = st.integers(0, 39).map(played)


@given(log=LOGS)
@settings(max_examples=25, deadline=None)
def test_whole_runs_balance(log: Log) -> None:
    """Whatever happens: admitted is the sum of all fates at the end, and with what is in flight at any time before."""
    accounts = Accounts()
    for count, event in enumerate(log, 1):
        accounts.observe(event)
        if count % 10 == 0 or count == len(log):
            found = accounts.report()
            assert found.broken == {}
            assert found.admitted == sum(found.fates.values()) + found.in_flight
            assert found.in_flight == sum(found.in_flight_by_stage.values())
    assert found.balanced
    assert found.in_flight == 0
    assert found.steps == RECIPE.learner.steps
    assert found.fates["trained"] >= RECIPE.learner.steps * RECIPE.learner.group_size
    assert found.fates["failed"] == sum(found.failed_by_cause.values())
    assert found.fates["filtered"] == sum(found.filtered_by_reason.values())


def test_other_learners_train_nobody() -> None:
    """A shadow learner's steps are no fate: what it alone has trained is in flight."""
    accounts = Accounts()
    for event in Play(1).log:
        learning = isinstance(event, Step | Stepped | Filtered)
        accounts.observe(event, "shadow" if learning else "main")
    found = accounts.report()
    assert found.fates["trained"] == found.fates["filtered"] == found.steps == 0
    assert found.in_flight_by_stage["scored"] > 0


def test_names_of_no_trajectory_are_reported() -> None:
    """An id that nobody could have made does not stop the accounts."""
    found = report([Scored(trajectory="?", reward=1.0), Expired(trajectory="g1-2", reason="")])
    assert found.broken == {"never_admitted": ["?", "g1-2"]}


# -- mutations: each a single change, with the rule that it breaks and who breaks it ---------------


class Broken(NamedTuple):
    log: Log
    who: str


Mutation = Callable[[Log, random.Random], Broken]


def pick(log: Log, rng: random.Random, kind: type, fits: Callable[..., bool] = bool) -> int:
    """The place of an event of the kind; a run without one is no example."""
    places = [at for at, e in enumerate(log) if isinstance(e, kind) and (fits is bool or fits(e))]
    assume(places)
    return rng.choice(places)


def put(log: Log, at: int, *events: AnyEvent) -> Log:
    """The log with other events at one place."""
    return [*log[:at], *events, *log[at + 1 :]]


def name_of(event: AnyEvent) -> str:
    assert isinstance(event, TrajectoryEvent)
    return event.trajectory


def in_steps(log: Log) -> list[str]:
    return [name for event in log if isinstance(event, Step) for name in event.trajectories]


def renamed(log: Log, old: str, new: str) -> Log:
    """One trajectory under another name, wherever it is named."""
    changed: Log = []
    for event in log:
        if isinstance(event, TrajectoryEvent) and event.trajectory == old:
            event = replace(event, trajectory=new)
        elif isinstance(event, Step | Filtered) and old in event.trajectories:
            names = [new if name == old else name for name in event.trajectories]
            event = replace(event, trajectories=names)
        changed.append(event)
    return changed


def admission_dropped(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Admitted)
    return Broken(put(log, at), name_of(log[at]))


def admission_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Admitted)
    later = rng.randrange(at, len(log))
    return Broken([*log[: later + 1], log[at], *log[later + 1 :]], name_of(log[at]))


def turn_after_the_end(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Turn)
    return Broken([*log, log[at]], name_of(log[at]))


def end_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, TERMINAL)  # type: ignore[arg-type]
    return Broken([*log, log[at]], name_of(log[at]))


def trained_then_expired(log: Log, rng: random.Random) -> Broken:
    name = rng.choice(in_steps(log))
    return Broken([*log, Expired(trajectory=name, reason="")], name)


def expired_before_trained(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    name = rng.choice(step.trajectories)
    return Broken(put(log, at, Expired(trajectory=name, reason=""), step), name)


def step_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    return Broken(put(log, at, step, step), f"step {step.step}")


def step_with_another_batch(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    other = replace(step, trajectories=[], filtered=[])
    return Broken(put(log, at, step, other), f"step {step.step}")


def trained_in_two_steps(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step, lambda step: step.step > 1)
    step = log[at]
    before = next(event for event in log if isinstance(event, Step))
    assert isinstance(step, Step)
    both = replace(step, trajectories=[*step.trajectories, *before.trajectories])
    return Broken(put(log, at, both), rng.choice(before.trajectories))


def member_missing(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    name = rng.choice(step.trajectories)
    rest = [other for other in step.trajectories if other != name]
    group = TrajectoryId.parse(name).group
    return Broken(put(log, at, replace(step, trajectories=rest)), group)


def member_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    group = TrajectoryId.parse(step.trajectories[-1]).group
    names = [*step.trajectories, step.trajectories[-1]]
    return Broken(put(log, at, replace(step, trajectories=names)), group)


def member_of_another_group(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    others = [name for name in in_steps(log) if name not in step.trajectories]
    names = [rng.choice(others), *step.trajectories[1:]]
    group = TrajectoryId.parse(step.trajectories[0]).group
    return Broken(put(log, at, replace(step, trajectories=names)), group)


def member_of_another_task(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Admitted, lambda event: "-1-" in event.trajectory)
    changed = replace(log[at], task="another")  # type: ignore[type-var]
    return Broken(put(log, at, changed), name_of(log[at]))


def score_dropped(log: Log, rng: random.Random) -> Broken:
    trained = {*in_steps(log), *(n for e in log if isinstance(e, Filtered) for n in e.trajectories)}
    at = pick(log, rng, Scored, lambda event: event.trajectory in trained)
    group = TrajectoryId.parse(name_of(log[at])).group
    return Broken(put(log, at), group)


def score_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Scored)
    return Broken(put(log, at, log[at], log[at]), name_of(log[at]))


def stepped_dropped(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Stepped, lambda event: event.step < RECIPE.learner.steps)
    return Broken(put(log, at), f"step {log[at].step + 1}")  # type: ignore[union-attr]


def stepped_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Stepped)
    step = f"step {log[at].step}"  # type: ignore[union-attr]
    return Broken(put(log, at, log[at], log[at]), step)


def step_dropped(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    return Broken(put(log, at), f"step {log[at].step}")  # type: ignore[union-attr]


def steps_swapped(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    assert isinstance(log[at + 1], Stepped)
    step = f"step {log[at].step}"  # type: ignore[union-attr]
    return Broken(put(put(log, at, log[at + 1]), at + 1, log[at]), step)


def step_from_another_version(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    changed = replace(step, start_version=step.start_version + 1)
    return Broken(put(log, at, changed), f"step {step.step}")


def version_not_step(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Stepped)
    stepped = log[at]
    assert isinstance(stepped, Stepped)
    changed = replace(stepped, policy_version=stepped.step + 1)
    return Broken(put(log, at, changed), f"step {stepped.step}")


def filter_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Filtered)
    return Broken(put(log, at, log[at], log[at]), log[at].group)  # type: ignore[union-attr]


def filter_dropped(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Filtered)
    step = next((event for event in log[at:] if isinstance(event, Step)), None)
    assume(step is not None)
    assert step is not None
    return Broken(put(log, at), f"step {step.step}")


def filter_of_trained(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step)
    step = log[at]
    assert isinstance(step, Step)
    group = TrajectoryId.parse(step.trajectories[0]).group
    names = [name for name in step.trajectories if TrajectoryId.parse(name).group == group]
    event = Filtered(group=group, reason="stale", trajectories=names)
    return Broken(put(log, at, step, event), names[0])


def too_many_attempts(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Admitted)
    name = name_of(log[at])
    new = str(TrajectoryId.parse(name)._replace(attempt=ATTEMPTS))
    return Broken(renamed(log, name, new), new)


def failure_dropped(log: Log, rng: random.Random) -> Broken:
    admitted = {event.trajectory for event in log if isinstance(event, Admitted)}

    def replacement(name: str) -> str:
        return str(TrajectoryId.parse(name)._replace(attempt=1))

    at = pick(
        log,
        rng,
        Failed,
        lambda event: event.trajectory.endswith("-0") and replacement(event.trajectory) in admitted,
    )
    return Broken(put(log, at), replacement(name_of(log[at])))


def end_dropped(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, TERMINAL)  # type: ignore[arg-type]
    return Broken(put(log, at), name_of(log[at]))


def last_turn_dropped(log: Log, rng: random.Random) -> Broken:
    ends = {event.trajectory for event in log if isinstance(event, Scored | Evaluated)}
    at = pick(log, rng, Turn, lambda event: event.last and event.trajectory in ends)
    return Broken(put(log, at), name_of(log[at]))


def turn_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Turn)
    return Broken(put(log, at, log[at], log[at]), name_of(log[at]))


def result_dropped(log: Log, rng: random.Random) -> Broken:
    turns = [name_of(event) for event in log if isinstance(event, Turn)]
    at = pick(log, rng, Result, lambda event: turns.count(event.trajectory) > event.turn + 1)
    return Broken(put(log, at), name_of(log[at]))


def result_doubled(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Result)
    return Broken(put(log, at, log[at], log[at]), name_of(log[at]))


def result_unasked(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Result)
    changes = rng.choice([{"call": 2}, {"turn": log[at].turn + 1}])  # type: ignore[union-attr]
    changed = replace(log[at], **changes)  # type: ignore[type-var]
    return Broken(put(log, at, changed), name_of(log[at]))


def resampled(turn: AnyEvent, version: int) -> Turn:
    assert isinstance(turn, Turn)
    return replace(turn, tokens=Tokens.given([1]) + Tokens.sampled([2], [-0.5], [version]))


def sampled_by_the_future(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Turn)
    newest = max((e.policy_version for e in log[:at] if isinstance(e, Stepped)), default=0)
    return Broken(put(log, at, resampled(log[at], newest + 1)), name_of(log[at]))


def sampled_by_another_than_pinned(log: Log, rng: random.Random) -> Broken:
    pinned = {
        event.trajectory for event in log if isinstance(event, Admitted) and event.purpose == "eval"
    }
    at = pick(log, rng, Turn, lambda event: event.trajectory in pinned)
    version = min(resampled(log[at], 0).tokens.versions_T)  # -1 is no version at all
    changed = resampled(log[at], version)
    return Broken(put(log, at, changed), name_of(log[at]))


def too_stale(log: Log, rng: random.Random) -> Broken:
    at = pick(log, rng, Step, lambda step: step.start_version > RECIPE.asynchrony.max_staleness)
    name = rng.choice(log[at].trajectories)  # type: ignore[union-attr]
    changed: Log = []
    for event in log:
        if isinstance(event, Admitted) and event.trajectory == name:
            event = replace(event, min_policy_version=0)
        elif isinstance(event, Turn) and event.trajectory == name:
            event = resampled(event, 0)
        changed.append(event)
    return Broken(changed, name)


def prompt_skipped(log: Log, rng: random.Random) -> Broken:
    """One group less, as if its row had never been read."""
    numbers = sorted(
        int(name[1:])
        for name in {TrajectoryId.parse(name_of(e)).group for e in log if isinstance(e, Admitted)}
        if name[0] == "g" and "r" not in name
    )
    assume(numbers[-1] >= SLOTS)
    group = f"g{rng.choice(numbers[:-SLOTS])}"
    changed: Log = []
    for event in log:
        if isinstance(event, TrajectoryEvent):
            if TrajectoryId.parse(event.trajectory).group == group:
                continue
        elif isinstance(event, Step):
            names = [n for n in event.trajectories if TrajectoryId.parse(n).group != group]
            filtered = [name for name in event.filtered if name != group]
            event = replace(event, trajectories=names, filtered=filtered)
        elif isinstance(event, Filtered) and event.group == group:
            continue
        changed.append(event)
    return Broken(changed, group)


def prompt_repeated(log: Log, rng: random.Random) -> Broken:
    group = TrajectoryId.parse(in_steps(log)[0]).group
    at = pick(log, rng, Admitted, lambda event: event.trajectory.startswith(f"{group}-"))
    again = f"{group}r1" if "r" not in group else f"{group.partition('r')[0]}r9"
    event = replace(log[at], trajectory=f"{again}-0-0")  # type: ignore[type-var]
    return Broken([*log[:-1], event], again)


MUTATIONS: dict[Rule, list[Mutation]] = {
    "never_admitted": [admission_dropped],
    "admitted_twice": [admission_doubled],
    "after_end": [turn_after_the_end, end_doubled],
    "two_fates": [trained_then_expired, expired_before_trained, filter_of_trained],
    "step_repeated": [step_doubled, step_with_another_batch, stepped_doubled],
    "trained_twice": [trained_in_two_steps],
    "broken_group": [
        member_missing,
        member_doubled,
        member_of_another_group,
        member_of_another_task,
        score_dropped,
    ],
    "out_of_turn": [score_doubled, last_turn_dropped, turn_doubled, result_dropped],
    "step_order": [stepped_dropped, step_from_another_version],
    "stepped_unbegun": [step_dropped, steps_swapped],
    "version_not_step": [version_not_step],
    "filtered_twice": [filter_doubled],
    "filtered_unlisted": [filter_dropped],
    "too_many_attempts": [too_many_attempts],
    "replaced_unfailed": [failure_dropped],
    "in_flight_at_end": [end_dropped],
    "result_twice": [result_doubled],
    "unasked_result": [result_unasked],
    "unpublished_version": [sampled_by_the_future, sampled_by_another_than_pinned],
    "too_stale": [too_stale],
    "prompt_skipped": [prompt_skipped],
    "prompt_repeated": [prompt_repeated],
}


def test_every_rule_has_a_mutation() -> None:
    """No rule is there that nothing was seen to break."""
    assert set(MUTATIONS) == set(RULES)


@pytest.mark.parametrize(
    ("rule", "mutation"),
    [(rule, mutation) for rule, mutations in MUTATIONS.items() for mutation in mutations],
)
@given(log=LOGS, rng=st.randoms(use_true_random=False))
@settings(max_examples=6, deadline=None)
def test_every_break_is_named(rule: Rule, mutation: Mutation, log: Log, rng: random.Random) -> None:
    """One change to the log of a whole run: the rule that it breaks is reported, with who breaks it."""
    assert report(log).balanced
    broken = mutation(log, rng)
    found = report(broken.log)
    assert not found.balanced
    assert broken.who in found.broken.get(rule, []), found.broken


# -- the command -----------------------------------------------------------------------------------


async def write(bus: Bus, run_log: BusLog, log: Log) -> None:
    """Store a log as its writers would have, but without their rules."""
    for event in log:
        if isinstance(event, TrajectoryEvent):
            subject = subjects.trajectory(run_log.run, event.trajectory, event.kind)
        elif isinstance(event, Warmed | Filtered | Step | Stepped):
            subject = subjects.learner(run_log.run, "main", event.kind)
        else:
            subject = subjects.run_event(run_log.run, event.kind)
        await bus.store(subject, encode(event))


async def test_a_stored_run_is_audited(bus: Bus, log: BusLog) -> None:
    """The stored log comes to the same as its events; junk and dead letters are counted and change nothing else."""
    played_log = played(0)
    await write(bus, log, played_log)
    await bus.store(subjects.trajectory(log.run, "g0-0-0", "turn"), b"\xc1")
    await bus.store(subjects.run_event(log.run, "ended"), encode(played_log[0]))
    shadow = Step(step=1, start_version=0, trajectories=["g0-0-0"])
    await bus.store(subjects.learner(log.run, "shadow", "step"), encode(shadow))
    letter = DeadLetter(stage="gen", run=log.run, error="", payload=b"")
    await bus.store(subjects.dead("gen", log.run), encode(letter))
    found = await audit(bus, log.run)
    assert found == structs.replace(report(played_log), run=log.run, junk=2, dead_letters=1)
    assert found.balanced


async def test_the_exit_status_says_whether_it_balances(
    server: EmbeddedServer,
    bus: Bus,
    log: BusLog,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """0 and a table; 1 and a line for the broken rule with who breaks it; the same as JSON."""
    url = str(tmp_path / "logins")
    server.logins.write(tmp_path / "logins")
    await write(bus, log, played(1))
    assert await verify(log.run, url, as_json=False) == 0
    assert capsys.readouterr().out.endswith("balanced: each has one fate\n")
    await write(bus, log, [Expired(trajectory="g99-0-0", reason="")])
    assert await verify(log.run, url, as_json=False) == 1
    rule = RULES["never_admitted"]
    assert f"never_admitted: {rule}: g99-0-0\nNOT balanced\n" in capsys.readouterr().out
    assert await verify(log.run, url, as_json=True) == 1
    found = json.decode(capsys.readouterr().out.encode(), type=Report)
    assert found.broken == {"never_admitted": ["g99-0-0"]}
