"""Who holds a trajectory's session, between replicas with connections of their own to a real server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from bus.codec import decode, encode
from bus.connection import Bus, connect
from bus.embedded import EmbeddedServer
from bus.holders import Held, Holders, Key
from bus.provision import provision
from schemas.events import Result
from schemas.messages import Answer, Ask

KEY = Key("g0-0-0", "python_session")


def says(text: str) -> Answer:
    return Answer(result=Result(trajectory=KEY.trajectory, turn=0, call=0, text=text))


class Replica:
    """Answers what it is told to."""

    def __init__(self, bus: Bus, name: str) -> None:
        self.bus = bus
        self.name = name
        self.asked: list[Ask] = []
        self.holders = Holders(bus, "test", name)
        self.holders.answer = self.answer
        self.does: Callable[[], Awaitable[Answer]] = self.at_once

    async def answer(self, key: Key, ask: Ask) -> Answer:
        assert key == KEY
        self.asked.append(ask)
        return await self.does()

    async def at_once(self) -> Answer:
        return says(self.name)

    async def take(self) -> bool:
        return await self.holders.take(KEY, (await self.holders.find(KEY)).revision)

    async def ask(self, other: "Replica", *, run: bool = True) -> Answer | None:
        return await self.holders.ask(KEY, other.name, b"work", run=run)

    def die(self) -> None:
        """As SIGKILL does it: the connection is gone, and nothing was said."""
        self.bus.client._transport._io_writer.transport.abort()
        self.bus.client._status = self.bus.client.CLOSED  # it must not come back


@pytest.fixture
async def replicas(server: EmbeddedServer, bus: Bus) -> AsyncIterator[list[Replica]]:
    await provision(bus, "test", ["python"])
    async with AsyncExitStack() as stack:
        made = []
        for name in ("toolbox-a-1", "toolbox-a-2", "toolbox-a-3"):
            own = await stack.enter_async_context(connect(server.endpoint, name))
            made.append(Replica(own, name))
            stack.push_async_callback(made[-1].holders.close)
        yield made


async def test_one_of_several_takes_it(replicas: list[Replica]) -> None:
    """All found the same; the others learn that they were late, and who was not."""
    found = [await replica.holders.find(KEY) for replica in replicas]
    assert found == [Held()] * 3
    took = await asyncio.gather(
        *(
            replica.holders.take(KEY, each.revision)
            for replica, each in zip(replicas, found, strict=True)
        )
    )
    assert sorted(took) == [False, False, True]
    winner = replicas[took.index(True)]
    held = await replicas[0].holders.find(KEY)
    assert held.replica == winner.name
    loser = replicas[took.index(False)]
    assert await loser.ask(winner) == says(winner.name)


async def test_the_holder_is_asked_once_however_long_it_takes(replicas: list[Replica]) -> None:
    """It says meanwhile that it is at work; who asks waits longer than for one that hangs."""
    holder, other, _ = replicas
    go_on = asyncio.Event()

    async def slowly() -> Answer:
        await go_on.wait()
        return says("at last")

    holder.does = slowly
    assert await holder.take()
    asking = asyncio.ensure_future(other.ask(holder))
    done, _ = await asyncio.wait({asking}, timeout=1.0)
    assert not done
    go_on.set()
    assert await asking == says("at last")
    assert len(holder.asked) == 1


async def test_a_dead_holder_is_known_at_once(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has run: the server says that nobody listens. Then it is taken over, and found by others."""
    monkeypatch.setattr("bus.holders._SILENCES_S", (0.5, 1000.0))  # it is not taken for hung
    holder, second, third = replicas
    assert await holder.take()
    holder.die()
    assert await second.ask(holder) in (Answer(), None)  # None: asked before the server knew
    assert await second.take()
    assert (await third.holders.find(KEY)).replica == second.name
    assert await third.ask(second) == says(second.name)


async def test_a_holder_that_dies_at_work_leaves_it_open(replicas: list[Replica]) -> None:
    """Nobody knows what came of it."""
    holder, other, _ = replicas
    begun = asyncio.Event()

    async def never() -> Answer:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    holder.does = never
    assert await holder.take()
    asking = asyncio.ensure_future(other.ask(holder))
    await begun.wait()
    holder.die()
    assert await asking is None


async def test_a_holder_that_hangs_is_given_up(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has done nobody knows; when it wakes up it is not who is meant any more."""
    monkeypatch.setattr("bus.holders._SILENCES_S", (0.1, 0.1))
    holder, second, third = replicas

    async def hangs(*_: object) -> None:
        await asyncio.Event().wait()

    assert await holder.take()
    monkeypatch.setattr(holder.holders, "_on_ask", hangs)
    assert await second.ask(holder) is None
    assert await second.take()
    monkeypatch.undo()
    monkeypatch.setattr("bus.holders._SILENCES_S", (60.0,))
    assert await third.ask(second) == says(second.name)
    assert holder.asked == []


async def test_what_was_let_go_is_nobody_s(replicas: list[Replica]) -> None:
    """Whoever needs it next need not ask; a key taken over meanwhile is not cleared."""
    first, second, _ = replicas
    assert await first.take()
    await first.holders.let_go(KEY)
    assert (await second.holders.find(KEY)).replica == ""
    assert await second.ask(first) == Answer()
    assert await second.take() or await second.take(), "its mark may end just then"
    assert await first.take()
    await second.holders.let_go(KEY)
    assert (await second.holders.find(KEY)).replica == first.name


async def test_an_answer_that_was_lost_can_be_had_again(replicas: list[Replica]) -> None:
    """By the ask's id, without running anything twice."""
    holder, other, _ = replicas
    assert await holder.take()
    ask = Ask(id="1", holder=holder.name, work=b"work")

    for _ in range(2):
        message = await other.bus.request("sess.test.g0-0-0.python_session", encode(ask))
        assert decode(message.data, Answer) == says(holder.name)
        ask = Ask(id="1", holder=holder.name)
    assert len(holder.asked) == 1


async def test_who_only_asks_what_came_of_it_is_patient(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of the server a holder is back a moment later than who asks."""
    monkeypatch.setattr("bus.holders._LOST_S", 60.0)
    holder, other, _ = replicas
    asking = asyncio.ensure_future(other.ask(holder, run=False))
    await asyncio.wait({asking}, timeout=0.5)
    await holder.holders.listen(KEY)
    assert await asking == says(holder.name)
    assert [ask.run for ask in holder.asked] == [False]
