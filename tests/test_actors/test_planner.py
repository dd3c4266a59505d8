"""The planner: which groups make a step, which are filtered, and the same again from any prefix of the log."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from actors.learner import Batch, Planner, step_metrics, step_rewards
from schemas.algorithm import Filter
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
    Result,
    Scored,
    Step,
    Stepped,
    Turn,
)
from schemas.recipe import Asynchrony, Learner, Policy, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

RECIPE = Recipe(
    policy=Policy(model="m"),
    seed=11,
    learner=Learner(steps=3, groups_per_step=2, group_size=2, refill_limit=2.0, threads=3),
    asynchrony=Asynchrony(max_staleness=1),
)

CAUSE = Cause(boundary="engine", code="crashed")


def life(
    name: str, reward: float | None, *, version: int = 0, calls: int = 0, length: bool = False
) -> list[AnyEvent]:
    """A trajectory from its admission to its reward; without one it goes on."""
    events: list[AnyEvent] = [
        Admitted(trajectory=name, task="t", public=PublicPart(messages=[]), private_key="")
    ]
    call = Call(tool="python", arguments={})
    for index in range(calls):
        events += [
            Turn(trajectory=name, tokens=tokens(version), text="", calls=[call]),
            Result(trajectory=name, turn=index, call=0, text=""),
        ]
    reason = "length" if length else "stop"
    last = reward is not None
    events.append(
        Turn(trajectory=name, tokens=tokens(version), text="", finish_reason=reason, last=last)
    )
    return [*events, Scored(trajectory=name, reward=reward)] if reward is not None else events


def tokens(version: int) -> Tokens:
    return Tokens.given([1]) + Tokens.sampled([2, 3], [-0.5, -0.5], [version, version + 1])


def group(name: str, *rewards: float, version: int = 0) -> list[AnyEvent]:
    return [
        event
        for member, reward in enumerate(rewards)
        for event in life(f"{name}-{member}-0", reward, version=version)
    ]


class Learning:
    """A planner and the log that it reads and writes, a second an event."""

    def __init__(self, recipe: Recipe = RECIPE, checkpoint_step: int = 0) -> None:
        self.planner = Planner(recipe, checkpoint_step, "learner")
        self.log: list[AnyEvent] = []

    def append(self, *events: AnyEvent) -> None:
        for event in events:
            self.log.append(event)
            self.planner.observe(event, len(self.log), float(len(self.log)))

    def learn(self, version: int) -> Step | None:
        """Filter, and begin a step if there is one."""
        self.append(*self.planner.filters(version))
        assert self.planner.filters(version) == []
        step = self.planner.plan(version)
        if step is not None:
            self.append(step)
        return step

    def finish(self, step: int) -> None:
        self.append(Stepped(step=step, policy_version=step, weights_sha256="", metrics={}))


def groups_of(step: Step | None) -> list[str]:
    assert step is not None
    return [name.partition("-")[0] for name in step.trajectories[:: RECIPE.learner.group_size]]


# -- batches ---------------------------------------------------------------------------------------


def test_a_step_closes_at_its_number_of_groups() -> None:
    """In the order in which they became complete, members side by side; the next takes what is left."""
    learning = Learning()
    for name in ("g2", "g0"):
        assert learning.learn(0) is None
        learning.append(*group(name, 0.0, 1.0))
    learning.append(*group("g1", 1.0, 0.0))
    step = learning.learn(0)
    assert step == Step(
        replica="learner",
        step=1,
        start_version=0,
        trajectories=["g2-0-0", "g2-1-0", "g0-0-0", "g0-1-0"],
        seed=11,
        threads=3,
    )
    batch = learning.planner.batches[1]
    assert [[member.id for member in each] for each in batch.groups] == [
        ["g2-0-0", "g2-1-0"],
        ["g0-0-0", "g0-1-0"],
    ]
    learning.finish(1)
    learning.append(*group("g3", 1.0, 0.0))
    assert groups_of(learning.learn(1)) == ["g1", "g3"]


def test_an_incomplete_group_is_not_trained() -> None:
    """However many of its members are scored."""
    learning = Learning()
    for name in ("g0", "g1", "g2"):
        learning.append(*life(f"{name}-0-0", 1.0))
    assert learning.learn(0) is None


def test_members_are_in_the_order_of_their_slots() -> None:
    """Whichever was scored first, and whichever attempt it is."""
    learning = Learning()
    learning.append(*life("g0-1-1", 1.0), *life("g0-0-0", 0.0), *group("g1", 0.0, 1.0))
    step = learning.learn(0)
    assert step is not None
    assert step.trajectories == ["g0-0-0", "g0-1-1", "g1-0-0", "g1-1-0"]


def test_groups_without_variance_are_filtered() -> None:
    """They count in the step's rewards, and it names them."""
    learning = Learning()
    learning.append(*group("g0", 1.0, 1.0), *group("g1", 0.0, 1.0))
    assert learning.planner.filters(0) == [
        Filtered(
            replica="learner",
            group="g0",
            reason="zero_variance",
            trajectories=["g0-0-0", "g0-1-0"],
        )
    ]
    assert learning.learn(0) is None
    learning.append(*group("g2", 0.0, 1.0))
    step = learning.learn(0)
    assert groups_of(step) == ["g1", "g2"]
    assert step is not None
    assert step.filtered == ["g0"]
    assert step_rewards(learning.planner.batches[1]) == [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    learning.finish(1)
    learning.append(*group("g3", 0.0, 1.0), *group("g4", 0.0, 1.0))
    assert (learning.learn(1) or Step(step=0, start_version=0, trajectories=[])).filtered == []


def test_groups_too_old_are_filtered() -> None:
    """By the oldest of their tokens; their rewards do not count."""
    learning = Learning()
    learning.append(*group("g0", 0.0, 1.0, version=0), *group("g1", 0.0, 1.0, version=1))
    assert learning.planner.filters(1) == []
    (filtered,) = learning.planner.filters(2)
    assert (filtered.group, filtered.reason) == ("g0", "stale")
    learning.learn(2)
    learning.append(*group("g2", 0.0, 1.0, version=2))
    learning.learn(2)
    assert len(step_rewards(learning.planner.batches[1])) == 4


def test_a_step_closes_early_when_too_many_groups_had_no_signal() -> None:
    """At refill_limit times its number of groups, if one has signal."""
    learning = Learning()
    for index in range(4):
        learning.append(*group(f"g{index}", 1.0, 1.0))
        assert learning.learn(0) is None
    learning.append(*group("g4", 0.0, 1.0))
    step = learning.learn(0)
    assert groups_of(step) == ["g4"]


def test_after_the_last_step_nothing_is_trained_or_filtered() -> None:
    """The dispatcher closes what is left: nothing may have two ends."""
    learning = Learning(replace(RECIPE, learner=replace(RECIPE.learner, steps=1)))
    learning.append(*group("g0", 0.0, 1.0), *group("g1", 0.0, 1.0))
    assert learning.learn(0) is not None
    learning.finish(1)
    learning.append(*group("g2", 1.0, 1.0), *group("g3", 0.0, 1.0), *group("g4", 0.0, 1.0))
    assert learning.planner.filters(1) == []
    assert learning.planner.plan(1) is None


# -- what else the log holds -----------------------------------------------------------------------


def test_a_failed_attempt_is_not_a_reward() -> None:
    """Its replacement completes the group; the cause is counted for the step's row."""
    learning = Learning()
    cause = Cause(boundary="tool", code="gone")
    learning.append(
        *life("g0-0-0", None),
        Failed(trajectory="g0-0-0", cause=cause),
        *life("g0-1-0", 1.0),
        *life("g0-0-1", 0.0),
        *group("g1", 0.0, 1.0),
    )
    assert learning.planner.failed_by_cause == {"tool.gone": 1}
    step = learning.learn(0)
    assert step is not None
    assert step.trajectories[:2] == ["g0-0-1", "g0-1-0"]
    learning.finish(1)
    assert learning.planner.failed_by_cause == {}


@pytest.mark.parametrize("kind", [Expired, Dropped])
@pytest.mark.parametrize("complete", [True, False])
def test_a_closed_group_is_forgotten(kind: type[Expired | Dropped], complete: bool) -> None:
    """Whether it was complete or not."""
    learning = Learning()
    learning.append(*group("g0", 0.0, 1.0) if complete else life("g0-0-0", 1.0))
    learning.append(kind(trajectory="g0-0-0", reason=""))
    learning.append(*group("g1", 0.0, 1.0))
    assert learning.learn(0) is None
    learning.append(*group("g2", 0.0, 1.0))
    assert groups_of(learning.learn(0)) == ["g1", "g2"]


def test_evaluations_are_not_trained() -> None:
    """They reach no group, and their tokens are not counted as training's."""
    learning = Learning()
    admitted = Admitted(
        trajectory="e0x0-0-0",
        task="t",
        public=PublicPart(messages=[]),
        private_key="",
        purpose="eval",
        pinned_policy_version=0,
    )
    turn = Turn(trajectory="e0x0-0-0", tokens=tokens(0), text="", last=True)
    learning.append(admitted, turn, Evaluated(trajectory="e0x0-0-0", reward=1.0))
    assert learning.planner.trajectories == {}
    assert learning.planner.sampled_tokens == 0


def test_junk_changes_nothing() -> None:
    """What somebody wrote past the commit rule is skipped, and kills nobody."""
    learning = Learning()
    learning.append(
        *life("g0-0-0", 0.0),
        *life("g0-0-0", 1.0),
        Scored(trajectory="g0-0-0", reward=1.0),
        Turn(trajectory="g7-0-0", tokens=tokens(0), text=""),
        *life("g0-1-0", 1.0),
        *group("g1", 0.0, 1.0),
    )
    assert groups_of(learning.learn(0)) == ["g0", "g1"]
    assert step_rewards(learning.planner.batches[1])[0] == 0.0


def test_stragglers_are_those_that_the_next_step_makes_too_stale() -> None:
    """Live, begun, and sampled by a version that will be too old by then."""
    learning = Learning()
    learning.append(
        *life("g0-0-0", None, version=0),
        *life("g0-1-0", None, version=1),
        *life("g1-0-0", 1.0, version=0),
        Admitted(trajectory="g1-1-0", task="", public=PublicPart(messages=[]), private_key=""),
    )
    assert learning.planner.stragglers(0) == []
    assert learning.planner.stragglers(1) == ["g0-0-0"]
    assert learning.planner.stragglers(2) == ["g0-0-0", "g0-1-0"]


def test_a_straggler_is_as_old_as_its_oldest_turn() -> None:
    """A drain may end a turn before its first token, and a replica may lag behind another."""
    learning = Learning()
    learning.append(
        Admitted(trajectory="g0-0-0", task="", public=PublicPart(messages=[]), private_key=""),
        Turn(trajectory="g0-0-0", tokens=Tokens(), text="", finish_reason="partial"),
    )
    assert learning.planner.stragglers(9) == []
    for version in (5, 3):
        learning.append(
            Turn(trajectory="g0-0-0", tokens=tokens(version), text="", finish_reason="partial")
        )
    assert learning.planner.stragglers(4) == ["g0-0-0"]


# -- recovery --------------------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> list[AnyEvent]:
    """A run's log: groups grow in any order between each other, and the learner acts now and then."""
    learning = Learning()
    lives = [
        life(f"g{g}-{m}-0", draw(st.sampled_from([0.0, 0.5, 1.0])), version=draw(st.integers(0, 2)))
        for g in range(draw(st.integers(2, 8)))
        for m in range(2)
    ]
    version = 0
    while lives:
        chosen = draw(st.integers(0, len(lives) - 1))
        learning.append(lives[chosen].pop(0))
        lives = [left for left in lives if left]
        if draw(st.booleans()):
            step = learning.learn(version)
            if step is not None:
                version = step.step
                learning.finish(version)
    return learning.log


def summary(batch: Batch) -> tuple[Step, list[list[str]], list[str], list[float]]:
    members = [[member.id for member in group] for group in batch.groups]
    return batch.step, members, [member.id for member in batch.filtered], step_rewards(batch)


@given(logs(), st.data())
@settings(max_examples=60)
def test_any_prefix_of_the_log_gives_the_same_batches(
    log: list[AnyEvent], data: st.DataObject
) -> None:
    """A learner that was killed finds the steps that were begun, with the same members in the same order."""
    whole = Planner(RECIPE, 0)
    for seq, event in enumerate(log, 1):
        whole.observe(event, seq, float(seq))
    cut = data.draw(st.integers(0, len(log)))
    begun = sum(isinstance(event, Step) for event in log[:cut])
    checkpoint = data.draw(st.integers(0, begun))
    part = Planner(RECIPE, checkpoint)
    for seq, event in enumerate(log[:cut], 1):
        part.observe(event, seq, float(seq))
    assert part.step == begun
    assert set(part.batches) == set(range(checkpoint + 1, begun + 1))
    for number, batch in part.batches.items():
        assert summary(batch) == summary(whole.batches[number])
    for seq, event in enumerate(log[cut:], cut + 1):
        part.observe(event, seq, float(seq))
    assert part.filters(whole.step) == whole.filters(whole.step)
    assert part.plan(whole.step) == whole.plan(whole.step)
    assert set(part.trajectories) == set(whole.trajectories)


@given(logs())
@settings(max_examples=60)
def test_what_was_trained_is_what_the_log_says(log: list[AnyEvent]) -> None:
    """Every group once, complete, with signal, and not too old."""
    taken: list[str] = []
    rewards = {event.trajectory: event.reward for event in log if isinstance(event, Scored)}
    for event in log:
        if isinstance(event, Filtered):
            taken.append(event.group)
        elif isinstance(event, Step):
            for at in range(0, len(event.trajectories), 2):
                first, second = event.trajectories[at : at + 2]
                assert rewards[first] != rewards[second]
                assert first.partition("-")[0] == second.partition("-")[0]
            taken += groups_of(event)
    assert len(taken) == len(set(taken))


def test_what_a_recorded_step_filtered_is_read_again_from_a_checkpoint_before_it() -> None:
    """Step 2 is recorded, its learner was killed, and the next one takes the checkpoint of step 1 on its way there."""
    learning = Learning()
    learning.append(*group("g0", 0.0, 1.0), *group("g1", 1.0, 0.0))
    learning.learn(0)
    learning.finish(1)
    learning.append(*group("g2", 1.0, 1.0), *group("g3", 0.0, 1.0), *group("g4", 1.0, 0.0))
    assert groups_of(learning.learn(1)) == ["g3", "g4"]
    whole = learning.planner.batches[2]
    assert {member.group for member in whole.filtered} == {"g2"}

    del learning.planner.batches[1]  # trained again
    read_seq = learning.planner.needed_from(len(learning.log))
    resumed = Planner(RECIPE, 1, "learner", learning.planner.seq)
    for seq, event in enumerate(learning.log[read_seq:], read_seq + 1):
        resumed.observe(event, seq, float(seq))
    assert resumed.batches == {2: whole}


def test_our_own_events_are_taken_in_once() -> None:
    """When they are appended, and not again when the log shows them."""
    learning = Learning()
    learning.append(*group("g0", 0.0, 1.0), *group("g1", 0.0, 1.0))
    step = learning.learn(0)
    assert step is not None
    learning.planner.observe(step, len(learning.log), 0.0)
    assert learning.planner.step == 1
    assert learning.planner.seq == len(learning.log)


def test_who_fails_after_its_score_is_replaced() -> None:
    """A letter that a faulty replica has put aside: its group is complete with the next attempt, and not before."""
    learning = Learning()
    learning.append(*group("g0", 0.0, 1.0), Failed(trajectory="g0-0-0", cause=CAUSE))
    assert learning.learn(0) is None
    learning.append(*life("g0-0-1", 0.0), *group("g1", 0.0, 1.0))
    step = learning.learn(0)
    assert step is not None
    assert set(step.trajectories) == {"g0-0-1", "g0-1-0", "g1-0-0", "g1-1-0"}


def test_a_stale_group_is_named_after_a_checkpoint_too() -> None:
    """It was filtered after the checkpoint's step; the next one names it, or nobody does."""
    learning = Learning(checkpoint_step=1)
    learning.append(*group("g0", 0.0, 1.0, version=0))
    assert learning.learn(2) is None  # filtered as stale
    filtered = [event for event in learning.log if isinstance(event, Filtered)]
    assert [event.reason for event in filtered] == ["stale"]
    read_seq = learning.planner.needed_from(len(learning.log))
    resumed = Planner(RECIPE, 1, "learner", learning.planner.seq)
    for seq, event in enumerate(learning.log[read_seq:], read_seq + 1):
        resumed.observe(event, seq, float(seq))
    for event in (*group("g1", 0.0, 1.0, version=2), *group("g2", 0.0, 1.0, version=2)):
        learning.append(event)
        resumed.observe(event, len(learning.log), 0.0)
    step = resumed.plan(2)
    assert step is not None
    assert step.filtered == ["g0"]


# -- metrics ---------------------------------------------------------------------------------------


def folded(events: list[AnyEvent]) -> Trajectory:
    learning = Learning()
    learning.append(*events)
    (state,) = learning.planner.trajectories.values()
    return state


def test_a_step_s_metrics_by_hand() -> None:
    """Four trajectories, one group of them filtered: rewards count all, staleness the trained."""
    trained = [
        folded(life("g0-0-0", 1.0, version=3, calls=2)),
        folded(life("g0-1-0", 0.0, version=5, length=True)),
    ]
    filtered = [folded(life("g1-0-0", 1.0)), folded(life("g1-1-0", 1.0))]
    step = Step(step=7, start_version=6, trajectories=["g0-0-0", "g0-1-0"], filtered=["g1"])
    assert step_metrics(Batch(step, [trained], filtered)) == {
        "reward_mean": 0.75,
        "reward_std": pytest.approx(0.1875**0.5),
        "trajectories": 4,
        "trained_trajectories": 2,
        "tool_call_rate": 0.25,
        "truncated_fraction": 0.25,
        "zero_variance_fraction": 0.5,
        "filtered_fraction": 0.5,
        "staleness_mean": 2.0,
        "staleness_max": 3,
    }


def test_a_group_that_sampled_nothing_is_filtered() -> None:
    """Whatever its rewards are: a step of such groups alone would fail, and is in the log by then."""
    kept = Filter(zero_variance=False)
    learning = Learning(replace(RECIPE, learner=replace(RECIPE.learner, filter=kept)))
    for member, reward in enumerate((0.0, 1.0)):
        name = f"g0-{member}-0"
        admitted, *_ = life(name, None)
        full = Turn(
            trajectory=name, tokens=Tokens.given([1]), text="", finish_reason="length", last=True
        )
        learning.append(admitted, full, Scored(trajectory=name, reward=reward))
    learning.append(*group("g1", 0.0, 1.0), *group("g2", 0.0, 1.0))
    assert groups_of(learning.learn(0)) == ["g1", "g2"]
    assert {member.group for member in learning.planner.batches[1].filtered} == {"g0"}


def test_who_sampled_nothing_has_no_age() -> None:
    """Its prompt left no room."""
    name = "g0-1-0"
    prompt = Turn(trajectory=name, tokens=Tokens.given([1]), text="", finish_reason="length")
    admitted, *_ = life(name, None)
    nothing = folded([admitted, replace(prompt, last=True), Scored(trajectory=name, reward=0.0)])
    trained = [folded(life("g0-0-0", 1.0, version=3)), nothing]
    step = Step(step=7, start_version=6, trajectories=["g0-0-0", name])
    found = step_metrics(Batch(step, [trained], []))
    assert (found["staleness_mean"], found["staleness_max"]) == (3.0, 3)


def test_sampled_tokens_are_counted_from_step_to_step() -> None:
    """Of training, as the log shows them; the clock is the server's."""
    learning = Learning()
    learning.append(*life("g5-0-0", 1.0, calls=1))
    assert learning.planner.sampled_tokens == 4
    assert learning.planner.since_s == 1.0
    learning.append(*group("g0", 0.0, 1.0), *group("g1", 0.0, 1.0))
    learning.learn(0)
    learning.finish(1)
    assert learning.planner.sampled_tokens == 0
    assert learning.planner.since_s == float(len(learning.log))
