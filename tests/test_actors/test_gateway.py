"""The gateway over a real server: what the log holds of an action, whoever is killed or asked twice."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from actors.accounts import Accounts
from actors.calling import Toolset
from actors.decisions import End, Sweep, View
from actors.dispatcher import Dispatcher
from actors.fleet import Fleet
from actors.gateway import Gateway, NotNow, name_of
from actors.gateway_actions import Actions
from actors.gateway_http import Door
from actors.gateway_requests import Action, Answer
from actors.heartbeat import Vitals
from actors.process import Hops, Process
from actors.recorder import closings, rows
from actors.verify import audit
from bus import subjects
from bus.connection import Bus
from bus.log import Log
from schemas import recipe
from schemas.events import (
    EXTERNAL,
    Admitted,
    Call,
    Cause,
    Event,
    Expired,
    Failed,
    Finished,
    Paused,
    Result,
    Resumed,
    Turn,
)
from schemas.recipe import Deadlines, Policy, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, TrajectoryId
from tools.registry import load_tools

RECIPE = Recipe(policy=Policy(model=""), deadlines=Deadlines(drain_s=1))
WAIT_S = 30.0


class Runs:
    """A toolbox whose result is the code itself, once a function of the trajectory lets it be."""

    stage = "tool"
    produces: tuple[type[Event], ...] = (Result,)

    def __init__(self, handle: Callable[[Trajectory], Awaitable[None]]) -> None:
        self._handle = handle
        self.taken: asyncio.Queue[str] = asyncio.Queue()

    async def handle(self, state: Trajectory) -> Result:
        assert state.next_call is not None
        index, call = state.next_call
        self.taken.put_nowait(call.arguments["code"])
        await self._handle(state)
        turn, text = len(state.turns) - 1, call.arguments["code"]
        return Result(trajectory=state.id, turn=turn, call=index, text=text)

    async def drain(self) -> None: ...

    async def close(self) -> None: ...


async def at_once(_: Trajectory) -> None:
    """Nothing is waited for."""


def process_of(bus: Bus, log: Log, role: Any, of: Recipe = RECIPE) -> Process:
    return Process(bus, log, of, "", Vitals(log.run, role, f"{role}-h-1"), asyncio.Event())


@asynccontextmanager
async def toolbox(
    bus: Bus, log: Log, handle: Callable[[Trajectory], Awaitable[None]] = at_once
) -> AsyncIterator[Runs]:
    """Calls of `python` are run for as long as the block runs."""
    actor, process = Runs(handle), process_of(bus, log, "toolbox")
    served = asyncio.create_task(Hops(process, actor).serve(["python"], 8))  # type: ignore[arg-type]
    try:
        yield actor
    finally:
        process.stopping.set()
        await served


async def open_gateway(bus: Bus, log: Log, of: Recipe = RECIPE, number: int = 1) -> Gateway:
    tools = Toolset(load_tools(["python"]), Actions.of)
    process = process_of(bus, log, "gateway", of)
    process.vitals.replica = f"gateway-h-{number}"
    gateway = Gateway(process, tools, Fleet())
    await gateway.hear()
    return gateway


def ask(gateway: Gateway, code: str, **fields: Any) -> Awaitable[Answer]:
    return gateway.answer(Action("a", f"<python>{code}</python>", **fields))


def shown(code: str) -> Answer:
    return Answer(f"\n<result>\n{code}\n</result>\n", done=False, valid=True, tool="python")


async def kinds(log: Log) -> list[str]:
    return [stored.event.kind async for stored in log.read()]


async def test_actions_are_turns(bus: Bus, log: Log) -> None:
    """One trajectory, from its first action to its finish; then its name may be used again."""
    gateway = await open_gateway(bus, log)
    async with toolbox(bus, log), asyncio.timeout(WAIT_S):
        assert await ask(gateway, "1", extra={"db_id": "shop"}) == shown("1")
        assert await ask(gateway, "2", extra={"stdin": "x"}) == shown("2")
        assert (await gateway.answer(Action("a", "", finish=True))).done
        assert (await gateway.answer(Action("a", "", finish=True))).done
        assert await ask(gateway, "3", last=True) == shown("3")
    hop = ["turn", "result"]
    assert await kinds(log) == ["admitted", *hop, *hop, "finished", "admitted", *hop, "finished"]
    state = await log.trajectory("x_a-0-0")
    assert state is not None
    assert state.admitted.task == "a"
    assert state.admitted.public.extra == {"db_id": "shop", "database": "shop"}
    assert state.turns[1].calls == [Call(tool="python", arguments={"code": "2", "stdin": "x"})]
    report = await audit(bus, log.run)
    assert report.balanced, report
    assert (report.admitted, report.fates["finished"]) == (2, 2)
    history = [stored async for stored in log.read(f"log.{log.run}.t.x_a-0-0.*")]
    (closing,) = closings(history[-1])
    recorded = rows(history, closing)
    assert recorded is not None
    archived = recorded.trajectory
    assert (archived["purpose"], archived["fate"]) == ("external", "finished")
    assert (archived["turns"], archived["tool_calls"], archived["reward"]) == (2, 2, None)


async def test_what_never_began_is_finished_already(bus: Bus, log: Log) -> None:
    """As VerlTool answers; nothing is written."""
    gateway = await open_gateway(bus, log)
    answer = await gateway.answer(Action("a", "", finish=True, last=True))
    assert answer == Answer("", done=True, valid=True)
    assert await kinds(log) == []


@pytest.mark.parametrize("done", [False, True])
async def test_an_action_without_a_call_is_invalid(bus: Bus, log: Log, done: bool) -> None:
    """It says why, in VerlTool's fields, and is on record; the recipe says whether it is the last."""
    of = replace(RECIPE, gateway=recipe.Gateway(done_if_invalid=done))
    gateway = await open_gateway(bus, log, of)
    answer = await gateway.answer(Action("a", "I think that"))
    assert (answer.done, answer.valid) == (done, False)
    assert isinstance(answer.observation, dict)
    assert answer.observation["obs"] == ""
    assert answer.observation["invalid_reason"] == "No valid tool found for action"
    assert "• python: " in answer.observation["available_tools"]
    assert await kinds(log) == ["admitted", "turn", *(["finished"] if done else [])]


async def test_the_same_action_at_two_gateways_runs_once(bus: Bus, log: Log) -> None:
    """A client that asks again, through another door, waits for what runs already."""
    free = asyncio.Event()

    async def wait(_: Trajectory) -> None:
        await free.wait()

    one, two = await open_gateway(bus, log), await open_gateway(bus, log)
    async with toolbox(bus, log, wait) as box, asyncio.timeout(WAIT_S):
        first = asyncio.ensure_future(ask(one, "1"))
        await box.taken.get()
        second = asyncio.ensure_future(ask(two, "1"))
        other = asyncio.ensure_future(ask(two, "2"))
        free.set()
        assert await asyncio.gather(first, second, other) == [shown("1"), shown("1"), shown("2")]
        assert box.taken.get_nowait() == "2"
        assert box.taken.empty()
    assert (await audit(bus, log.run)).balanced


async def test_a_gateway_that_is_killed_is_asked_again(bus: Bus, log: Log) -> None:
    """What it had begun is not begun again, whoever is asked."""
    free = asyncio.Event()

    async def wait(_: Trajectory) -> None:
        await free.wait()

    async with toolbox(bus, log, wait) as box, asyncio.timeout(WAIT_S):
        killed = asyncio.ensure_future(ask(await open_gateway(bus, log), "1"))
        await box.taken.get()
        killed.cancel()
        again = asyncio.ensure_future(ask(await open_gateway(bus, log), "1"))
        free.set()
        assert await again == shown("1")
        assert box.taken.empty()


@pytest.mark.parametrize("number", [1, 2])
async def test_an_answer_that_nobody_took_is_given_again(bus: Bus, log: Log, number: int) -> None:
    """The connection had died, or the gateway with it: then its action is not run twice. What was taken is over."""
    one = await open_gateway(bus, log)
    async with toolbox(bus, log) as box, asyncio.timeout(WAIT_S):
        await ask(one, "1")
        again = one if number == 1 else await open_gateway(bus, log, number=2)
        assert await ask(again, "1") == shown("1")
        assert box.taken.qsize() == 1
        again.told("a")
        assert await ask(again, "1") == shown("1")
        assert box.taken.qsize() == 2
    assert (await audit(bus, log.run)).balanced


async def test_a_policy_may_repeat_itself(bus: Bus, log: Log) -> None:
    """An action that was answered is run again, as often as it is sent."""
    async with toolbox(bus, log) as box, door(bus, log) as client, asyncio.timeout(WAIT_S):
        for _ in range(3):
            await client.post("/get_observation", json=body_of(a="<python>1</python>"))
    assert box.taken.qsize() == 3


async def test_a_lost_wake_up_is_sent_again(bus: Bus, log: Log) -> None:
    """A gateway that died between the turn and its message: the next to be asked sends it."""
    name = name_of("a", 0)
    public = PublicPart(messages=[])
    admitted = Admitted(
        trajectory=name, task="a", public=public, private_key="", purpose="external"
    )
    seq = await log.append(admitted, 0)
    turn = Turn(
        trajectory=name,
        tokens=Tokens(),
        text="<python>1</python>",
        calls=[Call(tool="python", arguments={"code": "1"})],
    )
    await log.append(turn, seq)
    async with toolbox(bus, log), asyncio.timeout(WAIT_S):
        assert await ask(await open_gateway(bus, log), "1") == shown("1")


async def test_infrastructure_that_fails_is_nobody_s_observation(bus: Bus, log: Log) -> None:
    """The answer ends the trajectory as VerlTool's does for a tool that raised, now and for every later action."""
    stuck = asyncio.Event()

    async def wait(_: Trajectory) -> None:
        await stuck.wait()

    gateway = await open_gateway(bus, log)
    async with toolbox(bus, log, wait) as box, asyncio.timeout(WAIT_S):
        asked = asyncio.ensure_future(ask(gateway, "1"))
        await box.taken.get()
        state = await log.trajectory("x_a-0-0")
        assert state is not None
        cause = Cause(boundary="sandbox", code="gone", detail="no memory")
        await log.append(Failed(trajectory=state.id, cause=cause), state.seq)
        answer = await asked
        assert (answer.done, answer.valid, answer.cause) == (True, False, "sandbox.gone")
        assert answer.observation == {
            "obs": "",
            "error": "Tool processing failed: sandbox.gone: no memory",
            "invalid_reason": "sandbox.gone",
            "tool_type": "python",
        }
        assert await ask(gateway, "2") == answer
        stuck.set()
    assert (await kinds(log))[-1] == "failed"


async def test_a_trainer_may_give_up_on_a_call(bus: Bus, log: Log) -> None:
    """Its result is not written any more."""
    free = asyncio.Event()

    async def wait(_: Trajectory) -> None:
        await free.wait()

    one, two = await open_gateway(bus, log), await open_gateway(bus, log)
    async with toolbox(bus, log, wait) as box, asyncio.timeout(WAIT_S):
        asked = asyncio.ensure_future(ask(one, "1"))
        await box.taken.get()
        await two.answer(Action("a", "", finish=True))
        assert await asked == Answer("", done=True, valid=True)
        free.set()
    assert await kinds(log) == ["admitted", "turn", "finished"]
    assert (await audit(bus, log.run)).balanced


async def test_a_pause_is_for_new_trajectories(bus: Bus, log: Log) -> None:
    """Those under way go on; the others are to be sent again later."""
    gateway = await open_gateway(bus, log)
    async with toolbox(bus, log), asyncio.timeout(WAIT_S):
        await ask(gateway, "1")
        gateway.observe(Paused())
        assert await ask(gateway, "2") == shown("2")
        with pytest.raises(NotNow, match="paused"):
            await gateway.answer(Action("b", "<python>1</python>"))
        gateway.observe(Resumed())
        assert (await gateway.answer(Action("b", "<python>1</python>"))).valid


def test_a_gateway_publishes_its_kinds() -> None:
    """And no other of a trajectory's."""
    published = {
        row.subject.rpartition(".")[2]
        for row in subjects.TABLE
        if row.subject.startswith("log.*.t.") and "gateway" in row.publishes
    }
    assert published == {kind.__name__.lower() for kind in EXTERNAL}


def test_names_are_kept_where_they_can_be() -> None:
    """And never meet one another, or those of the dispatcher."""
    names = ["a", "a-b", "a_b", "", "ä", "x" * 65, "g0", "a.b", "0f" * 16]
    ours = [TrajectoryId.parse(name_of(name, life)) for name in names for life in (0, 1)]
    assert len(set(ours)) == 2 * len(names)
    assert str(ours[0]) == "x_a-0-0"
    assert all(each.group.startswith("x") for each in ours)


# -- the door --------------------------------------------------------------------------------------


@asynccontextmanager
async def door(bus: Bus, log: Log, of: Recipe = RECIPE) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client at a gateway's door, in this process."""
    process = process_of(bus, log, "gateway", of)
    toolset = Toolset(load_tools(["python"]), Actions.of)
    gateway = Gateway(process, toolset, Fleet())
    await gateway.hear()
    app = Door(process, gateway, Fleet(), toolset).app
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


def body_of(**actions: str) -> dict[str, Any]:
    return {"trajectory_ids": list(actions), "actions": list(actions.values())}


async def test_a_batch_keeps_its_order(bus: Bus, log: Log) -> None:
    """Whatever finishes first; what cannot be run is answered beside what can."""

    async def later_first(state: Trajectory) -> None:
        await asyncio.sleep(0.2 if state.id == "x_a-0-0" else 0)

    async with toolbox(bus, log, later_first), door(bus, log) as client, asyncio.timeout(WAIT_S):
        body = body_of(a="<python>1</python>", b="<python>2</python>", c="?")
        reply = await client.post("/get_observation", json=body)
    found = reply.json()
    assert found["observations"][:2] == ["\n<result>\n1\n</result>\n", "\n<result>\n2\n</result>\n"]
    assert found["valids"] == [True, True, False]
    assert found["dones"] == [False, False, False]
    assert float(reply.headers["x-process-time"]) * 1e3 >= found["processing_time_ms"] > 0


async def test_too_much_is_put_off(bus: Bus, log: Log) -> None:
    """Slots, then places to wait, then 503 with Retry-After; whoever waits is served."""
    free = asyncio.Event()

    async def wait(_: Trajectory) -> None:
        await free.wait()

    of = replace(RECIPE, gateway=recipe.Gateway(slots=1, waiting=1))
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(toolbox(bus, log, wait))
        client = await stack.enter_async_context(door(bus, log, of))
        await stack.enter_async_context(asyncio.timeout(WAIT_S))
        posts = [
            asyncio.ensure_future(
                client.post("/get_observation", json=body_of(**{name: "<python>1</python>"}))
            )
            for name in "ab"
        ]
        await box.taken.get()
        while "gateway_waiting 1.0" not in (await client.get("/metrics")).text:
            pass
        refused = await client.post("/get_observation", json=body_of(c="<python>1</python>"))
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        free.set()
        assert [(await post).status_code for post in posts] == [200, 200]
        figures = (await client.get("/metrics")).text
    assert 'gateway_refused_total{status="503"} 1.0' in figures
    assert 'gateway_calls_total{tool="python",valid="true"} 2.0' in figures
    assert 'gateway_call_seconds_count{tool="python"} 2.0' in figures


async def test_refusals_are_json(bus: Bus, log: Log) -> None:
    """In the shape of FastAPI's, whose clients VerlTool's users have."""
    async with door(bus, log) as client:
        reply = await client.post("/get_observation", content=b"{")
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body"]
        large = body_of(a="x" * bus.client.max_payload)
        reply = await client.post("/get_observation", json=large)
        assert reply.status_code == 413
        health = await client.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "no toolbox is heard"
    assert json.loads(health.content)["tools"] == ["python"]


# -- the dispatcher --------------------------------------------------------------------------------


def observed(*events: Any) -> Dispatcher:
    dispatcher = Dispatcher(RECIPE, iter(()), [])
    public = PublicPart(messages=[])
    admitted = Admitted(
        trajectory="x_a-0-0", task="a", public=public, private_key="", purpose="external"
    )
    for seq, event in enumerate((admitted, *events), 1):
        dispatcher.observe(event, seq, 0.0)
    return dispatcher


def turn_of(*calls: Call) -> Turn:
    return Turn(trajectory="x_a-0-0", tokens=Tokens(), text="", calls=list(calls))


def test_the_dispatcher_waits_for_nobody_outside() -> None:
    """A trajectory whose next action is the trainer's to send is swept by nobody, and expires when it never comes."""
    dispatcher = observed(turn_of())
    idle_s = RECIPE.gateway.idle_s
    assert dispatcher.patrol(View(now_s=idle_s - 1, policy_version=-1)) == []
    (end,) = dispatcher.patrol(View(now_s=idle_s + 1, policy_version=-1))
    assert isinstance(end, End)
    assert isinstance(end.events[0][0], Expired)


def test_the_dispatcher_sweeps_a_call_of_outside() -> None:
    """As any other; once it has failed nothing is admitted in its place."""
    dispatcher = observed(turn_of(Call(tool="python", arguments={})))
    limit_s = RECIPE.deadlines.tool_s
    swept = dispatcher.patrol(View(now_s=limit_s + 1, policy_version=-1))
    assert swept == [Sweep("x_a-0-0")]
    cause = Cause(boundary="deadline", code="tool")
    dispatcher.observe(Failed(trajectory="x_a-0-0", cause=cause), 9, 1.0)
    assert dispatcher.decide(View(now_s=limit_s, policy_version=-1)) == []
    assert dispatcher.live == {}


def test_the_dispatcher_forgets_what_is_finished() -> None:
    """And a run that only serves never ends by itself."""
    dispatcher = observed(Finished(trajectory="x_a-0-0", reason=""))
    assert dispatcher.live == {}
    assert dispatcher.decide(View(now_s=0.0, policy_version=-1)) == []


@pytest.mark.parametrize(("purpose", "broken"), [("external", []), ("train", ["g0-0-0"])])
def test_only_what_is_external_is_finished(purpose: Any, broken: list[str]) -> None:
    """`actors verify` names a trajectory that was taken from its learner so."""
    accounts = Accounts()
    public = PublicPart(messages=[])
    accounts.observe(
        Admitted(trajectory="g0-0-0", task="a", public=public, private_key="", purpose=purpose)
    )
    accounts.observe(Finished(trajectory="g0-0-0", reason=""))
    report = accounts.report()
    assert report.broken.get("out_of_turn", []) == broken
    assert report.fates["finished"] == report.admitted == 1
