"""`actors dead` on runs that are live and at rest."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dead import dead_table, dead_text, drop, list_dead, replay_dead, show_dead
from actors.errors import UserError
from bus import subjects
from bus.codec import encode
from bus.connection import Bus
from bus.dead import dead_letters, publish_dead, read_dead
from bus.log import Log, Raw
from bus.work import open_queue, work_message
from schemas.events import Admitted, Expired, Turn
from schemas.messages import DeadLetter
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

TURN = Turn(trajectory="g0-0-0", tokens=Tokens.given([1]), text="", feedback="go on")


AtHome = Callable[[], AbstractAsyncContextManager[tuple[Bus, Log]]]


async def put_aside(bus: Bus, log: Log, error: str = "boom\nmore") -> tuple[Trajectory, int]:
    """A trajectory that waits for a generator, and the dead letter of its wake-up."""
    public = PublicPart(messages=[])
    event = Admitted(trajectory="g0-0-0", task="t", public=public, private_key="")
    state = Trajectory(admitted=event, seq=await log.append(event, 0))
    letter = DeadLetter(
        stage="gen",
        run=log.run,
        error=error,
        payload=work_message(state, failures=2),
        trajectory=state.id,
        seq=state.seq,
        boundary="engine",
        code="crashed",
        replica="generator-host-1",
    )
    await publish_dead(bus, letter)
    (dead,) = await dead_letters(bus, log.run)
    return state, dead.raw.seq


async def test_list_and_show_a_live_run(
    at_home: AtHome, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for each, with the first line of its error; all of one, its payload decoded."""
    async with at_home() as (bus, log):
        await list_dead(None, "")
        assert "run test has no dead letters" in capsys.readouterr().out
        _, seq = await put_aside(bus, log)
        await list_dead(None, "")
        head, line = capsys.readouterr().out.splitlines()
        assert head.split() == ["SEQ", "STAGE", "TRAJECTORY", "CAUSE", "WHEN", "REPLICA", "ERROR"]
        assert line.split()[:4] == [str(seq), "gen", "g0-0-0", "engine.crashed"]
        assert line.endswith("generator-host-1  boom")
        await show_dead(seq, "test", "")
        shown = capsys.readouterr().out
        assert '"trajectory": "g0-0-0"' in shown
        assert "\n   more\n" in shown
        with pytest.raises(UserError, match="no dead letter 77"):
            await show_dead(77, "test", "")


async def test_replay_of_what_still_waits_wakes_its_stage(
    at_home: AtHome, capsys: pytest.CaptureFixture[str]
) -> None:
    """A generator gets the message again, as new; the letter stays until it is dropped."""
    async with at_home() as (bus, log):
        state, seq = await put_aside(bus, log)
        assert await replay_dead(seq, None, "") == 0
        assert "sent again: g0-0-0 waits for gen" in capsys.readouterr().out
        async with open_queue(bus, "gen", log.run, slots=1) as queue:
            delivery = await queue.take()
            work = delivery.work()
            assert (work.trajectory, work.seq, work.failures) == (state.id, state.seq, 0)
            await delivery.done()
        assert len(await dead_letters(bus, log.run)) == 1


async def test_replay_of_what_has_moved_or_ended_does_nothing_and_says_so(
    at_home: AtHome, capsys: pytest.CaptureFixture[str]
) -> None:
    async with at_home() as (bus, log):
        state, seq = await put_aside(bus, log)
        moved = await log.append(TURN, state.seq)
        assert await replay_dead(seq, None, "") == 1
        assert "nothing done: g0-0-0 has moved on, to gen" in capsys.readouterr().out
        await log.append(Expired(trajectory=state.id, reason="too stale"), moved)
        assert await replay_dead(seq, None, "") == 1
        assert "nothing done: g0-0-0 has ended: expired" in capsys.readouterr().out
        answer = await bus.request("$JS.API.STREAM.INFO.GEN", b"")
        assert b'"messages":0' in answer.data


async def test_replay_of_junk_does_nothing_and_says_so(
    at_home: AtHome, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of a letter whose payload is no work message, nor of what is no letter."""
    async with at_home() as (bus, log):
        junk = await bus.store(subjects.dead("gen", log.run), b"\x00")
        letter = DeadLetter(stage="gen", run=log.run, error="", payload=b"\x93")
        bad = await bus.store(subjects.dead("gen", log.run), encode(letter))
        assert await replay_dead(junk, None, "") == 1
        assert await replay_dead(bad, None, "") == 1
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("nothing done: it is junk: ")
        assert second.startswith("nothing done: what was put aside is no work message: ")
        await list_dead(None, "")
        assert f"{junk}    -" in capsys.readouterr().out


async def test_drop_one_or_all(at_home: AtHome, capsys: pytest.CaptureFixture[str]) -> None:
    async with at_home() as (bus, log):
        _, seq = await put_aside(bus, log)
        for _ in range(3):
            await bus.store(subjects.dead("gen", log.run), b"junk")
        other = DeadLetter(stage="gen", run="other", error="", payload=b"")
        await publish_dead(bus, other)
        await drop(seq, None, "")
        with pytest.raises(UserError):
            await drop(seq, None, "")
        await drop(None, None, "")
        assert capsys.readouterr().out.splitlines() == ["1 dropped", "3 dropped"]
        assert len(await dead_letters(bus, "other")) == 1


async def test_a_run_at_rest_is_reached_too(
    at_home: AtHome, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its server is started on its store for as long."""
    async with at_home() as (bus, log):
        _, seq = await put_aside(bus, log)
    await list_dead("test", "")
    assert "engine.crashed" in capsys.readouterr().out
    assert await replay_dead(seq, "test", "") == 0
    await drop(None, "test", "")
    assert capsys.readouterr().out.endswith("1 dropped\n")


@given(st.binary(max_size=200) | st.from_type(DeadLetter).map(encode))
def test_nothing_in_a_letter_steers_the_terminal(data: bytes) -> None:
    """Whatever a policy or a stranger wrote: printable lines, and no crash."""
    dead = read_dead(Raw(7, 1.8e9, "dead.gen.test", data))
    for line in (dead_table([dead]) + "\n" + dead_text(dead)).split("\n"):
        assert line.isprintable()


_PLAIN = st.binary() | st.text() | st.integers(-(2**63), 2**64 - 1) | st.none() | st.floats()


@given(st.recursive(_PLAIN, lambda x: st.lists(x) | st.dictionaries(_PLAIN, x), max_leaves=4))
def test_any_payload_is_shown(payload: object) -> None:
    """Also maps whose keys JSON does not have."""
    letter = DeadLetter(stage="gen", run="test", error="\x1b[31m", payload=encode(payload))
    shown = dead_text(read_dead(Raw(7, 1.8e9, "dead.gen.test", encode(letter))))
    assert all(line.isprintable() for line in shown.split("\n"))
