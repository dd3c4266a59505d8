"""Calls between two toolbox replicas, with sandboxes and connections of their own: whoever takes the wake-up, whoever
dies and when, the policy sees what one session would have shown it, and nothing acts on the world twice."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from actors.actor import HopFailed
from actors.heartbeat import Vitals
from actors.images import Images
from actors.process import Hops, Process
from actors.routing import Routing
from actors.toolbox import Toolbox
from bus.connection import Bus, connect
from bus.dead import dead_letters
from bus.embedded import EmbeddedServer
from bus.holders import Holders, Key
from bus.log import Log
from bus.provision import provision
from bus.work import publish_work
from schemas.events import Admitted, AnyTrajectoryEvent, Call, Result, Started, Turn
from schemas.recipe import Policy, Recipe, Tools
from schemas.recipe import Toolbox as ToolboxSection
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.errors import ToolError
from tools.function import tool
from tools.registry import load_tools
from tools.sandbox.ns import NamespaceSandbox
from tools.tool import Context, Tool

RUN = "test"
SECONDS = 60.0


class World:
    """What the tools of these tests act on."""

    def __init__(self) -> None:
        self.effects: list[str] = []
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    def tools(self) -> dict[str, Tool]:
        @tool(effects="external")
        async def send(_: Context, text: str) -> str:
            """Act on the world."""
            self.effects.append(text)
            self.begun.set()
            await self.go_on.wait()
            if text == "break":
                raise ToolError("broke", "the world is closed")
            return f"sent {text}, {len(self.effects)} in all"

        @tool(session="unreplayable")
        async def count(context: Context) -> str:
            """Count the calls of this trajectory."""
            assert context.keep is not None
            counter = context.keep("counter", Counter)
            counter.n += 1
            return str(counter.n)

        use = ["bash", "python_session", "python"]
        return load_tools(use) | {"send": send, "count": count}


class Counter:
    """What only one replica has."""

    def __init__(self) -> None:
        self.n = 0

    async def close(self) -> None: ...


async def nothing(*_: object) -> list[object]:
    return []


class Replica:
    """A toolbox with a connection of its own."""

    def __init__(self, recipe: Recipe, bus: Bus, toolbox: Toolbox, log: Log, name: str) -> None:
        self.name = name
        self.toolbox = toolbox
        self._bus = bus
        self.routing = Routing(recipe, toolbox, Holders(bus, RUN, name), log.trajectory, name)

    async def die(self) -> None:
        """As SIGKILL does it: connection and sandbox are gone, and nothing was said."""
        client = self._bus.client
        client._transport._io_writer.transport.abort()
        client._status = client.CLOSED
        await self.toolbox.close()


Start = Callable[..., Any]


@pytest.fixture
async def start(server: EmbeddedServer, bus: Bus, log: Log) -> AsyncIterator[Start]:
    """`await start("1", world)` starts a replica."""
    async with AsyncExitStack() as stack:

        async def begin(name: str, world: World | None = None, sessions: int = 8) -> Replica:
            recipe = Recipe(
                policy=Policy(model="m"),
                tools=Tools(tier="ns", timeout_s=SECONDS),
                toolbox=ToolboxSection(sessions=sessions),
            )
            own = await stack.enter_async_context(connect(server.endpoint, name))
            images = Images(nothing, nothing)  # type: ignore[arg-type]
            tools = (world or World()).tools()
            toolbox = Toolbox(recipe, tools, NamespaceSandbox(), images, name)
            replica = Replica(recipe, own, toolbox, log, name)
            stack.push_async_callback(replica.routing.close)
            return replica

        yield begin


@asynccontextmanager
async def serving(bus: Bus, log: Log, replica: Replica) -> AsyncIterator[None]:
    """The replica at the queue of `send`, as actors/process.py has it there."""
    vitals = Vitals(run=RUN, role="toolbox", replica=replica.name)
    recipe = Recipe(policy=Policy(model="m"))
    process = Process(bus, log, recipe, "", vitals, asyncio.Event())
    served = asyncio.create_task(Hops(process, replica.routing).serve(["send"], 4))
    try:
        yield
    finally:
        process.stopping.set()
        await served


async def about_to_send(log: Log, *, begun_by: str = "") -> Trajectory:
    """A trajectory in the log whose last turn sends a letter."""
    name = "g0-0-0"
    events: list[AnyTrajectoryEvent] = [
        Admitted(trajectory=name, task="t", public=PublicPart(messages=[]), private_key=""),
        Turn(
            trajectory=name,
            tokens=Tokens(),
            text="",
            calls=[Call(tool="send", arguments={"text": "a letter"})],
        ),
    ]
    if begun_by:
        events.append(Started(trajectory=name, replica=begun_by, turn=0, call=0))
    state: Trajectory | None = None
    for event in events:
        state = fold(state, event, await log.append(event, state.seq if state else 0))
    assert state is not None
    return state


class Episode:
    """One trajectory, as a generator and actors/process.py make it, without the queues."""

    def __init__(self, trajectory: str = "g0-0-0") -> None:
        public = PublicPart(messages=[])
        first = Admitted(trajectory=trajectory, task="t", public=public, private_key="")
        self.state: Trajectory = fold(None, first, 1)

    def fold(self, event: AnyTrajectoryEvent) -> None:
        self.state = fold(self.state, event, self.state.seq + 1)

    def ask(self, name: str, text: str = "") -> None:
        """The policy's next turn."""
        argument = {"bash": "command", "send": "text"}.get(name, "code")
        call = Call(tool=name, arguments={argument: text} if name != "count" else {})
        self.fold(Turn(trajectory=self.state.id, tokens=Tokens(), text="", calls=[call]))

    async def run(self, replica: Replica) -> Result:
        """A replica's hop, without its commit."""
        event = await replica.routing.handle(self.state)
        if isinstance(event, Started):
            self.fold(event)
            event = await replica.routing.handle(self.state)
        assert isinstance(event, Result)
        return event

    async def call(self, replica: Replica, name: str, text: str = "") -> Result:
        """Turn, hop and commit."""
        self.ask(name, text)
        result = await self.run(replica)
        self.fold(result)
        return result


async def says(episode: Episode, replica: Replica, code: str) -> str:
    return (await episode.call(replica, "python_session", code)).text.strip()


# -- sessions --------------------------------------------------------------------------------------


async def test_whoever_is_asked_the_holder_runs_it(start: Start) -> None:
    """No session is made anew, and each trajectory has its own."""
    replicas = [await start("1"), await start("2")]
    episodes = [Episode(f"g0-{member}-0") for member in range(4)]
    for turn in range(6):
        for number, episode in enumerate(episodes):
            code = f"x = [{number}]" if turn == 0 else "x.append(len(x)); x"
            result = await episode.call(replicas[(turn + number) % 2], "python_session", code)
            assert result.replica == str(number % 2 + 1)
    assert all(
        episode.state.results[-1].text == f"{[n, 1, 2, 3, 4, 5]}\n"
        for n, episode in enumerate(episodes)
    )
    assert [replica.toolbox.made_anew for replica in replicas] == [0, 0]


POINTS = ["before", "during", "answered", "committed"]


@pytest.mark.parametrize("point", POINTS)
async def test_a_holder_killed_at_any_point(start: Start, point: str) -> None:
    """Between two calls, in one, when it has answered, and when that is committed: what the policy sees is the same."""
    holder, other, episode = await start("1"), await start("2"), Episode()
    assert await says(episode, holder, "x = [1]; x") == "[1]"
    if point == "before":
        await holder.die()
    episode.ask("python_session", "import time; x.append(2); time.sleep(0.5); x")
    if point == "during":
        running = asyncio.ensure_future(episode.run(other))
        await asyncio.wait({running}, timeout=0.25)
        assert not running.done()
        await holder.die()
        result = await running
    else:
        result = await episode.run(other)
    if point == "answered":  # and who had asked died too, before it could append the answer
        await holder.die()
        result = await episode.run(other)
    episode.fold(result)
    if point == "committed":
        await holder.die()
    assert result.text == "[1, 2]\n"
    assert await says(episode, other, "x.append(3); x") == "[1, 2, 3]"
    assert other.toolbox.made_anew == 1


async def test_a_hop_that_two_replicas_take_runs_once(start: Start) -> None:
    """Its wake-up was delivered twice: both have the same result, of which one is committed."""
    replicas, episode = [await start("1"), await start("2")], Episode()
    await says(episode, replicas[0], "x = []")
    episode.ask("python_session", "import time; time.sleep(0.3); x.append(1); x")
    first, second, third = await asyncio.gather(*(episode.run(replicas[n]) for n in (0, 1, 1)))
    assert first == second == third
    episode.fold(first)
    assert await says(episode, replicas[1], "x") == "[1]"
    assert [replica.toolbox.made_anew for replica in replicas] == [0, 0]


async def test_two_that_begin_at_once_agree(start: Start) -> None:
    """The first call of a trajectory, delivered twice: one takes the session, the other asks it."""
    replicas, episode = [await start("1"), await start("2")], Episode()
    episode.ask("python_session", "import os; os.urandom(8).hex()")
    first, second = await asyncio.gather(*(episode.run(replica) for replica in replicas))
    assert first == second


async def test_what_was_not_committed_is_not_run_again(start: Start) -> None:
    """It is in the session: asked for again, at the same place of the log, it is what the policy sees."""
    replicas, episode = [await start("1"), await start("2")], Episode()
    await says(episode, replicas[0], "x = []")
    episode.ask("python_session", "x.append(1); x")
    lost = await episode.run(replicas[1])
    again = await episode.run(replicas[0])
    assert lost == again
    assert again.text == "[1]\n"


async def test_a_session_that_others_went_on_without_is_old(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replica hung, was given up, and wakes up: it asks its successor, and its own copy is closed."""
    monkeypatch.setattr("bus.holders._SILENCES_S", (0.1, 0.1))
    hung, successor, episode = await start("1"), await start("2"), Episode()
    await says(episode, hung, "x = [1]")

    async def hangs(*_: object) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as sleep:
        sleep.setattr(hung.routing._holders, "_on_ask", hangs)
        assert await says(episode, successor, "x.append(2); x") == "[1, 2]"
    monkeypatch.setattr("bus.holders._SILENCES_S", (60.0,))
    result = await episode.call(hung, "python_session", "x.append(3); x")
    assert (result.text, result.replica) == ("[1, 2, 3]\n", "2")
    assert hung.toolbox.sessions._kept == {}
    assert successor.toolbox.made_anew == 1


async def test_an_evicted_session_is_given_up(start: Start) -> None:
    """Whoever has its next call takes it, without asking."""
    small, other = await start("1", sessions=1), await start("2")
    episodes = [Episode(f"g0-{member}-0") for member in range(2)]
    for episode in episodes:
        await says(episode, small, "x = 1")
    assert (await small.routing._holders.find(Key("g0-0-0", "python_session"))).replica == ""
    assert (await small.routing._holders.find(Key("g0-1-0", "python_session"))).replica == "1"
    assert await says(episodes[0], other, "x") == "1"
    assert (await episodes[0].call(small, "python_session", "x")).replica == "2"


async def test_an_ended_trajectory_is_nobody_s(start: Start) -> None:
    """Nothing listens for it, and nothing is kept."""
    replica, episode = await start("1"), Episode()
    await says(episode, replica, "x = 1")
    await episode.call(replica, "bash", "x=1")
    await episode.call(replica, "send", "once")
    await replica.routing.forget(episode.state.id)
    holders = replica.routing._holders
    assert (holders._listening, holders._revisions) == ({}, {})
    assert (replica.routing._acts, replica.routing._may_act) == ({}, set())
    assert (await holders.find(Key("g0-0-0", "bash"))).replica == ""


async def test_a_replica_that_is_told_to_stop_ends_what_others_asked(start: Start) -> None:
    """And then takes nothing more: the session is made anew where it is needed."""
    holder, other, episode = await start("1"), await start("2"), Episode()
    await says(episode, holder, "x = 1")
    episode.ask("python_session", "import time; time.sleep(0.5); x += 1; x")
    asking = asyncio.ensure_future(episode.run(other))
    async with asyncio.timeout(SECONDS):
        while not holder.routing._holders._at_work:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    await holder.routing.drain()
    result = await asking
    assert (result.text, result.replica) == ("2\n", "1")
    episode.fold(result)
    again = await episode.call(other, "python_session", "x")
    assert (again.text, again.replica) == ("2\n", "2")


async def test_a_session_that_cannot_be_made_anew_fails_its_trajectory(start: Start) -> None:
    """With its cause, at once; as long as its holder lives, others reach it."""
    holder, other, episode = await start("1"), await start("2"), Episode()
    assert (await episode.call(holder, "count")).text == "1"
    assert (await episode.call(other, "count")).text == "2"
    await holder.die()
    with pytest.raises(
        HopFailed, match=r"tool\.session_lost: the session of count is gone"
    ) as lost:
        await episode.call(other, "count")
    assert lost.value.final


async def test_a_long_rebuild_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, other, episode = await start("1"), await start("2"), Episode()
    await says(episode, holder, "import time; time.sleep(0.3)")
    await holder.die()
    monkeypatch.setattr(other.toolbox, "_rebuild_s", 0.05)
    with pytest.raises(HopFailed, match=r"tool\.rebuild_late: 1 calls of python_session"):
        await episode.call(other, "python_session", "1")


# -- effects outside -------------------------------------------------------------------------------


async def test_an_effect_is_announced_before_it_happens(start: Start) -> None:
    world = World()
    replica, episode = await start("1", world), Episode()
    episode.ask("send", "a letter")
    started = await replica.routing.handle(episode.state)
    assert started == Started(trajectory="g0-0-0", replica="1", turn=0, call=0)
    assert world.effects == []
    episode.fold(started)
    result = await replica.routing.handle(episode.state)
    assert isinstance(result, Result)
    assert result.text == "sent a letter, 1 in all"
    assert await replica.routing.handle(episode.state) == result, "its commit was lost"
    assert world.effects == ["a letter"]


async def test_who_finds_it_begun_asks_who_has(start: Start) -> None:
    """The wake-up came again, to another replica and to the same, while the call runs and when it is done."""
    world = World()
    actor, other, episode = await start("1", world), await start("2", world), Episode()
    world.go_on.clear()
    episode.ask("send", "a letter")
    episode.fold(await actor.routing.handle(episode.state))
    early = asyncio.ensure_future(other.routing.handle(episode.state))
    await asyncio.wait({early}, timeout=0.3)
    acting = asyncio.ensure_future(actor.routing.handle(episode.state))
    await world.begun.wait()
    again = asyncio.ensure_future(actor.routing.handle(episode.state))
    await asyncio.wait({early, again}, timeout=0.3)
    assert not early.done()
    assert not again.done()
    world.go_on.set()
    result = await acting
    assert await early == await again == await other.routing.handle(episode.state) == result
    assert world.effects == ["a letter"]


@pytest.mark.parametrize("acted", [False, True])
async def test_nobody_acts_for_one_that_died(
    start: Start, monkeypatch: pytest.MonkeyPatch, acted: bool
) -> None:
    """Whether it had acted is not known: the trajectory fails, whoever takes the wake-up and however often."""
    monkeypatch.setattr("bus.holders._LOST_S", 0.2)
    world = World()
    actor, other, episode = await start("1", world), await start("2", world), Episode()
    episode.ask("send", "a letter")
    episode.fold(await actor.routing.handle(episode.state))
    if acted:
        await actor.routing.handle(episode.state)
    await actor.die()
    for replica in (other, other, await start("1", world)):  # the last has its name, and no memory
        with pytest.raises(HopFailed, match=r"tool\.outcome_unknown: 1 began to act") as failed:
            await replica.routing.handle(episode.state)
        assert failed.value.final
    assert world.effects == ["a letter"] * acted


async def test_an_effect_that_fails_is_not_tried_again(start: Start) -> None:
    """It may have happened; the next to ask is told the same."""
    world = World()
    replica, other, episode = await start("1", world), await start("2", world), Episode()
    episode.ask("send", "break")
    episode.fold(await replica.routing.handle(episode.state))
    for each in (replica, replica, other):
        with pytest.raises(HopFailed, match=r"tool\.broke: the world is closed") as failed:
            await each.routing.handle(episode.state)
        assert failed.value.final
    assert world.effects == ["break"]


async def test_started_and_result_are_one_hop(bus: Bus, log: Log, start: Start) -> None:
    """Who appended the one acts and appends the other, whatever else wakes the stage up meanwhile."""
    await provision(bus, RUN, ["send"])
    world = World()
    world.go_on.clear()
    replicas = [await start("1", world), await start("2", world)]
    state = await about_to_send(log)
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(serving(bus, log, replica))
        await publish_work(bus, RUN, state)
        await world.begun.wait()
        begun = await log.trajectory(state.id)
        assert begun is not None
        for swept in (state, begun):
            await publish_work(bus, RUN, swept, again=True)
        world.go_on.set()
        async for found in log.follow(begun.seq, poll_s=0.05):
            if found:
                break
    (stored,) = [each async for each in log.read(after=begun.seq)]
    assert isinstance(stored.event, Result)
    assert stored.event.replica == begun.started.replica
    assert world.effects == ["a letter"]


async def test_neither_redelivery_nor_sweep_acts_again(
    bus: Bus, log: Log, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dead replica has begun becomes a dead letter with its cause, each time that it is woken up."""
    monkeypatch.setattr("bus.holders._LOST_S", 0.2)
    await provision(bus, RUN, ["send"])
    world = World()
    state = await about_to_send(log, begun_by="toolbox-dead-1")
    async with serving(bus, log, await start("2", world)):
        for count in (1, 2):
            await publish_work(bus, RUN, state, again=count > 1)
            while len(letters := await dead_letters(bus, RUN)) < count:  # noqa: ASYNC110 (the server's)
                await asyncio.sleep(0.05)
    causes = {(each.letter.boundary, each.letter.code, each.letter.seq) for each in letters}
    assert causes == {("tool", "outcome_unknown", state.seq)}
    assert world.effects == []


async def test_who_is_second_to_begin_asks_the_first(start: Start) -> None:
    """The log says who may act; the other, who would have, waits for it and not for itself."""
    world = World()
    first, second, episode = await start("1", world), await start("2", world), Episode()
    episode.ask("send", "a letter")
    too_late = await second.routing.handle(episode.state)
    episode.fold(await first.routing.handle(episode.state))
    assert isinstance(too_late, Started)
    async with asyncio.timeout(SECONDS):
        results = await asyncio.gather(
            *(replica.routing.handle(episode.state) for replica in (second, first))
        )
    assert results[0] == results[1]
    assert world.effects == ["a letter"]


async def test_a_beginner_that_never_heard_of_it_acts_when_asked(start: Start) -> None:
    """Its `started` was stored, and its own wake-up went to another."""
    world = World()
    first, second, episode = await start("1", world), await start("2", world), Episode()
    episode.ask("send", "a letter")
    episode.fold(await first.routing.handle(episode.state))
    async with asyncio.timeout(SECONDS):
        result = await second.routing.handle(episode.state)
        assert await first.routing.handle(episode.state) == result
    assert (result.replica, world.effects) == ("1", ["a letter"])
