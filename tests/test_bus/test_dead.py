"""Dead letters and full stores against a real server."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from bus import embedded, subjects
from bus.codec import encode
from bus.connection import Bus, connect
from bus.dead import dead_letters, drop_dead, follow_dead, publish_dead
from bus.embedded import EmbeddedServer
from bus.errors import Full
from bus.lease import Lease
from bus.log import Log, open_log
from bus.provision import provision
from bus.room import shortage
from bus.server_config import Server, config_text
from bus.store import delete_object, get_object, objects, purge, put_object
from schemas.events import Admitted, Turn
from schemas.messages import DeadLetter
from schemas.task import PublicPart
from schemas.tokens import Tokens

LETTER = DeadLetter(stage="gen", run="test", error="why", payload=b"p", trajectory="g0-0-0", seq=3)


async def test_letters_are_listed_in_order_and_dropped_one_by_one(bus: Bus) -> None:
    """Those of other runs are not among them."""
    await publish_dead(bus, LETTER)
    await publish_dead(bus, DeadLetter(stage="gen", run="other", error="", payload=b""))
    await publish_dead(bus, DeadLetter(stage="tool", run="test", error="too", payload=b""))
    found = await dead_letters(bus, "test")
    assert [dead.letter.error for dead in found if dead.letter] == ["why", "too"]
    assert await drop_dead(bus, found[0].raw.seq)
    assert not await drop_dead(bus, found[0].raw.seq)
    assert len(await dead_letters(bus, "test")) == 1


async def test_junk_among_them_is_listed_and_stops_no_follower(bus: Bus) -> None:
    """A message there that is no letter: the dispatcher goes on, an operator sees it."""
    await bus.store(subjects.dead("gen", "test"), b"\x93junk")
    await publish_dead(bus, LETTER)
    junk, letter = await dead_letters(bus, "test")
    assert junk.letter is None
    assert junk.junk
    assert letter.letter == LETTER
    following = follow_dead(bus, "test")
    assert await asyncio.wait_for(anext(following), 5.0) == [LETTER]


async def test_what_no_letter_holds_is_cut(bus: Bus) -> None:
    """A message as large as any, and an error that quotes another: put aside all the same, lest they come for ever."""
    large = bytes(bus.client.max_payload)
    await publish_dead(bus, replace(LETTER, payload=large, error="x" * len(large)))
    (dead,) = await dead_letters(bus, "test")
    assert dead.letter == replace(LETTER, payload=large[:4096], error="x" * 4096)


# -- the end of the room ---------------------------------------------------------------------------


def admitted(member: int = 0) -> Admitted:
    public = PublicPart(messages=[], extra={"padding": "x" * 50_000})
    return Admitted(trajectory=f"g0-{member}-0", task="t", public=public, private_key="")


async def fill(bus: Bus) -> None:
    """Admit until nothing more goes in."""
    with suppress(Full):
        for member in itertools.count():
            event = admitted(member)
            subject = subjects.trajectory("test", event.trajectory, "admitted")
            await bus.store(subject, encode(event), deadline_s=0.0)


async def test_a_log_near_its_limit_says_so_with_the_figure(bus: Bus, log: Log) -> None:
    """At nine tenths, before anything is refused; a higher limit, given later, ends it."""
    assert await shortage(bus) == ""
    await provision(bus, "test", [], log_limit_bytes=1_000_000)
    member = 0
    while not (text := await shortage(bus)):
        await log.append(admitted(member), 0)
        member += 1
    assert text.startswith("the log holds 9")
    assert text.endswith(" of 1 MB")
    await provision(bus, "test", [])
    assert await shortage(bus), "a limit that is not given stays as it is"
    await provision(bus, "test", [], log_limit_bytes=2_000_000)
    assert await shortage(bus) == ""


async def test_an_append_to_a_full_log_waits_for_room_and_is_stored_once(
    bus: Bus, log: Log
) -> None:
    """Who would lose its work waits, as long as it takes; who can decide anew is told."""
    seq = await log.append(admitted(1000), 0)
    await provision(bus, "test", [], log_limit_bytes=1_000_000)
    await fill(bus)
    tokens = Tokens.given(range(5000))
    turn = Turn(trajectory="g0-1000-0", tokens=tokens, text="")
    with pytest.raises(Full, match="maximum bytes exceeded"):
        await bus.store(
            subjects.trajectory("test", "g0-0-0", "turn"), bytes(65_000), deadline_s=0.1
        )
    bus.waits_when_full = True
    waiting = asyncio.create_task(log.append(turn, seq))
    assert not (await asyncio.wait({waiting}, timeout=1.0))[0]
    await provision(bus, "test", [], log_limit_bytes=2_000_000)
    await asyncio.wait_for(waiting, 10.0)
    state = await log.trajectory("g0-1000-0")
    assert state is not None
    assert state.turns == [turn]


@pytest.fixture
async def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bus]:
    """A server whose whole store is small."""

    def small_store(server: Server) -> str:
        """As of a server that was not told its limit, and so cannot tell it."""
        text = config_text(server._replace(limit_bytes=0))
        return text.replace("sync_interval", "max_file_store: 4MB, sync_interval")

    monkeypatch.setattr(embedded, "config_text", small_store)
    server = EmbeddedServer(tmp_path / "small", unrestricted=True)
    server.start()
    async with connect(server.endpoint, "test") as connected:
        await provision(connected, "test", ["python"])
        yield connected
    server.stop()


async def test_a_full_server_is_known_by_its_refusals(
    small: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is told to nobody; nothing is lost meanwhile, and all goes on when something was deleted."""
    monkeypatch.setattr("bus.lease._TTL_S", 60)  # it cannot be renewed meanwhile
    lease = Lease(small, "test", "dispatcher", "one")
    await lease.acquire()
    async with open_log(small, "test") as log:
        seq = await log.append(admitted(1000), 0)
        assert await shortage(small) == ""
        await fill(small)
        assert (await shortage(small)).startswith("the server's store is full; it holds 4")
        keeping = asyncio.create_task(lease.keep())
        small.waits_when_full = True
        weights = bytes(600_000)
        waiting = asyncio.gather(
            log.append(Turn(trajectory="g0-1000-0", tokens=Tokens.given(range(9)), text=""), seq),
            put_object(small, "weights", "test", weights),
        )
        assert not (await asyncio.wait({waiting, keeping}, timeout=2.0))[0]
        for member in range(20):
            await purge(small, "LOG", subjects.trajectory("test", f"g0-{member}-0"))
        _, name = await asyncio.wait_for(waiting, 15.0)
        assert await get_object(small, "weights", "test", name) == weights
        assert not keeping.done()
        keeping.cancel()


async def test_a_server_that_is_told_its_limit_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At nine tenths admission stops; the rest takes what is in flight, and what clears old weights."""
    monkeypatch.setattr(embedded, "_limit_bytes", lambda _: 4_000_000)
    server = EmbeddedServer(tmp_path / "told", unrestricted=True)
    server.start()
    async with connect(server.endpoint, "test") as bus, open_log(bus, "test") as log:
        await provision(bus, "test", ["python"])
        await put_object(bus, "weights", "test", bytes(600_000))
        (weights,) = await objects(bus, "weights")
        member = 0
        while not (text := await shortage(bus)):
            await log.append(admitted(member), 0)
            member += 1
        assert re.fullmatch(r"the server's store holds 3\.6\d? MB of 4 MB", text)
        await delete_object(bus, "weights", weights)
        async with asyncio.timeout(10.0):
            while await shortage(bus):  # noqa: ASYNC110 - the server tells nobody when it has room
                await asyncio.sleep(0.1)
        await fill(bus)
        assert await shortage(bus), "refused by the account's limit"
    server.stop()


async def test_a_limit_that_does_not_fit_the_server_is_said_at_once(small: Bus) -> None:
    with pytest.raises(Full, match="cannot set 1000000000 bytes aside"):
        await provision(small, "test", [], log_limit_bytes=1_000_000_000)
