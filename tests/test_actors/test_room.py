"""A log near its limit: the dispatcher stops admitting, says so, and goes on when there is room."""

import asyncio

from actors.decisions import Admit, Finish, View
from actors.dispatcher import Dispatcher
from actors.heartbeat import Vitals
from actors.process import Process
from actors.roles import serve_dispatcher
from bus import policy, subjects
from bus.connection import Bus
from bus.log import Log
from bus.provision import provision
from bus.store import purge
from recipes.arithmetic import rows
from schemas.events import Stepped
from schemas.messages import WeightsPointer
from schemas.recipe import Data, Learner, Policy, Recipe
from schemas.task import TaskRow

RECIPE = Recipe(
    policy=Policy(model="m"),
    data=Data(rows="recipes.arithmetic:rows"),
    learner=Learner(steps=1, groups_per_step=2, group_size=2),
)


def test_without_room_nothing_is_admitted_and_a_run_can_end() -> None:
    """The end is small, and frees what others wait for."""
    dispatcher = Dispatcher(
        RECIPE, (TaskRow(**row) if isinstance(row, dict) else row for row in rows(0)), []
    )
    full = View(now_s=0.0, policy_version=0, shortage="the log holds 9 of 10 GB")
    assert dispatcher.decide(full) == []
    assert any(isinstance(each, Admit) for each in dispatcher.decide(full._replace(shortage="")))
    dispatcher.observe(Stepped(step=1, policy_version=1, weights_sha256="", metrics={}), 9, 0.0)
    (finish,) = dispatcher.decide(full._replace(policy_version=1))
    assert isinstance(finish, Finish)


async def test_admission_stops_and_goes_on(bus: Bus, log: Log) -> None:
    """The phase that `actors ps` and the terminal show names the figure and what to do."""
    vitals = Vitals(run=log.run, role="dispatcher", replica="dispatcher-test-1")
    process = Process(bus, log, RECIPE, "", vitals, asyncio.Event())
    await provision(bus, "test", ["python"], log_limit_bytes=1_000_000)
    await bus.store("log.other.r.padding", bytes(950_000))
    pointer = WeightsPointer(policy_version=0, weights_sha256="", assets_sha256="")
    await policy.publish_policy(bus, "test", pointer, b"")
    serving = asyncio.ensure_future(serve_dispatcher(process))
    admitted = subjects.trajectory("test", "*", "admitted")
    async with asyncio.timeout(60.0):
        while not vitals.phase.startswith("admission stops"):  # noqa: ASYNC110 - a plain field
            await asyncio.sleep(0.05)
        assert vitals.phase == (
            "admission stops: the log holds 950 KB of 1 MB; `actors archive` of a closed run makes room"
        )
        assert [stored async for stored in log.read(admitted)] == []
        await purge(bus, "LOG", "log.other.>")
        async for found in log.follow(subject=admitted):
            if found:
                break
        while vitals.phase.startswith("admission stops"):  # noqa: ASYNC110 - a plain field
            await asyncio.sleep(0.05)
    process.stopping.set()
    await asyncio.wait_for(serving, 20.0)
