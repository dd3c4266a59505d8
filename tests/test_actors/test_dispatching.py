"""The dispatcher joined to a real server: ends behind junk, a lost lease, and what it remembers."""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from actors.decisions import Admit
from actors.dispatching import Dispatching
from actors.errors import RecipeError
from actors.heartbeat import Vitals
from actors.process import Process
from bus import policy, store, subjects
from bus.connection import Bus
from bus.log import Log, Stored
from schemas.events import (
    Admitted,
    AnyTrajectoryEvent,
    Call,
    Cause,
    Expired,
    Failed,
    Result,
    Scored,
    Step,
    Turn,
)
from schemas.messages import DeadLetter, WeightsPointer
from schemas.recipe import Asynchrony, Data, Policy, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens

RECIPE = Recipe(policy=Policy(model="m"), data=Data(rows="bench.workload:rows_0ms"))
NAME = "g0-0-0"
ADMITTED = Admitted(trajectory=NAME, task="0", public=PublicPart(messages=[]), private_key="g0")
FAILED = Failed(trajectory=NAME, cause=Cause(boundary="engine", code="gone"))


def dispatching(bus: Bus, log: Log, recipe: Recipe = RECIPE) -> Dispatching:
    vitals = Vitals(run=log.run, role="dispatcher", replica="dispatcher-h-1")
    return Dispatching(Process(bus, log, recipe, "", vitals, asyncio.Event()))


def turn(*, last: bool = False) -> Turn:
    calls = [] if last else [Call(tool="python", arguments={})]
    tokens = Tokens.sampled([1], [0.0], [0])
    return Turn(trajectory=NAME, tokens=tokens, text="", calls=calls, last=last)


async def test_a_trajectory_is_ended_behind_junk(bus: Bus, log: Log) -> None:
    """Junk moves the sequence that the server expects, and changes nothing that was decided on."""
    joined = dispatching(bus, log)
    seq = await log.append(ADMITTED, 0)
    await bus.store(subjects.trajectory(log.run, NAME, "turn"), b"junk")
    assert await joined._append_end(FAILED, seq) is not None
    state = await log.trajectory(NAME)
    assert state is not None
    assert state.end == FAILED


async def test_a_trajectory_that_has_moved_is_not_ended(bus: Bus, log: Log) -> None:
    """Behind junk too: it is decided anew."""
    joined = dispatching(bus, log)
    seq = await log.append(ADMITTED, 0)
    await bus.store(subjects.trajectory(log.run, NAME, "result"), b"junk")
    state = await log.trajectory(NAME)
    assert state is not None
    await log.append(turn(), state.seq)
    assert await joined._append_end(FAILED, seq) is None
    state = await log.trajectory(NAME)
    assert state is not None
    assert state.end is None


async def test_a_letter_is_kept_until_the_log_shows_its_end(bus: Bus, log: Log) -> None:
    """An append that fails is decided anew."""
    joined = dispatching(bus, log)
    seq = await log.append(ADMITTED, 0)
    joined._observe(Stored(seq, 0.0, "", ADMITTED), 0.0)
    letter = DeadLetter(stage="gen", run=log.run, error="", payload=b"", trajectory=NAME, seq=seq)
    joined._letters[NAME] = letter
    first = await joined._decisions(0.0)
    assert await joined._decisions(0.0) == first
    await joined._carry_out(first)
    (replacement,) = await joined._decisions(0.0)
    assert isinstance(replacement, Admit)
    assert joined._letters == {}
    state = await log.trajectory(NAME)
    assert state is not None
    assert str(state.end.cause) == "bus.bad_message"  # type: ignore[union-attr]


def test_a_shadow_frees_no_slot(bus: Bus, log: Log) -> None:
    """Only what the main learner trains is trained."""
    joined = dispatching(bus, log)
    joined._observe(Stored(1, 0.0, "", ADMITTED), 0.0)
    step = Step(step=1, start_version=0, trajectories=[NAME])
    joined._observe(Stored(2, 0.0, subjects.learner(log.run, "other", "step"), step), 0.0)
    assert NAME in joined._dispatcher.live
    assert "g0" in joined._dispatcher.groups
    joined._observe(Stored(3, 0.0, subjects.learner(log.run, "main", "step"), step), 0.0)
    assert not joined._dispatcher.groups


def test_states_for_a_barrier_are_forgotten_when_nobody_is_to_be_woken(
    dispatcher_at_barriers: Dispatching,
) -> None:
    """Scored or ended: a long run keeps no more than what is in flight."""
    joined = dispatcher_at_barriers
    result = Result(trajectory=NAME, turn=0, call=0, text="")
    events: list[AnyTrajectoryEvent] = [ADMITTED, turn(), result, turn(last=True)]
    for seq, event in enumerate(events, 1):
        joined._observe(Stored(seq, 0.0, "", event), 0.0)
        assert joined._states[NAME].seq == seq
    joined._observe(Stored(5, 0.0, "", Scored(trajectory=NAME, reward=1.0)), 0.0)
    assert joined._states == {}
    other = replace(ADMITTED, trajectory="g0-1-0")
    joined._observe(Stored(6, 0.0, "", other), 0.0)
    joined._observe(Stored(7, 0.0, "", Expired(trajectory="g0-1-0", reason="")), 0.0)
    assert joined._states == {}


@pytest.fixture
async def dispatcher_at_barriers(bus: Bus, log: Log) -> Dispatching:
    return dispatching(bus, log, replace(RECIPE, asynchrony=Asynchrony(barriers=True)))


async def test_a_dispatcher_that_lost_its_lease_stands_by(bus: Bus, log: Log) -> None:
    """And acts again when it is free: whoever was suspended is the other's standby then."""
    joined = dispatching(bus, log)
    vitals = joined._process.vitals
    served = asyncio.create_task(joined.serve())
    await until(lambda: vitals.phase == "")
    key = f"{log.run}.dispatcher"
    await store.put(bus, "lease", key, b"dispatcher-other-2")
    await until(lambda: vitals.phase == "standby")
    await store.put(bus, "lease", key, b"", ttl_s=1)
    await until(lambda: vitals.phase == "")
    joined._process.stopping.set()
    await asyncio.wait_for(served, 10.0)


ROWS = """
from schemas.task import ChatMessage, PublicPart, TaskRow

LARGE = {"tests": "x" * (9 << 20)}

def row(name, public, private):
    messages = [ChatMessage(role="user", content="?")]
    return TaskRow(id=name, public=PublicPart(messages=messages, extra=public), private=private)

def public(seed):
    yield row("small", {}, {})
    yield row("vast", LARGE, {})

def private(seed):
    yield row("small", {}, {})
    yield row("vast", {}, LARGE)
"""


@pytest.mark.parametrize("part", ["public", "private"])
async def test_a_row_that_no_message_holds_ends_the_run(
    bus: Bus, log: Log, tmp_path: Path, part: str
) -> None:
    """By its name and the part that is too large; it could never be admitted, and all others would wait for it."""
    (tmp_path / "rows.py").write_text(ROWS)
    recipe = replace(RECIPE, data=Data(rows=f"rows:{part}"))
    pointer = WeightsPointer(
        policy_version=0,
        weights_sha256=hashlib.sha256(b"w").hexdigest(),
        assets_sha256=await policy.publish_assets(bus, log.run, {}),
    )
    await policy.publish_policy(bus, log.run, pointer, b"w")
    vitals = Vitals(run=log.run, role="dispatcher", replica="dispatcher-h-1")
    process = Process(bus, log, recipe, str(tmp_path), vitals, asyncio.Event())
    async with asyncio.timeout(30.0):
        with pytest.raises(ExceptionGroup) as caught:
            await Dispatching(process).serve()
    assert caught.group_contains(RecipeError, match=rf"task vast: {part}: .* 94\d+ bytes; .* 83\d+")


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not is_so():  # noqa: ASYNC110 (of what runs beside, nothing tells)
            await asyncio.sleep(0.02)
