"""The log against a real server: the commit rule, reading, following, junk."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from bus import log as bus_log
from bus import subjects
from bus.codec import encode
from bus.connection import Bus, Message
from bus.embedded import EmbeddedServer
from bus.errors import BadMessage, Conflict, Unavailable
from bus.log import Log, Raw, Stored, open_log
from bus.work import open_queue
from schemas.events import Admitted, Event, Expired, Result, Scored, Step, Stepped, Turn
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens


def admitted(trajectory: str = "g0-0-0") -> Admitted:
    public = PublicPart(messages=[ChatMessage(role="user", content="What is 2 * 3?")])
    return Admitted(trajectory=trajectory, task="t", public=public, private_key="g0")


def turn(text: str = "6", trajectory: str = "g0-0-0") -> Turn:
    tokens = Tokens.given([1, 2]) + Tokens.sampled([3], [-0.5], [0])
    return Turn(trajectory=trajectory, tokens=tokens, text=text, last=True)


async def test_an_append_needs_the_last_sequence(log: Log) -> None:
    """The first of two events that expect the same sequence wins; the other is a conflict."""
    first = await log.append(admitted(), 0)
    second = await log.append(turn("a"), first)
    with pytest.raises(Conflict):
        await log.append(turn("b"), first)
    with pytest.raises(Conflict):
        await log.append(
            Admitted(trajectory="g0-0-0", task="u", public=PublicPart(messages=[]), private_key=""),
            0,
        )
    state = await log.trajectory("g0-0-0")
    assert state is not None
    assert (state.seq, state.turn_text) == (second, "a")


async def test_an_append_that_was_stored_unnoticed_is_ours(log: Log) -> None:
    """Sending the very same event again finds it stored, and is no conflict."""
    first = await log.append(admitted(), 0)
    stored = await log.append(turn(), first)
    assert await log.append(turn(), first) == stored


async def test_of_many_racing_appends_one_wins(log: Log) -> None:
    """Thirty replicas that take the same hop at once leave one event."""
    first = await log.append(admitted(), 0)
    outcomes = await asyncio.gather(
        *(log.append(turn(f"replica {i}"), first) for i in range(30)), return_exceptions=True
    )
    assert sum(isinstance(outcome, int) for outcome in outcomes) == 1
    state = await log.trajectory("g0-0-0")
    assert state is not None
    assert len(state.turns) == 1


async def test_trajectories_do_not_block_each_other(log: Log) -> None:
    """The expected sequence is the trajectory's own, whatever else is appended."""
    seqs = [await log.append(admitted(f"g0-{member}-0"), 0) for member in range(5)]
    for member in reversed(range(5)):
        await log.append(turn(trajectory=f"g0-{member}-0"), seqs[member])


async def test_a_follower_sees_all_in_order_and_what_comes(bus: Bus, log: Log) -> None:
    """More than one batch of the past, then the present, with no gap and no repeat."""
    for member in range(700):
        await log.append(admitted(f"g0-{member}-0"), 0)
    seen: list[Stored] = []
    async with open_log(bus, log.run) as reader:
        appended = False
        async for found in reader.follow():
            seen += found
            if not found and not appended:
                appended = True
                for member in range(700, 710):
                    await log.append(admitted(f"g0-{member}-0"), 0)
            if len(seen) == 710:
                break
    assert [stored.seq for stored in seen] == sorted({stored.seq for stored in seen})
    assert seen[0].time_s > 1.7e9


async def test_a_follower_goes_on_after_the_server_was_killed(
    server: EmbeddedServer, bus: Bus, log: Log
) -> None:
    """SIGKILL and a restart on the same store lose no event and repeat none."""
    await log.append(admitted("g0-0-0"), 0)
    seen = []
    async with open_log(bus, log.run) as reader:
        async for found in reader.follow():
            seen += [stored.seq for stored in found]
            if len(seen) == 1 and not found:
                server.kill()
                server.start()
                await log.append(admitted("g0-1-0"), 0)
            if len(seen) == 2:
                break
    assert len(set(seen)) == 2


@pytest.mark.parametrize(
    ("subject", "data"),
    [
        (subjects.trajectory("test", "g0-0-0", "turn"), b"no msgpack"),
        (subjects.trajectory("test", "g0-0-0", "scored"), encode(turn())),
        (subjects.trajectory("test", "g0-1-0", "turn"), encode(turn())),
        (subjects.learner("test", "main", "turn"), encode(turn())),
        (subjects.trajectory("test", "g0-0-0", "turn"), b"\x91" * 100_000),
    ],
    ids=["bytes", "other kind", "other trajectory", "other place", "nested"],
)
async def test_junk_is_skipped_and_counted(bus: Bus, log: Log, subject: str, data: bytes) -> None:
    """An event counts only if stored subject, kind and schema agree; junk stops nobody."""
    await log.append(admitted(), 0)
    await bus.store(subject, data)
    kinds = [stored.event.kind async for stored in log.read()]
    assert kinds == ["admitted"]
    assert log.junk == 1


async def test_junk_is_no_end_of_the_log(bus: Bus, log: Log) -> None:
    """An empty list says that all was read: none comes before the events that lie behind a batch of junk."""
    junk = 2 * bus_log._BATCH
    subject = "log.test.t.g0-0-0.turn"
    ids = ({"Nats-Msg-Id": f"junk-{number}"} for number in range(junk))
    await asyncio.gather(*(bus.store(subject, b"junk", each) for each in ids))
    await log.append(admitted("g0-1-0"), 0)
    found = [found async for found in first(log.follow(), 2)]
    assert [[stored.seq for stored in each] for each in found] == [[junk + 1], []]


async def first(lists: AsyncIterator[list[Stored]], count: int) -> AsyncIterator[list[Stored]]:
    for _ in range(count):
        yield await anext(lists)


async def test_junk_does_not_block_a_trajectory(bus: Bus, log: Log) -> None:
    """Whoever reads the trajectory again appends after the junk."""
    first = await log.append(admitted(), 0)
    await bus.store(subjects.trajectory("test", "g0-0-0", "turn"), b"junk")
    with pytest.raises(Conflict):
        await log.append(turn(), first)
    state = await log.trajectory("g0-0-0")
    assert state is not None
    await log.append(turn(), state.seq)


async def test_an_event_after_the_end_is_junk(bus: Bus, log: Log) -> None:
    """Whoever writes past the commit rule changes no trajectory."""
    seq = await log.append(admitted(), 0)
    await log.append(Expired(trajectory="g0-0-0", reason="test"), seq)
    await bus.store(
        subjects.trajectory("test", "g0-0-0", "scored"),
        encode(Scored(trajectory="g0-0-0", reward=1.0)),
    )
    state = await log.trajectory("g0-0-0")
    assert state is not None
    assert state.scored is None


async def test_a_replaced_learner_is_fenced(log: Log) -> None:
    """A learner that wakes up after another has gone on cannot append."""
    begun = Step(step=1, start_version=0, trajectories=["g0-0-0"])
    seq = await log.append_learner("main", begun, 0)
    await log.append_learner(
        "main", Stepped(step=1, policy_version=1, weights_sha256="", metrics={}), seq
    )
    with pytest.raises(Conflict):
        await log.append_learner(
            "main", Stepped(step=1, policy_version=1, weights_sha256="x", metrics={}), seq
        )


async def test_an_append_without_a_server_says_so(server: EmbeddedServer, bus: Bus) -> None:
    """No silent wait: past the deadline it is Unavailable, naming the subject."""
    server.stop()
    with pytest.raises(Unavailable, match=r"log\.test\.r\.paused"):
        await bus.store("log.test.r.paused", b"", deadline_s=0.5)


async def test_our_own_first_try_is_found_by_who_is_behind(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader has it, and who answers has not yet: that nothing is there cannot be what a Conflict means."""
    seq = await log.append(admitted(), 0)
    batch = log._reader.batch
    looks = 0

    async def behind(subject: str, after: int) -> tuple[list[Raw], bool]:
        nonlocal looks
        looks += 1
        return await batch(subject, after) if looks > 2 else ([], False)

    monkeypatch.setattr(log._reader, "batch", behind)
    assert await log.append(admitted(), 0) == seq


async def test_a_reader_waits_for_what_is_known_to_be_stored(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who answers for a cluster may be behind: an old state is never taken for the newest, and no wait is endless."""
    monkeypatch.setattr(bus_log, "_BEHIND_S", 60.0)
    seq = await log.append(admitted(), 0)
    assert await log.trajectory("g0-0-0", seq) == await log.trajectory("g0-0-0")
    reading = asyncio.create_task(log.trajectory("g0-0-0", seq + 1))
    assert not (await asyncio.wait({reading}, timeout=0.3))[0]
    assert await log.append(turn(), seq) == seq + 1
    state = await asyncio.wait_for(reading, 30.0)
    assert state is not None
    assert state.seq == seq + 1
    monkeypatch.setattr(bus_log, "_BEHIND_S", 0.2)
    with pytest.raises(Unavailable, match=f"ends before sequence {seq + 2}"):
        await log.trajectory("g0-0-0", seq + 2)


# -- what anyone may write who may write anything --------------------------------------------------


def packet(subject: bytes, data: bytes, head: bytes = b"") -> bytes:
    """A message as it goes over the wire, with whatever bytes."""
    if not head:
        return b"PUB %s %d\r\n%s\r\n" % (subject, len(data), data)
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (subject, len(head), len(head) + len(data), head, data)


async def send(bus: Bus, data: bytes) -> None:
    """Let the server take it, whatever the client's library would say."""
    await bus.client._send_command(data)
    await bus.client.flush()


HOSTILE = {
    "a status": packet(b"log.test.t.x.result", b"x", b"NATS/1.0\r\nStatus: 404\r\n\r\n"),
    "no server": packet(b"log.test.t.x.result", b"x", b"NATS/1.0\r\nStatus: 503\r\n\r\n"),
    "the end": packet(b"log.test.t.x.result", b"", b"NATS/1.0 204 EOB\r\n\r\n"),
    "a status line": packet(b"log.test.t.x.result", b"x", b"NATS/1.0 404 none\r\n\r\n"),
    "no text for a status": packet(b"log.test.t.x.result", b"x", b"NATS/1.0 \xff\xfe\xff\r\n\r\n"),
    "no text for its words": packet(b"log.test.t.x.result", b"x", b"NATS/1.0 404 \xff\r\n\r\n"),
    "no text for a header": packet(b"log.test.t.x.result", b"x", b"NATS/1.0\r\n\xff: \xff\r\n\r\n"),
    "no text for a subject": packet(b"log.test.t.\xff\xfe.result", b"x"),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
async def test_no_message_hides_what_comes_after_it(bus: Bus, log: Log, message: bytes) -> None:
    """Whatever its headers and its subject say: junk, to who reads, who follows and who is told at once."""
    told = asyncio.Event()

    async def on_message(found: Message) -> None:
        if found.subject.endswith("admitted"):
            told.set()

    await bus.subscribe("log.test.>", on_message)
    await send(bus, message * 600)  # more than are read at once
    seq = await log.append(admitted(), 0)
    assert [stored.seq async for stored in log.read()] == [seq]
    assert log.junk == 600
    async with asyncio.timeout(20):
        await told.wait()
        async for found in log.follow():
            if found:
                assert [stored.seq for stored in found] == [seq]
                break
    assert bus.client.stats["reconnects"] == 0


async def test_no_message_stands_in_the_way_of_work(bus: Bus) -> None:
    """One that looks like a status is a delivery like any other, and its content is junk."""
    await send(bus, packet(b"gen.test", b"x", b"NATS/1.0\r\nStatus: 409\r\n\r\n"))
    async with open_queue(bus, "gen", "test", slots=1) as queue, asyncio.timeout(20):
        delivery = await queue.take()
        with pytest.raises(BadMessage):
            delivery.work()
        await delivery.done()


async def test_who_sees_a_reply_subject_does_not_know_the_next(bus: Bus) -> None:
    """Readers of the log see those of who appends; the server sends what it answers wherever one says."""
    inboxes = [bus.client.new_inbox() for _ in range(100)]
    steps = {int(after[-16:], 16) - int(before[-16:], 16) for before, after in pairwise(inboxes)}
    assert len(steps) == 99


async def test_only_a_confirmation_confirms(bus: Bus) -> None:
    """What the server was made to send to where one is awaited is none, even if it reads like one."""

    async def answer(found: Message) -> None:
        if found.reply:
            stored = {"Nats-Stream": "LOG", "Nats-Sequence": "7"}
            await bus.client.publish(found.reply, b'{"stream": "LOG", "seq": 7}', headers=stored)

    await bus.subscribe("early", answer)  # of no stream: nobody else answers
    with pytest.raises(Unavailable, match="no confirmation"):
        await bus.store("early", b"", deadline_s=0.0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x", Admitted(trajectory="x", task="t", public=PublicPart(messages=[]), private_key="")),
        ("g0-0-0", Scored(trajectory="g0-0-0", reward=float("nan"))),
        ("g0-0-0", Scored(trajectory="g0-0-0", reward=float("inf"))),
        ("g0-0-0", Result(trajectory="g0-0-0", turn=0, call=2**31, text="")),
        ("g0-0-0", Result(trajectory="g0-0-0", turn=-1, call=0, text="")),
    ],
)
async def test_what_no_reader_could_take_is_junk(
    bus: Bus, log: Log, name: str, data: Event
) -> None:
    """Of a faulty replica, or a worker in another language: it would end other processes at every start."""
    await bus.store(f"log.test.t.{name}.{data.kind}", encode(data))
    assert [stored async for stored in log.read()] == []
    assert log.junk == 1
