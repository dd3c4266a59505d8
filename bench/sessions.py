"""Sessions between two toolbox replicas: how many are made anew, what a forwarded call costs; and what calls leave.

    python -m bench.sessions [--calls 10000]

Each call goes to either replica by chance, as from a queue. "alone": a replica that has not the session runs the
trajectory's calls again. "routed": it asks the one that has it.
"""

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import structlog
import uvloop

from actors.images import Images
from actors.routing import Routing
from actors.toolbox import Toolbox
from bus.connection import connect
from bus.embedded import EmbeddedServer
from bus.holders import Holders
from bus.log import open_log
from bus.provision import provision
from schemas.events import Admitted, Call, Result, Turn
from schemas.recipe import Policy, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold
from tools.registry import load_tools
from tools.sandbox.ns import NamespaceSandbox

RUN = "bench"
RECIPE = Recipe(policy=Policy(model="m"))
TRAJECTORIES = 40
TURNS = 10
USE = ("python", "python_session", "bash")

Replica = Toolbox | Routing


async def nothing(*_: object) -> list[object]:
    return []


def toolbox(name: str) -> Toolbox:
    images = Images(nothing, nothing)  # type: ignore[arg-type]
    return Toolbox(RECIPE, load_tools(USE), NamespaceSandbox(), images, name)


@asynccontextmanager
async def routed() -> AsyncIterator[list[Routing]]:
    """Two replicas with connections of their own."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        server = EmbeddedServer(Path(folder, "nats"), unrestricted=True)
        server.start()
        stack.callback(server.stop)
        made = []
        for name in ("1", "2"):
            bus = await stack.enter_async_context(connect(server.endpoint, name))
            await provision(bus, RUN, USE)
            log = await stack.enter_async_context(open_log(bus, RUN))
            holders = Holders(bus, RUN, name)
            made.append(Routing(RECIPE, toolbox(name), holders, log.trajectory, name))
            stack.push_async_callback(made[-1].close)
        yield made


class Episode:
    """One trajectory, without log and queues."""

    def __init__(self, name: str, tool: str) -> None:
        self._tool = tool
        first = Admitted(trajectory=name, task="t", public=PublicPart(messages=[]), private_key="")
        self._state: Trajectory = fold(None, first, 1)

    async def call(self, replica: Replica, text: str) -> Result:
        argument = "command" if self._tool == "bash" else "code"
        call = Call(tool=self._tool, arguments={argument: text})
        turn = Turn(trajectory=self._state.id, tokens=Tokens(), text="", calls=[call])
        asked = fold(self._state, turn, self._state.seq + 1)
        result = await replica.handle(asked)
        assert isinstance(result, Result)
        self._state = fold(asked, result, asked.seq + 1)
        return result


class Times(NamedTuple):
    """Of the calls after a trajectory's first, in milliseconds."""

    here: list[float]
    elsewhere: list[float]
    """Where the replica that took the call did not run the one before."""


async def measure(replicas: Sequence[Replica]) -> Times:
    """Every trajectory's calls, one trajectory after another."""
    chance = random.Random(7)
    times = Times([], [])
    for number in range(TRAJECTORIES):
        episode = Episode(f"g{number}-0-0", "python_session")
        ran_by = ""
        for turn in range(TURNS):
            index = chance.randrange(2)
            begun = time.perf_counter()
            result = await episode.call(replicas[index], f"x = {turn}; print(x)")
            took_ms = (time.perf_counter() - begun) * 1e3
            if result.text != f"{turn}\n":
                raise SystemExit(f"{result.text!r} is not {turn}")
            if ran_by:
                (times.here if ran_by == str(index + 1) else times.elsewhere).append(took_ms)
            ran_by = result.replica
    return times


class Traces(NamedTuple):
    """What calls may leave; files of theirs are in mounts."""

    processes: int
    descriptors: int
    mounts: int
    memory_mb: float

    @classmethod
    def now(cls) -> "Traces":
        """Of this process and all that it has started."""
        here = psutil.Process()
        family = [here, *here.children(recursive=True)]
        mounts = [Path(f"/proc/{each.pid}/mountinfo").read_text().count("\n") for each in family]
        return cls(
            len(family),
            sum(each.num_fds() for each in family),
            sum(mounts),
            sum(each.memory_full_info().uss for each in family) / 1e6,
        )


async def leave(calls: int) -> dict[str, list[float]]:
    """Traces after the first calls of all tools and after all."""
    box = toolbox("1")
    found = []
    for number in range(calls):
        episode = Episode(f"g{number}-0-0", USE[number % len(USE)])
        text = "echo 42" if number % len(USE) == USE.index("bash") else "print(6 * 7)"
        if (await episode.call(box, text)).text != "42\n":
            raise SystemExit(f"call {number} went wrong")
        await box.forget(f"g{number}-0-0")
        if number in (min(99, calls // 2), calls - 1):
            found.append(Traces.now())
    await box.close()
    before, after = found
    return {name: [getattr(before, name), getattr(after, name)] for name in Traces._fields}


async def run(calls: int) -> None:
    boxes = [toolbox("1"), toolbox("2")]
    alone = await measure(boxes)
    rebuilt_alone = sum(box.made_anew for box in boxes)
    for box in boxes:
        await box.close()
    async with routed() as replicas:
        times = await measure(replicas)
        rebuilt = sum(replica.toolbox.made_anew for replica in replicas)
    traces = await leave(calls) if calls else {}
    asked = TRAJECTORIES * (TURNS - 1)
    for kind, each, anew in (("alone", alone, rebuilt_alone), ("routed", times, rebuilt)):
        print(
            f"{kind:8} {anew / asked:6.1%} of {asked} calls make their session anew   "
            f"p50 {median(each.here):6.2f} ms here, {median(each.elsewhere):6.2f} ms elsewhere"
        )
    for name, (before, after) in traces.items():
        print(f"{name:12} {before:9.1f} early, {after:9.1f} after {calls} calls")
    figures = {
        "rebuilt_alone": rebuilt_alone / asked,
        "rebuilt_routed": rebuilt / asked,
        "here_p50_ms": median(times.here),
        "forwarded_p50_ms": median(times.elsewhere),
        "alone_elsewhere_p50_ms": median(alone.elsewhere),
    }
    leaks = {f"{name}_left": after - before for name, (before, after) in traces.items()}
    print(json.dumps({name: round(value, 3) for name, value in (figures | leaks).items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=0, help="to look for what they leave")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    uvloop.run(run(parser.parse_args().calls))


if __name__ == "__main__":
    main()
