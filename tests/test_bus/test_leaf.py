"""What a toolbox does, from behind a leaf node: it knows that server alone, and the streams are at the hub."""

import asyncio
import json

from bus import blobs, subjects
from bus.connection import Bus, Endpoint, connect
from bus.errors import BusError
from bus.log import open_log
from bus.provision import provision
from bus.work import open_queue, publish_work
from schemas.events import Admitted, Call, Result, Turn
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold

RUN = "test"


async def until_linked(bus: Bus) -> None:
    """The hub's streams answer."""
    async with asyncio.timeout(20):
        while True:
            try:
                answer = await bus.request("$JS.API.STREAM.INFO.LOG", b"", timeout_s=1.0)
                if "error" not in json.loads(answer.data):
                    return
            except BusError:
                await asyncio.sleep(0.1)


async def admit(bus: Bus, trajectory: str) -> Trajectory:
    """A trajectory that waits for a call of `python`."""
    async with open_log(bus, RUN) as log:
        admitted = Admitted(
            trajectory=trajectory, task="t", public=PublicPart(messages=[]), private_key="k"
        )
        state = fold(None, admitted, await log.append(admitted, 0))
        turn = Turn(
            trajectory=trajectory,
            tokens=Tokens.given([1]) + Tokens.sampled([2], [-1.0], [0]),
            text="",
            calls=[Call(tool="python", arguments={"code": "1"})],
        )
        state = fold(state, turn, await log.append(turn, state.seq))
    await publish_work(bus, RUN, state)
    return state


async def test_a_toolbox_works_through_the_leaf(hub_and_leaf) -> None:
    """It takes calls, reads the log, stores an image and appends results; after the hub was killed it does so again."""
    hub, leaf = hub_and_leaf
    async with (
        connect(Endpoint(url=hub.url), "dispatcher") as main,
        connect(Endpoint(url=leaf.url), "toolbox") as far,
    ):
        await provision(main, RUN, ["python"])
        await until_linked(far)
        async with (
            open_queue(far, "tool", RUN, "python", slots=2) as queue,
            open_log(far, RUN) as log,
        ):
            for number, trajectory in enumerate(("g0-0-0", "g0-1-0")):
                if number:
                    hub.kill()
                    hub.start()
                    await until_linked(main)
                    await until_linked(far)
                await admit(main, trajectory)
                async with asyncio.timeout(20):
                    delivery = await queue.take()
                assert delivery.work().trajectory == trajectory
                state = await log.trajectory(trajectory)
                assert state is not None
                image = await blobs.put_blob(far, RUN, b"an image")
                await log.append(Result(trajectory=trajectory, turn=0, call=0, text="1"), state.seq)
                await delivery.done()
                assert await blobs.get_blob(main, RUN, image) == b"an image"
        async with open_log(main, RUN) as log:
            kinds = [stored.event.kind async for stored in log.read(subjects.log(RUN))]
    assert kinds == ["admitted", "turn", "result"] * 2
