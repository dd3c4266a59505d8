"""Hops against a real server: what fails, what comes again, and how often a handler runs for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from msgspec import structs

from actors.actor import HopFailed
from actors.heartbeat import Vitals
from actors.process import Hops, Process
from bus.connection import Bus
from bus.dead import dead_letters
from bus.embedded import EmbeddedServer
from bus.errors import Missing, Unavailable
from bus.log import Log
from bus.work import open_queue, publish_work
from schemas.events import Admitted, Event, Scored, Turn
from schemas.messages import DeadLetter
from schemas.recipe import Deadlines, Policy, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

RECIPE = Recipe(policy=Policy(model="m"), deadlines=Deadlines(handler_failures=2, drain_s=1))
WAIT_S = 30.0


class Says:
    """A generator whose turn is what a function makes of the trajectory."""

    stage = "gen"
    produces: tuple[type[Event], ...] = (Turn,)

    def __init__(self, handle: Callable[[Trajectory], Awaitable[None]]) -> None:
        self._handle = handle
        self.handled: list[str] = []

    async def handle(self, state: Trajectory) -> Turn:
        self.handled.append(state.id)
        await self._handle(state)
        return Turn(trajectory=state.id, tokens=Tokens.sampled([1], [0.0], [0]), text="", last=True)

    async def drain(self) -> None: ...

    async def close(self) -> None: ...


async def nothing(_: Trajectory) -> None:
    """The turn is said at once."""


@asynccontextmanager
async def serving(bus: Bus, log: Log, actor: Says) -> AsyncIterator[Process]:
    """The actor at its queue for as long as the block runs."""
    vitals = Vitals(run=log.run, role="generator", replica="generator-h-1")
    process = Process(bus, log, RECIPE, "", vitals, asyncio.Event())
    served = asyncio.create_task(Hops(process, actor).serve([""], 8))  # type: ignore[arg-type]
    try:
        yield process
    finally:
        process.stopping.set()
        await served


async def admit(bus: Bus, log: Log, count: int = 1) -> list[Trajectory]:
    """Trajectories that wait for their first turn."""
    states = []
    for member in range(count):
        name = f"g0-{member}-0"
        event = Admitted(trajectory=name, task="t", public=PublicPart(messages=[]), private_key="")
        states.append(Trajectory(admitted=event, seq=await log.append(event, 0)))
        await publish_work(bus, log.run, states[-1])
    return states


async def lose(bus: Bus, log: Log, times: int, count: int = 1) -> None:
    """As often as that each message is taken and comes back, as if its holder had died."""
    async with open_queue(bus, "gen", log.run, slots=count) as queue:
        for _ in range(times):
            for delivery in [await queue.take() for _ in range(count)]:
                await delivery.give_back()


async def until_turns(log: Log, count: int) -> None:
    found = 0
    async with asyncio.timeout(WAIT_S):
        async for stored in log.follow(poll_s=0.05):  # it goes on when the server has been away
            found += sum(isinstance(each.event, Turn) for each in stored)
            if found >= count:
                return


async def first_letter(bus: Bus, run: str) -> DeadLetter:
    async with asyncio.timeout(WAIT_S):
        while not (dead := await dead_letters(bus, run)):  # noqa: ASYNC110 (a stream of the server's)
            await asyncio.sleep(0.05)
    assert dead[0].letter is not None
    return dead[0].letter


async def crashes(state: Trajectory) -> None:
    raise RuntimeError(state.id)


async def misses(_: Trajectory) -> None:
    raise Missing("the private part")


async def breaks(_: Trajectory) -> None:
    raise HopFailed("engine", "gone", "no memory")


@pytest.mark.parametrize(
    ("handle", "cause"),
    [
        (breaks, ("engine", "gone", "no memory")),
        (crashes, ("engine", "crashed", "RuntimeError('g0-0-0')")),
        (misses, ("bus", "missing", "the private part is not there")),
    ],
)
async def test_a_handler_that_keeps_failing_leaves_a_letter(
    bus: Bus, log: Log, handle: Callable[[Trajectory], Awaitable[None]], cause: tuple[str, ...]
) -> None:
    """After `handler_failures` tries, with the boundary where it broke, the trajectory and its sequence."""
    actor = Says(handle)
    async with serving(bus, log, actor):
        (state,) = await admit(bus, log)
        letter = await first_letter(bus, log.run)
    assert (letter.boundary, letter.code, letter.error) == cause
    assert (letter.trajectory, letter.seq) == (state.id, state.seq)
    assert actor.handled == [state.id] * 2


async def test_a_turn_that_no_message_holds_leaves_a_letter(bus: Bus, log: Log) -> None:
    """It has failed like any other hop, with its size and the limit, and is not sent again and again."""

    class Rambles(Says):
        async def handle(self, state: Trajectory) -> Turn:
            return structs.replace(await super().handle(state), text="x" * (9 << 20))

    actor = Rambles(nothing)
    async with serving(bus, log, actor):
        (state,) = await admit(bus, log)
        letter = await first_letter(bus, log.run)
    assert (letter.boundary, letter.code, letter.trajectory) == ("bus", "toolarge", state.id)
    assert f"a message of the bus holds {bus.client.max_payload}" in letter.error
    assert actor.handled == [state.id] * 2


async def test_a_message_that_is_none_leaves_a_letter(bus: Bus, log: Log) -> None:
    """Of the bus, and of no trajectory: that of which it should have told is swept."""
    async with serving(bus, log, Says(nothing)):
        await bus.store(f"gen.{log.run}", b"\xc1")
        letter = await first_letter(bus, log.run)
    assert (letter.boundary, letter.code, letter.trajectory) == ("bus", "bad_message", "")
    assert letter.payload == b"\xc1"


async def test_a_hop_whose_holders_always_die_is_put_aside(
    bus: Bus, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler is not even called any more; kills of fewer holders harm nobody."""
    monkeypatch.setattr("actors.process._MAX_DELIVERIES", 3)
    actor = Says(nothing)
    (state,) = await admit(bus, log)
    await lose(bus, log, 3)
    async with serving(bus, log, actor):
        letter = await first_letter(bus, log.run)
    assert (letter.boundary, letter.code) == ("engine", "holder_died")
    assert (letter.trajectory, letter.seq) == (state.id, state.seq)
    assert actor.handled == []


async def test_suspects_are_handled_one_at_a_time(
    bus: Bus, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came back twice may be what kills its holders: the others do not die with it. Once is everybody's lot."""
    monkeypatch.setattr("actors.process.random.random", lambda: 0.0)
    running = most = 0
    together = asyncio.Event()

    async def handle(_: Trajectory) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 4:
            together.set()
        await together.wait()
        await asyncio.sleep(0.05)
        running -= 1

    await admit(bus, log, 4)
    await lose(bus, log, 1, 4)
    async with serving(bus, log, Says(handle)):
        await until_turns(log, 4)
    assert most == 4
    most = 0
    for member in range(4, 8):
        name = f"g0-{member}-0"
        event = Admitted(trajectory=name, task="t", public=PublicPart(messages=[]), private_key="")
        state = Trajectory(admitted=event, seq=await log.append(event, 0))
        await publish_work(bus, log.run, state)
    await lose(bus, log, 2, 4)
    async with serving(bus, log, Says(handle)):
        await until_turns(log, 8)
    assert most == 1


async def test_what_is_swept_while_it_is_worked_on_runs_once(bus: Bus, log: Log) -> None:
    """By the replica that holds it, and by one that gets the message when the hop is long committed."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handle(_: Trajectory) -> None:
        begun.set()
        await go_on.wait()

    actor = Says(handle)
    async with serving(bus, log, actor) as process:
        (state,) = await admit(bus, log)
        await begun.wait()
        await publish_work(bus, log.run, state, again=True)
        go_on.set()
        await until_turns(log, 1)
        await publish_work(bus, log.run, state, again=True)
        async with asyncio.timeout(WAIT_S):
            while process.vitals.held or await waiting(bus, log.run):  # noqa: ASYNC110 (the same)
                await asyncio.sleep(0.05)
    assert actor.handled == [state.id]


async def waiting(bus: Bus, run: str) -> int:
    """Messages of the stage that nobody has finished."""
    info = await bus.client.jetstream().consumer_info("GEN", run)
    return int(info.num_pending) + int(info.num_ack_pending)


async def test_a_server_that_goes_in_the_middle_of_a_hop_costs_no_failure(
    server: EmbeddedServer, bus: Bus, log: Log
) -> None:
    """The replica keeps the hop and commits it when the server is back: once, and nobody is blamed."""

    async def handle(_: Trajectory) -> None:
        server.stop()
        server.start()

    actor = Says(handle)
    async with serving(bus, log, actor):
        (state,) = await admit(bus, log)
        await until_turns(log, 1)
    assert actor.handled == [state.id]
    assert await dead_letters(bus, log.run) == []


async def test_a_server_that_goes_while_a_handler_asks_it_costs_no_failure(
    server: EmbeddedServer, bus: Bus, log: Log
) -> None:
    """However often: the hop is tried again until it is answered."""
    goes = RECIPE.deadlines.handler_failures + 1

    async def handle(_: Trajectory) -> None:
        asking = asyncio.create_task(bus.request("$JS.API.INFO", b""))
        if len(actor.handled) <= goes:
            server.stop()
            server.start()
        await asking

    actor = Says(handle)
    async with serving(bus, log, actor):
        await admit(bus, log)
        await until_turns(log, 1)
    assert len(actor.handled) == goes + 1
    assert await dead_letters(bus, log.run) == []


@pytest.mark.parametrize("refused", [False, True])
async def test_servers_that_choose_a_leader_cost_no_failure(
    bus: Bus, log: Log, *, refused: bool
) -> None:
    """The link holds meanwhile, and nobody answers: no reason to put a hop aside. What a server refuses is one."""
    failures = RECIPE.deadlines.handler_failures + 1

    async def handle(state: Trajectory) -> None:
        if len(actor.handled) <= failures:
            raise Unavailable(state.id, "status 503", refused=refused)

    actor = Says(handle)
    async with serving(bus, log, actor):
        await admit(bus, log)
        if refused:
            assert (await first_letter(bus, log.run)).code == "unconfirmed"
        else:
            await until_turns(log, 1)
            assert await dead_letters(bus, log.run) == []


class Scores(Says):
    """A scorer for which the last turn's length is the reward."""

    stage = "score"
    produces = (Scored,)

    async def handle(self, state: Trajectory) -> Scored:  # type: ignore[override]
        return Scored(trajectory=state.id, reward=float(len(state.turns[-1].text)))


async def test_a_reward_is_for_what_the_log_says(bus: Bus, log: Log) -> None:
    """Whoever may wake scorers may carry any state in the message: it is not believed."""
    admitted = Admitted(
        trajectory="g0-0-0", task="t", public=PublicPart(messages=[]), private_key=""
    )
    state = Trajectory(admitted=admitted, seq=await log.append(admitted, 0))
    tokens = Tokens.sampled([1], [0.0], [0])
    turn, better = (
        Turn(trajectory="g0-0-0", tokens=tokens, text=text, last=True) for text in ("a", "abc")
    )
    seq = await log.append(turn, state.seq)
    forged = structs.replace(state, turns=[better], seq=seq)
    await publish_work(bus, log.run, forged)
    async with serving(bus, log, Scores(nothing)), asyncio.timeout(WAIT_S):
        while (found := await log.trajectory("g0-0-0")) is None or found.scored is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert found.scored.reward == 1.0
