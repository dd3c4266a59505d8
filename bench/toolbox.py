"""A real toolbox for a measurement: a nats-server, one replica as a process, and this process as the generator.

A call is timed from its wake-up's way to the toolbox until the generator has the next wake-up, with the result, in
hand: the toolbox has taken it, run it, appended the result to the log and woken the next stage.
"""

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from actors.supervisor import Supervisor
from bus import subjects
from bus.codec import decode
from bus.connection import Bus, Message, connect
from bus.embedded import EmbeddedServer
from bus.log import Log, open_log
from bus.provision import provision
from bus.work import WorkQueue, open_queue, publish_work
from schemas.events import Admitted, Call, Opened, Turn
from schemas.messages import DeadLetter
from schemas.recipe import Policy, Recipe, Toolbox, Tools
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold

RUN = "bench"
_IN_HAND = 8192
"""More than any measurement asks at once: the generator is not what is waited for."""
_AT_ONCE = 64
_TOKENS = Tokens.given([1] * 8) + Tokens.sampled([2] * 16, [-0.5] * 16, [0] * 16)


class ToolboxFailed(Exception):
    """It died, or a call came back as a dead letter."""


class Answer(NamedTuple):
    """One call's."""

    text: str
    took_s: float
    tool_s: float
    """Of it, in the tool itself."""


class Generator:
    """Sends calls of trajectories that it writes down like any other, and takes what comes back."""

    def __init__(self, bus: Bus, log: Log, queue: WorkQueue) -> None:
        self._bus = bus
        self._log = log
        self._queue = queue
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[Trajectory]] = {}

    async def begin(self, call: Call) -> Trajectory:
        """A new trajectory whose first turn makes the call."""
        name = f"g{next(self._numbers)}-0-0"
        public = PublicPart(messages=[ChatMessage(role="user", content="measure")])
        event = Admitted(trajectory=name, task="bench", public=public, private_key=name)
        state = fold(None, event, await self._log.append(event, 0))
        return await self.turn(state, call)

    async def begin_many(self, call: Call, count: int) -> list[Trajectory]:
        """So many of them."""
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one() -> Trajectory:
            async with slots:
                return await self.begin(call)

        return list(await asyncio.gather(*[one() for _ in range(count)]))

    async def turn(self, state: Trajectory, call: Call) -> Trajectory:
        """The trajectory's next turn, which makes the call."""
        event = Turn(trajectory=state.id, tokens=_TOKENS, text="bench", calls=[call])
        return fold(state, event, await self._log.append(event, state.seq))

    async def ask(self, state: Trajectory) -> tuple[Trajectory, Answer]:
        """Let the call go and wait for its result. Raises ToolboxFailed."""
        waiting = self._waiting[state.id] = asyncio.get_running_loop().create_future()
        begun = perf_counter()
        await publish_work(self._bus, RUN, state)
        state = await waiting
        took_s = perf_counter() - begun
        result = state.results[-1]
        return state, Answer(result.text.strip(), took_s, result.duration_ms / 1e3)

    async def listen(self) -> None:
        """Take wake-ups, for ever."""
        while True:
            delivery = await self._queue.take()
            state = delivery.work().state
            assert state is not None, "a measurement's trajectories are short"
            self._waiting.pop(state.id).set_result(state)
            await delivery.done()

    def fail(self, why: str) -> None:
        """Tell all who wait."""
        for waiting in self._waiting.values():
            waiting.set_exception(ToolboxFailed(why))
        self._waiting.clear()

    async def on_dead(self, message: Message) -> None:
        """A call that no toolbox could run."""
        letter = decode(message.data, DeadLetter, message.subject)
        self.fail(f"{letter.boundary}.{letter.code}: {letter.error}")


@asynccontextmanager
async def start_toolbox(
    tools: Sequence[str], *, slots: int = 64, imports: Sequence[str] = ()
) -> AsyncIterator[Generator]:
    """One toolbox replica, warm, for as long as the block runs."""
    recipe = Recipe(
        policy=Policy(model="none"),
        tools=Tools(use=list(tools), timeout_s=60.0),
        toolbox=Toolbox(slots=slots, sessions=_IN_HAND, imports=list(imports)),
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        server = EmbeddedServer(Path(name, "nats"), unrestricted=True)
        server.start()
        try:
            async with connect(server.endpoint, "bench") as bus, open_log(bus, RUN) as log:
                await provision(bus, RUN, recipe.tools.names)
                await log.append_run(Opened(recipe=recipe))
                supervisor = Supervisor(RUN, server.logins, Path(name, "logs"), recipe)
                async with open_queue(bus, "gen", RUN, slots=_IN_HAND) as queue:
                    generator = Generator(bus, log, queue)
                    await bus.subscribe(subjects.dead("tool", RUN), generator.on_dead)
                    async with _kept(supervisor, generator):
                        yield generator
        finally:
            server.stop()


@asynccontextmanager
async def _kept(supervisor: Supervisor, generator: Generator) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(supervisor.keep("toolbox", 1), name="keep the toolbox"),
        asyncio.create_task(generator.listen(), name="listen"),
    ]
    tasks[0].add_done_callback(lambda _: generator.fail("the toolbox cannot be kept alive"))
    try:
        yield
    finally:
        await supervisor.stop()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
