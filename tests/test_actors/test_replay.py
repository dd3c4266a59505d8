"""Replay: a real learner's run, done again from its log; what was trained on is what its events say, to the bit."""

import shutil
from collections.abc import Callable, Iterator
from math import log as ln
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from actors.errors import UserError
from actors.replay import DIFFERENT, replay
from actors.replaying import Rebuilding, StepRange
from bus.codec import decode, encode
from bus.connection import connect
from bus.embedded import EmbeddedServer
from bus.log import Raw, open_reader, read_event
from learner.samples import Sample, batch_sha256, sample_of
from schemas.algorithm import Correction
from schemas.events import (
    Admitted,
    AnyEvent,
    AnyTrajectoryEvent,
    Opened,
    Result,
    Scored,
    Step,
    Stepped,
    Turn,
)
from schemas.recipe import Learner, Policy, Recipe, Tools
from schemas.tokens import Tokens
from schemas.trajectory import fold_all

RUN = "again"
STEPS = 3
RECIPE = Recipe(
    policy=Policy(model="recipes.arithmetic:model", max_tokens=32),
    tools=Tools(tier="unsafe"),  # the reward `exact` runs no code
    learner=Learner(
        steps=STEPS,
        groups_per_step=2,
        group_size=2,
        learning_rate=1e-3,
        checkpoint_every_steps=2,
        correction=Correction(token="none", sequence="none"),  # or none of the tokens would count
    ),
)
UNIFORM = -ln(32)
"""Near what an untrained model says of any token of a vocabulary so small."""


def groups() -> Iterator[tuple[str, list[str]]]:
    """Two groups with signal a step, and one that is filtered."""
    for number in range(2 * STEPS + 1):
        yield f"g{number}", ["7", "7"] if number == 1 else ["42", "7"]


@pytest.fixture(scope="module")
def learned(learn) -> Path:
    """The folder for runs, with a finished one in it."""
    return learn(RUN, RECIPE, dict(groups()))


async def rewrite(runs: Path, alter: Callable[[AnyEvent], AnyEvent]) -> None:
    """The same log, with every event as `alter` has it."""
    server = EmbeddedServer(runs / RUN / "nats", unrestricted=True)
    server.start()
    try:
        async with connect(server.endpoint, "test") as bus, open_reader(bus, "LOG") as reader:
            raws: list[Raw] = [raw async for raw in reader.read(f"log.{RUN}.>")]
            await bus.request("$JS.API.STREAM.PURGE.LOG", b"")
            for raw in raws:
                await bus.store(raw.subject, encode(alter(read_event(raw))))
    finally:
        server.stop()


def files(folder: Path) -> dict[str, bytes]:
    """All of a run's folder but its server's store."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "nats" not in path.relative_to(folder).parts
    }


async def test_a_run_is_equal_and_left_alone(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches, rewards, metrics and weights of every step; nothing in the run's folder is written."""
    before = files(runs / RUN)
    assert await replay(RUN, "", "") == 0
    *steps, summary = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in steps] == ["step 1", "step 2", "step 3"]
    rewards = sum(len(texts) for _, texts in groups())
    assert f"{STEPS} steps from step-000000: {STEPS} batches, {rewards} rewards" in summary
    assert files(runs / RUN) == before


async def test_some_steps_from_the_nearest_checkpoint(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--steps 3` begins at step 2's checkpoint; `:2` ends there."""
    assert await replay(RUN, "", "3") == 0
    assert "1 steps from step-000002" in capsys.readouterr().out
    assert await replay(RUN, "", ":2") == 0
    assert "2 steps from step-000000" in capsys.readouterr().out


def reward_raised(event: AnyEvent) -> AnyEvent:
    if isinstance(event, Scored) and event.trajectory == "g3-1-0":
        return replace(event, reward=0.5)
    return event


def filtered_rewards_raised(event: AnyEvent) -> AnyEvent:
    if isinstance(event, Scored) and event.trajectory.startswith("g1-"):
        return replace(event, reward=1.0)
    return event


def logprob_moved(event: AnyEvent) -> AnyEvent:
    if isinstance(event, Turn) and event.trajectory == "g0-0-0":
        moved = Tokens.sampled([4, 5, 6], [UNIFORM, UNIFORM, UNIFORM + 1e-6], [0] * 3)
        return replace(event, tokens=Tokens.given([1, 2, 3]) + moved)
    return event


def loss_moved(event: AnyEvent) -> AnyEvent:
    if isinstance(event, Stepped) and event.step == 2:
        return replace(event, metrics=event.metrics | {"loss": event.metrics["loss"] + 1e-12})
    return event


def weights_exchanged(event: AnyEvent) -> AnyEvent:
    if isinstance(event, Stepped) and event.step == 3:
        return replace(event, weights_sha256="ab" * 32)
    return event


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (reward_raised, "step 2, g3-1-0: reward: recorded 0.5, recomputed 0.0"),
        (filtered_rewards_raised, "step 1, g1-0-0: reward: recorded 1.0, recomputed 0.0"),
        (logprob_moved, "step 1: batch_sha256: recorded "),
        (loss_moved, "step 2: loss: recorded "),
        (weights_exchanged, "step 3: weights_sha256: recorded 'abab"),
    ],
)
async def test_a_difference_is_named(
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    alter: Callable[[AnyEvent], AnyEvent],
    says: str,
) -> None:
    """One altered value of the log: the step, the trajectory and both values are printed, and the steps before."""
    await rewrite(runs, alter)
    assert await replay(RUN, "", "") == DIFFERENT
    lines = capsys.readouterr().out.splitlines()
    equal = [line for line in lines if not line.startswith("DIFFERENT ")]
    assert any(line.startswith(f"DIFFERENT {says}") for line in lines), lines
    assert len(equal) == int(says[5]) - 1


async def test_a_reward_of_chance_is_taken_as_recorded(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A function that says `deterministic = False` is not asked again; the summary counts what was taken."""
    (tmp_path / "by_chance.py").write_text(
        "async def coin(task, trajectory, run):\n    raise AssertionError\n\n\n"
        "coin.deterministic = False\n"
    )

    def alter(event: AnyEvent) -> AnyEvent:
        if isinstance(event, Opened):
            scorer = replace(event.recipe.scorer, reward="by_chance:coin")
            recipe = replace(event.recipe, scorer=scorer)
            return replace(event, recipe=recipe, recipe_dir=str(tmp_path))
        return event

    await rewrite(runs, alter)
    assert await replay(RUN, "", "") == 0
    assert "14 rewards taken as recorded" in capsys.readouterr().out


async def test_without_a_checkpoint(runs: Path) -> None:
    """Says from where it could replay, or that the learner ran elsewhere."""
    shutil.rmtree(runs / RUN / "checkpoints" / "step-000000")
    with pytest.raises(UserError, match="no checkpoint before step 1: try --steps 3:"):
        await replay(RUN, "", "")
    shutil.rmtree(runs / RUN / "checkpoints")
    with pytest.raises(UserError, match="replay where its learner ran"):
        await replay(RUN, "", "")


def test_a_log_that_does_not_balance_is_refused() -> None:
    """What breaks a rule says nothing that could be recomputed."""
    rebuilding = Rebuilding(0)
    rebuilding.observe(Opened(recipe=RECIPE), 1)
    with pytest.raises(UserError, match="the rule 'broken_group'"):
        rebuilding.observe(Step(step=1, start_version=0, trajectories=["g0-0-0"]), 2)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", StepRange(1, None)),
        ("3", StepRange(3, 3)),
        ("3:", StepRange(3, None)),
        (":3", StepRange(1, 3)),
        ("3:12", StepRange(3, 12)),
        (":", StepRange(1, None)),
    ],
)
def test_steps_are_read(text: str, steps: StepRange) -> None:
    assert StepRange.parse(text) == steps


@given(st.text(max_size=8) | st.from_regex(r"[0-9]{1,3}:?[0-9]{0,3}", fullmatch=True))
def test_any_text_is_a_range_or_refused(text: str) -> None:
    """What is read has at least one step, and no text is a crash."""
    try:
        steps = StepRange.parse(text)
    except UserError:
        return
    assert steps.first >= 1
    assert steps.last is None or steps.last >= steps.first


# -- bit for bit -----------------------------------------------------------------------------------


@st.composite
def lives(draw: st.DrawFn) -> list[AnyTrajectoryEvent]:
    """Any trajectory from its admission to its score, partial turns and results between."""
    name = draw(st.from_regex(r"g[0-9]{1,3}-[0-9]-[01]", fullmatch=True))
    floats = st.floats(width=32, allow_nan=False)
    sampled = st.tuples(st.integers(0, 2**31 - 1), floats, st.integers(0, 9))
    events: list[AnyTrajectoryEvent] = [draw(st.builds(Admitted, trajectory=st.just(name)))]
    for turn in range(draw(st.integers(1, 3))):
        given_ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
        drawn = draw(st.lists(sampled, max_size=4))
        ids, logprobs, versions = zip(*drawn, strict=True) if drawn else ((), (), ())
        tokens = Tokens.given(given_ids) + Tokens.sampled(ids, logprobs, versions)
        events.append(Turn(trajectory=name, tokens=tokens, text=""))
        if draw(st.booleans()):
            events.append(Result(trajectory=name, turn=turn, call=0, text=""))
    events.append(Scored(trajectory=name, reward=draw(st.floats(allow_nan=False))))
    return events


def sample(events: list[AnyTrajectoryEvent]) -> Sample:
    state = fold_all((event, seq) for seq, event in enumerate(events, 1))
    assert state is not None
    return sample_of(state)


@given(groups=st.lists(st.lists(lives(), min_size=1, max_size=3), max_size=2))
def test_rebuilt_equals_trained(groups: list[list[list[AnyTrajectoryEvent]]]) -> None:
    """Folded as the events were made, and folded again from their bytes: the same batch, bit for bit."""

    def stored(event: AnyTrajectoryEvent) -> AnyTrajectoryEvent:
        return decode(encode(event), AnyTrajectoryEvent)  # type: ignore[no-any-return]

    trained = [[sample(events) for events in group] for group in groups]
    rebuilt = [[sample([stored(e) for e in events]) for events in group] for group in groups]
    assert batch_sha256(rebuilt) == batch_sha256(trained)


@given(events=lives(), other=lives(), place=st.integers(0, 99), data=st.data())
def test_any_change_is_another_batch(
    events: list[AnyTrajectoryEvent],
    other: list[AnyTrajectoryEvent],
    place: int,
    data: st.DataObject,
) -> None:
    """One bit of a token's facts, the reward, the name, the order or the grouping: another hash."""
    whole = sample_of_parts(events)
    at = place % len(whole["mask"])
    field = data.draw(st.sampled_from(["ids", "mask", "logprobs", "versions", "reward", "name"]))
    changed = dict(whole)
    if field == "reward":
        changed["reward"] = whole["reward"] + 1 if abs(whole["reward"]) < 1e15 else 0.0
    elif field == "name":
        changed["name"] = f"{whole['name']}1"
    else:
        array = bytearray(whole[field])
        array[at] ^= 1
        changed[field] = bytes(array)
    one, two = made(whole), made(changed)
    three = sample(other)
    assert batch_sha256([[one]]) != batch_sha256([[two]])
    assert batch_sha256([[one, two]]) != batch_sha256([[two, one]])
    assert batch_sha256([[one, three]]) != batch_sha256([[one], [three]])


def sample_of_parts(events: list[AnyTrajectoryEvent]) -> dict:
    tokens = Tokens.join([event.tokens for event in events if isinstance(event, Turn)])
    (scored,) = (event for event in events if isinstance(event, Scored))
    return {
        "ids": tokens.ids,
        "mask": tokens.mask,
        "logprobs": tokens.logprobs,
        "versions": tokens.versions,
        "reward": scored.reward,
        "name": scored.trajectory,
    }


def made(parts: dict) -> Sample:
    import numpy as np

    return Sample(
        trajectory=parts["name"],
        group="",
        ids_T=np.frombuffer(parts["ids"], "<i4"),
        mask_T=np.frombuffer(parts["mask"], np.uint8).astype(np.bool_),
        logprobs_T=np.frombuffer(parts["logprobs"], "<f4"),
        versions_T=np.frombuffer(parts["versions"], "<i4"),
        reward=parts["reward"],
    )
