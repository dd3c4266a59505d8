"""The archive: every row is what the log folds to, whatever is killed, and docs/archive.md says what it means.

    python tests/test_actors/test_recorder.py

writes the tables of docs/archive.md anew from the schemas.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from actors import recorder, run_folder
from actors.archive_files import TRAJECTORIES, TURNS, Archive, _lists, table
from actors.process import join
from actors.recorder import Cut, Lives, closings, rows
from actors.recording import Recording, record
from bus import private, subjects
from bus.codec import encode
from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.lease import Lease
from bus.log import Log, Stored, fold_stored, open_log
from bus.provision import provision
from schemas.events import (
    Admitted,
    AnyEvent,
    Call,
    Cause,
    Dropped,
    Ended,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Opened,
    Result,
    Scored,
    Started,
    Step,
    TrajectoryEvent,
    Turn,
)
from schemas.recipe import Policy, Recipe
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import TrajectoryId

DOCS = Path(__file__).parents[2] / "docs" / "archive.md"
RUN = "test"


# -- lives -----------------------------------------------------------------------------------------


def admitted(name: str, **more: Any) -> Admitted:
    public = PublicPart(messages=[ChatMessage(role="user", content=f"the task of {name}")])
    return Admitted(
        trajectory=name,
        replica="dispatcher-1",
        task="47x86",
        public=public,
        private_key=name.partition("-")[0],
        **more,
    )


def turn(name: str, draw: random.Random, **more: Any) -> Turn:
    given_ids = [draw.randrange(50_000) for _ in range(draw.randrange(6))]
    count = draw.randrange(9)
    sampled = Tokens.sampled(
        [draw.randrange(50_000) for _ in range(count)],
        [-draw.random() for _ in range(count)],
        [draw.randrange(3, 6) for _ in range(count)],
    )
    replica = f"generator-{draw.randrange(3)}"
    tokens = Tokens.given(given_ids) + sampled
    return Turn(trajectory=name, replica=replica, tokens=tokens, text=f"said by {name}", **more)


def life(name: str, draw: random.Random, *, calls: int | None = None) -> list[AnyEvent]:
    """From the admission to the last turn, which has no fate yet."""
    events: list[AnyEvent] = [admitted(name, seed=draw.randrange(2**63))]
    number = 0
    for _ in range(draw.randrange(3) if calls is None else calls):
        if draw.random() < 0.3:
            events.append(turn(name, draw, finish_reason="partial"))
            number += 1
        wanted = [Call(tool="python", arguments={"code": "6*7"})] * draw.randrange(3)
        events.append(turn(name, draw, calls=wanted))
        for call in range(len(wanted)):
            if draw.random() < 0.2:
                events.append(Started(trajectory=name, replica="toolbox-1", turn=number, call=call))
            ok = draw.random() < 0.7
            events.append(
                Result(
                    trajectory=name,
                    replica="toolbox-1",
                    turn=number,
                    call=call,
                    text="42",
                    ok=ok,
                    duration_ms=draw.random() * 9,
                    tier="ns",
                )
            )
        number += 1
    events.append(turn(name, draw, finish_reason="length", last=True))
    return events


def scored(name: str, draw: random.Random) -> Scored:
    parts = {"right": draw.random(), "brief": 0.5}
    return Scored(trajectory=name, replica="scorer-1", reward=draw.random(), parts=parts)


def group(number: int, draw: random.Random, size: int = 2) -> list[list[AnyEvent]]:
    """The lives of a group, each with its fate where that is its own; what the learner does comes last."""
    names = [f"g{number}-{member}-0" for member in range(size)]
    lives = [life(name, draw) for name in names]
    fate = draw.randrange(6)
    cause = Cause(boundary="tool", code="gone", detail="no socket")
    ends: list[AnyEvent] = []
    for name, events in zip(names, lives, strict=True):
        if fate == 0:
            events.append(Failed(trajectory=name, replica="dispatcher-1", cause=cause))
        elif fate == 1:
            del events[draw.randrange(1, len(events) + 1) :]
            events.append(Expired(trajectory=name, replica="dispatcher-1", reason="too stale"))
        elif fate == 2:
            events.append(scored(name, draw))
            events.append(Dropped(trajectory=name, replica="dispatcher-1", reason="its group"))
        elif fate == 3:
            events.append(Evaluated(trajectory=name, replica="scorer-1", reward=draw.random()))
        else:
            events.append(scored(name, draw))
    if fate == 4:
        ends = [Filtered(group=f"g{number}", reason="zero_variance", trajectories=names)]
    elif fate == 5:
        ends = [Step(step=number + 1, start_version=number, trajectories=names)]
    return [*lives, ends]


def history(draw: random.Random, groups: int, *, junk: bool = True) -> list[AnyEvent]:
    """What a run's log may hold, with the lives of three groups at a time running through one another."""
    said: list[AnyEvent] = [Opened(recipe=Recipe(policy=Policy(model="m")))]
    for first in range(0, groups, 3):
        some = [group(number, draw) for number in range(first, min(first + 3, groups))]
        lives = [events for each in some for events in each[:-1]]
        while any(lives):
            said.append(draw.choice([events for events in lives if events]).pop(0))
            if junk and draw.random() < 0.1:
                said.append(draw.choice(JUNK))
        said += [event for each in some for event in each[-1]]
    return said


# what a role can append past the commit rule; but for `admitted`, which is the dispatcher's
JUNK: list[AnyEvent] = [
    turn("g0-0-0", random.Random(1)),
    turn("g7000-0-0", random.Random(2)),
    Evaluated(trajectory="g0-0-0", reward=1.0),
    Dropped(trajectory="g7000-0-0", reason="never admitted"),
    Failed(trajectory="no id", cause=Cause(boundary="tool", code="gone")),
    Step(step=1, start_version=0, trajectories=["g7000-0-0", "*", "no id"]),
]


def subject_of(event: AnyEvent, run: str = RUN) -> str:
    if isinstance(event, TrajectoryEvent):
        # an id that is none cannot be a token of a subject either
        return subjects.trajectory(run, event.trajectory.replace(" ", "_"), event.kind)
    if isinstance(event, Step | Filtered):
        return subjects.learner(run, "main", event.kind)
    return subjects.run_event(run, event.kind)


async def append(bus: Bus, events: Iterable[AnyEvent], run: str = RUN) -> None:
    """Past the commit rule, as the log is read here and not made; in order, some at a time."""
    messages = [(subject_of(event, run), encode(event)) for event in events]
    for at in range(0, len(messages), 64):
        # one connection keeps the order of what is published on it
        some = messages[at : at + 64]
        await asyncio.gather(*(bus.store(*each, {"Nats-Msg-Id": uuid4().hex}) for each in some))


def stopped() -> asyncio.Event:
    """Told to stop: it records what is stored, and returns."""
    event = asyncio.Event()
    event.set()
    return event


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def written_at(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110 # files and other processes have no events to wait for
            await asyncio.sleep(0.02)


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of a table, as any Parquet reader would have them."""
    tables = [parquet.read_table(path) for path in sorted(folder.glob(f"{kind}-*.parquet"))]
    return pa.concat_tables(tables).to_pylist(maps_as_pydicts="strict") if tables else []


# -- one trajectory --------------------------------------------------------------------------------


def stored(events: Iterable[AnyEvent], first_s: float = 1_700_000_000.25) -> list[Stored]:
    """A second apart, and as many sequences."""
    return [
        Stored(seq, first_s + seq, subject_of(event), event) for seq, event in enumerate(events, 1)
    ]


def rows_of(events: Iterable[AnyEvent]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The one trajectory of a log."""
    log = stored(events)
    ((closing, told),) = [(each, event) for event in log for each in closings(event)]
    own = [event for event in log if isinstance(event.event, TrajectoryEvent)]
    found = rows([event for event in own if event.seq <= told.seq], closing)
    assert found is not None
    (trajectory,) = table([found.trajectory], TRAJECTORIES).to_pylist(maps_as_pydicts="strict")
    return trajectory, table(found.turns, TURNS).to_pylist()


def test_a_trained_trajectory_is_a_row() -> None:
    """Worked by hand: who, what for, what became of it, and where its time went."""
    name = "g4-1-0"
    prompt = Tokens.given([1, 2, 3]) + Tokens.sampled([4, 5], [-0.5, -0.25], [7, 8])
    again = Tokens.given([6]) + Tokens.sampled([7], [-0.125], [9])
    call = Call(tool="python", arguments={"code": "47*86"})
    done = Result(
        trajectory=name, turn=0, call=0, text="4042", duration_ms=250, tier="ns", replica="t"
    )
    trajectory, turns = rows_of(
        [
            admitted(name, min_policy_version=7, temperature=0.5, seed=2**62),
            Turn(trajectory=name, tokens=prompt, text="<python>", calls=[call], replica="a"),
            Started(trajectory=name, turn=0, call=0, replica="t"),
            done,
            Turn(trajectory=name, tokens=again, text="4042", last=True, replica="a"),
            Scored(trajectory=name, reward=0.75, parts={"right": 1.0, "brief": 0.5}, replica="s"),
            Step(step=9, start_version=8, trajectories=[name]),
        ]
    )
    times = {
        key: trajectory.pop(key).timestamp() for key in ("admitted_at", "scored_at", "closed_at")
    }
    assert times == {
        "admitted_at": 1_700_000_001.25,
        "scored_at": 1_700_000_006.25,
        "closed_at": 1_700_000_007.25,
    }
    assert trajectory == {
        "trajectory": name,
        "group": "g4",
        "member": 1,
        "attempt": 0,
        "task": "47x86",
        "purpose": "train",
        "fate": "trained",
        "step": 9,
        "reason": None,
        "reward": 0.75,
        "reward_parts": {"brief": 0.5, "right": 1.0},
        "messages": [{"role": "user", "content": "the task of g4-1-0"}],
        "turns": 2,
        "tool_calls": 1,
        "tool_errors": 0,
        "finish_reason": "stop",
        "tokens_given": 4,
        "tokens_sampled": 3,
        "version_min": 7,
        "version_max": 9,
        "min_policy_version": 7,
        "pinned_policy_version": None,
        "temperature": 0.5,
        "seed": 2**62,
        "generating_s": 2.0,
        "tools_s": 2.0,
        "scoring_s": 1.0,
        "closing_s": 1.0,
        "tool_run_s": 0.25,
        "replicas": ["dispatcher-1", "a", "t", "s"],
        "admitted_seq": 1,
        "closed_seq": 7,
    }
    assert turns[0]["ids"] == [1, 2, 3, 4, 5]
    assert turns[0]["mask"] == [0, 0, 0, 1, 1]
    assert turns[0]["logprobs"] == [0, 0, 0, -0.5, -0.25]
    assert turns[0]["versions"] == [-1, -1, -1, 7, 8]
    assert turns[0]["calls"] == [{"tool": "python", "version": "", "arguments": '{"code":"47*86"}'}]
    assert turns[0]["results"][0].pop("at").timestamp() == 1_700_000_004.25
    assert turns[0]["results"] == [
        {"call": 0, "text": "4042", "ok": True, "duration_ms": 250.0, "tier": "ns", "replica": "t"}
    ]
    assert [row["turn"] for row in turns] == [0, 1]
    assert (turns[1]["last"], turns[1]["calls"], turns[1]["results"]) == (True, [], [])


def test_arguments_that_json_has_no_word_for_are_a_text() -> None:
    """A message may hold them, of a worker in another language; the recorder goes on."""
    odd = [{"a": msgspec.msgpack.Ext(5, b"x")}, {"a": {(1, 2): 3}}]
    name = "g4-1-0"
    tokens = Tokens.given([1]) + Tokens.sampled([2], [-0.5], [0])
    calls = [Call(tool="python", arguments=each) for each in odd]
    _, turns = rows_of(
        [
            admitted(name),
            Turn(trajectory=name, tokens=tokens, text="", calls=calls),
            Expired(trajectory=name, reason="test"),
        ]
    )
    assert [json.loads(call["arguments"]) for call in turns[0]["calls"]] == [repr(x) for x in odd]


def test_a_failed_trajectory_has_a_cause_and_no_reward() -> None:
    """And not the detail of the cause: a scorer's exception may quote the answer."""
    cause = Cause(boundary="scorer", code="crashed", detail="KeyError('the answer is 4042')")
    trajectory, turns = rows_of([admitted("g0-0-0"), Failed(trajectory="g0-0-0", cause=cause)])
    assert (trajectory["fate"], trajectory["reason"]) == ("failed", "scorer.crashed")
    assert trajectory["reward"] is None
    assert trajectory["version_min"] is trajectory["finish_reason"] is None
    assert turns == []
    assert "4042" not in json.dumps(trajectory, default=str)


def test_a_dropped_trajectory_keeps_the_score_it_had() -> None:
    name = "g0-0-0"
    draw = random.Random(3)
    end = Dropped(trajectory=name, reason="its group")
    trajectory, _ = rows_of([*life(name, draw), scored(name, draw), end])
    assert (trajectory["fate"], trajectory["reason"]) == ("dropped", "its group")
    assert trajectory["reward"] is not None


def test_what_another_learner_trains_is_no_fate() -> None:
    """As `actors verify` counts."""
    event = Step(step=1, start_version=0, trajectories=["g0-0-0"])
    assert closings(Stored(1, 0.0, subjects.learner(RUN, "other", "step"), event)) == []


@given(st.lists(st.binary(max_size=12).map(lambda data: data * 4), max_size=5))
def test_token_arrays_are_copied_bit_by_bit(parts: list[bytes]) -> None:
    """NaNs with their payloads, and negative zeros, too."""
    column = _lists(parts, TURNS.field("logprobs").type)
    column.validate(full=True)
    assert [bytes(memoryview(part.values.to_numpy())) for part in column] == parts


# -- cuts ------------------------------------------------------------------------------------------


def test_a_file_ends_with_so_many_trajectories_or_so_much_time_or_the_run() -> None:
    """By what the log says alone, its clock included."""
    name = "g0-0-0"
    step = Step(step=1, start_version=0, trajectories=[name] * recorder.TRAJECTORIES_PER_FILE)
    fate, other = Evaluated(trajectory=name, reward=1.0), turn(name, random.Random(1))

    def cuts(*events: tuple[AnyEvent, float]) -> list[bool]:
        cut = Cut()
        log = [Stored(1, time_s, subject_of(event), event) for event, time_s in events]
        return [cut.after(each, len(closings(each))) for each in log]

    assert cuts((other, 0), (step, 0)) == [False, True]
    assert cuts((other, 0), (other, 100)) == [False, False]
    assert cuts((fate, 100), (other, 159), (other, 160)) == [False, False, True]
    assert cuts((Ended(reason=""), 0)) == [True]


# -- the archive is the log ------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut and a row group every few trajectories."""
    monkeypatch.setattr("actors.recorder.TRAJECTORIES_PER_FILE", 5)
    monkeypatch.setattr("actors.archive_files._ROW_GROUP_TOKENS", 40)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly every trajectory is read from the log when it is closed."""
    monkeypatch.setattr("actors.recorder.BYTES_KEPT", 20_000)


def fates_of(log: Iterable[Stored]) -> dict[tuple[str, int], str]:
    """(trajectory, sequence) → fate, said in another way than the recorder does."""
    own: dict[str, list[Stored]] = {}
    found: dict[tuple[str, int], str] = {}
    ended: set[str] = set()
    for each in log:
        event = each.event
        if isinstance(event, TrajectoryEvent):
            known = own.setdefault(event.trajectory, [])
            if isinstance(event, Admitted) == (not known):
                known.append(each)
            terminal = isinstance(event, Evaluated | Expired | Failed | Dropped)
            if terminal and known and event.trajectory not in ended:
                ended.add(event.trajectory)
                found[event.trajectory, each.seq] = event.kind
        elif isinstance(event, Step | Filtered):
            kind = "trained" if isinstance(event, Step) else "filtered"
            found |= {(name, each.seq): kind for name in event.trajectories if own.get(name)}
    return found


async def check_against_the_log(folder: Path, log: Log) -> None:
    """Every fate of the log has its row, every row its fate; tokens are the log's own to the bit."""
    everything = [each async for each in log.read()]
    trajectories, turns = read(folder, "trajectories"), read(folder, "turns")
    found = {(row["trajectory"], row["closed_seq"]): row for row in trajectories}
    assert len(found) == len(trajectories)
    fates = fates_of(everything)
    assert {key: row["fate"] for key, row in found.items()} == fates
    turns_of: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in turns:
        turns_of.setdefault((row["trajectory"], row["closed_seq"]), []).append(row)
    for (name, seq), row in found.items():
        state = None
        for each in everything:
            own_event = isinstance(each.event, TrajectoryEvent) and each.event.trajectory == name
            if own_event and each.seq <= seq:
                state = fold_stored(state, each)
        assert state is not None
        assert row["reward"] == state.reward
        assert row["seed"] == state.admitted.seed
        assert (row["group"], row["member"], row["attempt"]) == TrajectoryId.parse(name)
        assert row["turns"] == state.turn_count
        assert row["tokens_sampled"] == state.tokens.sampled_count
        assert row["tokens_given"] + row["tokens_sampled"] == len(state.tokens)
        assert row["version_min"] == state.tokens.oldest_version
        assert row["tool_calls"] == sum(len(each.calls) for each in state.turns)
        assert row["tool_errors"] == sum(not each.ok for each in state.results)
        whole = row["closed_at"] - row["admitted_at"]
        stages = ("generating_s", "tools_s", "scoring_s", "closing_s")
        assert sum(row[stage] for stage in stages) == pytest.approx(whole.total_seconds())
        own = turns_of.get((name, seq), [])
        assert [each["turn"] for each in own] == list(range(len(state.turns)))
        for written, said in zip(own, state.turns, strict=True):
            again = Tokens(
                ids=packed(written["ids"], pa.int32()),
                mask=packed(written["mask"], pa.uint8()),
                logprobs=packed(written["logprobs"], pa.float32()),
                versions=packed(written["versions"], pa.int32()),
            )
            assert again == said.tokens
            assert (written["text"], written["finish_reason"]) == (said.text, said.finish_reason)
            results = [(each["call"], each["text"], each["ok"]) for each in written["results"]]
            expected = state.results_of(written["turn"])
            assert results == [(each.call, each.text, each.ok) for each in expected]


def packed(values: list[Any], kind: pa.DataType) -> bytes:
    return bytes(memoryview(pa.array(values, kind).to_numpy()))


async def test_the_archive_is_the_log(
    bus: Bus, log: Log, tmp_path: Path, small_files: None
) -> None:
    """Junk included; the last file ends with the run, and what is not closed has no row."""
    await append(bus, [*history(random.Random(5), 12), *life("g99-0-0", random.Random(6))])
    await append(bus, [Ended(reason="all steps done")])
    await record(log, Archive(tmp_path), "one", asyncio.Event())
    await check_against_the_log(tmp_path, log)
    assert len(files(tmp_path)) >= 6
    assert Archive(tmp_path).done() == await log.last_seq()
    assert "g99-0-0" not in {row["trajectory"] for row in read(tmp_path, "turns")}


async def test_what_there_was_no_room_for_is_read_from_the_log(
    bus: Bus, log: Log, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The files are the same."""
    await append(bus, [*history(random.Random(5), 12), Ended(reason="")])
    await record(log, Archive(tmp_path / "room"), "one", asyncio.Event())
    request.getfixturevalue("little_room")
    await record(log, Archive(tmp_path / "none"), "one", asyncio.Event())
    assert files(tmp_path / "room") == files(tmp_path / "none")


def test_no_more_is_kept_than_there_is_room_for(little_room: None) -> None:
    """The oldest goes first, and goes whole."""
    lives = Lives()
    for event in stored(life("g0-0-0", random.Random(1), calls=2)):
        lives.observe(event)
    for event in stored(life("g1-0-0", random.Random(1), calls=2)):
        lives.observe(event)
    assert lives.take("g0-0-0") is None
    kept = lives.take("g1-0-0")
    assert kept is not None
    assert isinstance(kept[0].event, Admitted)
    assert lives._bytes == 0


async def test_rows_appear_while_the_run_goes_on(
    bus: Bus, log: Log, tmp_path: Path, small_files: None
) -> None:
    """So many closed trajectories later at most."""
    events = history(random.Random(5), 9, junk=False)
    stopping = asyncio.Event()
    live = asyncio.create_task(record(log, Archive(tmp_path), "one", stopping))
    await append(bus, events)
    await until(lambda: len(read(tmp_path, "trajectories")) > 18 - 5)
    stopping.set()
    await live


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """For the many runs of a property."""
    server = EmbeddedServer(tmp_path_factory.mktemp("nats"), unrestricted=True)
    server.start()
    yield server
    server.stop()


CUTS = st.lists(st.tuples(st.integers(0, 120), st.sampled_from(["", "half", "rest"])), max_size=5)


@settings(
    max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking takes minutes
@given(seed=st.integers(0, 1000), cuts=CUTS)
def test_a_recorder_stopped_anywhere_leaves_the_same_files(
    shared_server: EmbeddedServer,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    cuts: list[tuple[int, str]],
) -> None:
    """Restarted after any events, and with one file of its last range missing, or half of another lying about."""
    folder = tmp_path_factory.mktemp("archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.recorder.TRAJECTORIES_PER_FILE", 5)
        patch.setattr("actors.archive_files._ROW_GROUP_TOKENS", 40)
        asyncio.run(_cut_and_compare(shared_server, folder, seed, sorted(cuts)))


async def _cut_and_compare(
    server: EmbeddedServer, folder: Path, seed: int, cuts: list[tuple[int, str]]
) -> None:
    run = folder.name
    events = [*history(random.Random(seed), 7), Ended(reason="")]
    async with connect(server.endpoint, "test") as bus, open_log(bus, run) as log:
        await provision(bus, run, [])
        archive = Archive(folder / "cut")
        done = 0
        for number, (at, damage) in enumerate(cuts):
            await append(bus, events[done:at], run)
            done = max(done, at)
            await record(log, archive, f"replica-{number}", stopped())
            written = sorted(archive.folder.glob("turns-*.parquet"))
            if damage == "half" and written:
                written[-1].unlink()
            elif damage == "rest":
                (archive.folder / "turns-killed.unfinished").write_bytes(b"PAR1 and no more")
        await append(bus, events[done:], run)
        await record(log, archive, "last", asyncio.Event())
        whole = Archive(folder / "whole")
        await record(log, whole, "other", asyncio.Event())
        assert files(archive.folder) == files(whole.folder)
        assert not list(archive.folder.glob("*.unfinished"))
        await check_against_the_log(whole.folder, log)


async def test_an_archive_that_is_whole_is_left_alone(bus: Bus, log: Log, tmp_path: Path) -> None:
    """A recorder started once more on a run that has ended, ends."""
    await append(bus, [*history(random.Random(1), 2), Ended(reason="")])
    await record(log, Archive(tmp_path), "one", asyncio.Event())
    before = written_at(tmp_path)
    async with asyncio.timeout(30):
        await record(log, Archive(tmp_path), "two", asyncio.Event())
    assert written_at(tmp_path) == before


async def test_private_answers_are_not_in_it(bus: Bus, log: Log, tmp_path: Path) -> None:
    """They lie beside the log, and its key is all that events carry; not even that is written."""
    await private.put_private(bus, RUN, "g0", {"answer": "MYSECRET"})
    await append(bus, [*history(random.Random(1), 3, junk=False), Ended(reason="")])
    await record(log, Archive(tmp_path), "one", asyncio.Event())
    everything = [read(tmp_path, "trajectories"), read(tmp_path, "turns")]
    assert everything[0]
    text = json.dumps(everything, default=str)
    assert "MYSECRET" not in text
    assert "private" not in text


async def test_a_run_of_another_name_has_no_rows(bus: Bus, log: Log, tmp_path: Path) -> None:
    """Runs may share a server, and its stream."""
    await append(bus, [*history(random.Random(1), 2), Ended(reason="")], "other")
    await append(bus, [*life("g5-0-0", random.Random(2)), scored("g5-0-0", random.Random(2))])
    await append(bus, [Step(step=1, start_version=0, trajectories=["g5-0-0"]), Ended(reason="")])
    await record(log, Archive(tmp_path), "one", asyncio.Event())
    assert [row["trajectory"] for row in read(tmp_path, "trajectories")] == ["g5-0-0"]


# -- the process -----------------------------------------------------------------------------------


async def test_of_two_recorders_one_writes(
    bus: Bus, server: EmbeddedServer, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other stands by, and takes over when the first is gone."""
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    monkeypatch.setattr("bus.lease._TTL_S", 60)  # nobody renews it here
    await append(bus, history(random.Random(1), 2))
    holder = Lease(bus, RUN, "recorder", "somebody")
    await holder.acquire()
    stopping = asyncio.Event()
    async with join(server.endpoint, RUN, "recorder", stopping) as process:
        serving = asyncio.create_task(Recording(process).serve())
        await asyncio.sleep(1.5)  # long enough to see that it does not begin
        assert process.vitals.phase == "standby"
        assert not (tmp_path / RUN).exists()
        await holder.release()
        await append(bus, [Ended(reason="")])
        async with asyncio.timeout(60):
            await serving
    await check_against_the_log(tmp_path / RUN / "archive", log)


async def test_a_folder_that_cannot_be_written_does_not_end_it(
    bus: Bus, server: EmbeddedServer, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so in its phase, and goes on when it can."""
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    monkeypatch.setattr("actors.recording._AGAIN_S", 0.2)
    await append(bus, [*history(random.Random(1), 2), Ended(reason="")])
    (tmp_path / RUN).mkdir()
    (tmp_path / RUN / "archive").touch()  # a file in its place
    async with join(server.endpoint, RUN, "recorder", asyncio.Event()) as process:
        serving = asyncio.create_task(Recording(process).serve())
        await until(lambda: "archive not written" in process.vitals.phase)
        (tmp_path / RUN / "archive").unlink()
        async with asyncio.timeout(60):
            await serving
    await check_against_the_log(tmp_path / RUN / "archive", log)


@pytest.mark.slow
async def test_killed_again_and_again_it_writes_each_row_once(
    bus: Bus, server: EmbeddedServer, log: Log, tmp_path: Path
) -> None:
    """SIGKILL at any moment, nats-server's too: the files are those of a recorder that nobody disturbed."""
    draw = random.Random(7)
    events = history(draw, 1500, junk=False)
    runs = tmp_path / "runs"
    archive = Archive(runs / RUN / "archive")
    await append(bus, events[:1])
    feeding = asyncio.create_task(append(bus, events[1:]))
    for number in range(5):
        for left in archive.folder.glob("*.unfinished"):
            left.unlink()
        process = start(server, runs)
        before = archive.done()

        def works(before: int = before) -> bool:
            return archive.done() > before or any(archive.folder.glob("*.unfinished"))

        try:
            await until(works)
            await asyncio.sleep(draw.random() * 0.6)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if number == 2:
            server.kill()
            server.start()
    await feeding
    await append(bus, [Ended(reason="")])
    process = start(server, runs)
    try:
        assert await asyncio.to_thread(process.wait, 100) == 0
    finally:
        process.kill()
    whole = Archive(tmp_path / "whole")
    await record(log, whole, "undisturbed", asyncio.Event())
    assert files(archive.folder) == files(whole.folder)
    assert len(files(whole.folder)) >= 10
    assert archive.done() == await log.last_seq()


REPLICA = """
import os, msgspec
from actors.replica import serve
from bus.connection import Endpoint
serve("recorder", os.environ["RUN"], msgspec.json.decode(os.environ["ENDPOINT"], type=Endpoint))
"""


def start(server: EmbeddedServer, runs: Path) -> subprocess.Popen[bytes]:
    endpoint = msgspec.json.encode(server.endpoint).decode()
    runs.mkdir(exist_ok=True)
    with (runs / "recorder.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", REPLICA],
            env=os.environ | {"ENDPOINT": endpoint, "RUN": RUN, "ACTORS_RUNS": str(runs)},
            stdout=output,
            stderr=output,
        )


# -- what is said of it ----------------------------------------------------------------------------


def tables() -> str:
    """The two tables of docs/archive.md."""
    parts = []
    for name, schema in (("trajectories", TRAJECTORIES), ("turns", TURNS)):
        parts += [
            f"## {name}-*.parquet",
            "",
            "| column | type | what it is |",
            "| --- | --- | --- |",
        ]
        for field in schema:
            text = field.metadata[b"description"].decode()
            parts.append(f"| `{field.name}` | `{type_name(field.type)}` | {text} |")
        parts.append("")
    return "\n".join(parts)


def type_name(kind: pa.DataType) -> str:
    """As people say it."""
    text = (
        str(kind)
        .replace("element: ", "")
        .replace("item: ", "")
        .replace("list<struct", "list<struct")
    )
    return text.replace("timestamp[us, tz=UTC]", "timestamp (UTC)")


def test_every_column_is_documented() -> None:
    """docs/archive.md ends with the tables made from the schemas; run this file to make them anew."""
    assert DOCS.read_text().endswith(tables())


def write_tables() -> None:
    text = DOCS.read_text()
    DOCS.write_text(text[: text.index("## trajectories-*")] + tables())


if __name__ == "__main__":
    write_tables()
