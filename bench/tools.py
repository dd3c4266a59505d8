"""What running code costs, end to end over the bus, beside `python -c` and another tool server.

Calls are those of bench/toolbox.py: a real nats-server and a real toolbox process. Every call's answer is checked.
Processor time is of all processes, this one included. The peer is any server with VerlTool's `POST /get_observation`;
it is given the same program.

    python -m bench.tools [--calls N] [--sessions N] [--slow N] [--url http://localhost:5500/get_observation]
"""

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import psutil
import uvloop

from bench.toolbox import Answer, Generator, start_toolbox
from schemas.events import Call
from tools.sandbox import watch
from tools.tool import Context

CALLERS = (1, 8, 64)
PROGRAM = "print(sum(range(1000)))"
SCRIPT = "s=0; for i in {0..99}; do s=$((s + i)); done; echo $s"
ANSWER, SCRIPT_ANSWER = "499500", "4950"
LIBRARIES = ("numpy", "sympy")
_MOST_CELLS = 50
"""Of one session: the state of its trajectory travels with each call."""

Ask = Callable[[int], Awaitable[Answer]]
"""One call of the caller with this number."""


async def nothing(_: Context, text: str) -> str:
    """A tool that does nothing: what is left is the way there and back."""
    return text


NOTHING = Call(tool="nothing", arguments={"text": "x"})


class Measured(NamedTuple):
    """One kind of call with so many callers at once."""

    kind: str
    callers: int
    per_s: float
    p50_ms: float
    p99_ms: float
    overhead_ms: float
    """Median of what is not the tool's own work."""
    cpu_ms: float
    """Of each call."""


async def measure(kind: str, callers: int, calls: int, ask: Ask, expected: str) -> Measured:
    """So many calls, divided among the callers."""
    answers: list[Answer] = []

    async def caller(number: int) -> None:
        for _ in range(max(1, calls // callers)):
            answer = await ask(number)
            answers.append(answer)
            if answer.text != expected:
                raise SystemExit(f"{kind}: {answer.text!r} is not {expected!r}")

    cpu_before_s = cpu_s()
    begun = time.perf_counter()
    await asyncio.gather(*[caller(number) for number in range(callers)])
    took_s = time.perf_counter() - begun
    cpu_ms = (cpu_s() - cpu_before_s) / len(answers) * 1e3
    times_s = sorted(answer.took_s for answer in answers)
    return Measured(
        kind=kind,
        callers=callers,
        per_s=len(answers) / took_s,
        p50_ms=median(times_s) * 1e3,
        p99_ms=times_s[int(len(times_s) * 0.99)] * 1e3,
        overhead_ms=median(answer.took_s - answer.tool_s for answer in answers) * 1e3,
        cpu_ms=cpu_ms,
    )


def cpu_s() -> float:
    """Of this process and what it has started, with what that has waited for."""
    here = psutil.Process()
    total = sum(here.cpu_times()[:4])
    for child in here.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.Error:  # it has just ended; its parent has its time
            continue
    return float(total)


# -- ours ------------------------------------------------------------------------------------------


async def stateless(
    kind: str, generator: Generator, call: Call, calls: int, expected: str
) -> list[Measured]:
    """Each call in a trajectory of its own, written down before the clock starts."""
    rows = []
    for callers in CALLERS:
        states = await generator.begin_many(call, max(calls, callers))

        async def ask(_: int, states: list[Any] = states) -> Answer:
            return (await generator.ask(states.pop()))[1]

        rows.append(await measure(kind, callers, len(states), ask, expected))
    return rows


async def in_sessions(
    kind: str, generator: Generator, call: Call, calls: int, expected: str
) -> list[Measured]:
    """Each caller in a session of its own that is open already; a turn is written down between two calls."""
    rows = []
    for callers in CALLERS:
        states = await generator.begin_many(call, callers)
        for number, state in enumerate(states):
            states[number], _ = await generator.ask(state)

        async def ask(number: int, states: list[Any] = states) -> Answer:
            state = await generator.turn(states[number], call)
            states[number], answer = await generator.ask(state)
            return answer

        cells = min(calls, _MOST_CELLS * callers)
        rows.append(await measure(kind, callers, cells, ask, expected))
    return rows


async def idle_mb(count: int) -> float:
    """Megabytes that each idle Python session adds to all processes; memory that n share counts 1/n."""
    async with start_toolbox(["python_session"]) as generator:
        call = Call(tool="python_session", arguments={"code": "x = 1"})
        (first,) = await generator.begin_many(call, 1)
        await generator.ask(first)
        before = memory_bytes()
        states = await generator.begin_many(call, count)
        slots = asyncio.Semaphore(CALLERS[-1])

        async def open_one(state: Any) -> None:
            async with slots:
                await generator.ask(state)

        await asyncio.gather(*map(open_one, states))
        return (memory_bytes() - before) / count / 1e6


def memory_bytes() -> int:
    """Of all that this process has started."""
    children = psutil.Process().children(recursive=True)
    return watch.proportional_bytes([child.pid for child in children])


async def slow_calls(count: int) -> float:
    """Seconds that so many calls take together which sleep for one second each."""
    async with start_toolbox(["python"], slots=count) as generator:
        code = "import time\ntime.sleep(1)\nprint(1)"
        call = Call(tool="python", arguments={"code": code})
        first, *states = await generator.begin_many(call, count + 1)
        await generator.ask(first)
        begun = time.perf_counter()
        answers = await asyncio.gather(*map(generator.ask, states))
        took_s = time.perf_counter() - begun
    wrong = sum(answer.text != "1" for _, answer in answers)
    if wrong:
        raise SystemExit(f"{wrong} of {count} slow calls went wrong")
    return took_s


async def ours(calls: int) -> list[Measured]:
    """Every kind of call."""
    python = Call(tool="python", arguments={"code": PROGRAM})
    cell = Call(tool="python_session", arguments={"code": PROGRAM})
    script = Call(tool="bash", arguments={"command": SCRIPT})
    tools = ["bench.tools:nothing", "python", "python_session", "bash"]
    async with start_toolbox(tools) as generator:
        for warm_up in (NOTHING, python):
            await generator.ask(await generator.begin(warm_up))
        rows = await stateless("no-op", generator, NOTHING, calls * 4, "x")
        rows += await stateless("python", generator, python, calls, ANSWER)
        rows += await in_sessions("python session", generator, cell, calls, ANSWER)
        rows += await in_sessions("bash session", generator, script, calls, SCRIPT_ANSWER)
    async with start_toolbox(["python"], imports=LIBRARIES) as generator:
        await generator.ask(await generator.begin(python))
        kind = f"python, {'+'.join(LIBRARIES)} ready"
        rows += await stateless(kind, generator, python, calls, ANSWER)
    return rows


# -- peers -----------------------------------------------------------------------------------------


async def subprocesses(calls: int) -> list[Measured]:
    """A plain interpreter for each call, without any isolation."""

    async def ask(_: int) -> Answer:
        begun = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
        )
        output, _err = await process.communicate()
        return Answer(output.decode().strip(), time.perf_counter() - begun, 0.0)

    return [await measure("python -c", callers, calls, ask, ANSWER) for callers in CALLERS]


async def peer(url: str, calls: int) -> list[Measured]:
    """Another tool server, one call a request."""

    def post() -> Answer:
        body = {
            "trajectory_ids": [f"bench-{time.monotonic_ns()}"],
            "actions": [f"<python>{PROGRAM}</python>"],
            "extra_fields": [{}],
        }
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        begun = time.perf_counter()
        with urllib.request.urlopen(request, timeout=60) as response:
            observation: Any = json.load(response)["observations"][0]
        took_s = time.perf_counter() - begun
        text = observation if isinstance(observation, str) else observation["obs"]
        return Answer(ANSWER if ANSWER in text else text, took_s, 0.0)

    async def ask(_: int) -> Answer:
        return await asyncio.to_thread(post)

    return [await measure("peer", callers, calls, ask, ANSWER) for callers in CALLERS]


# -- the whole -------------------------------------------------------------------------------------


async def run(calls: int, sessions: int, slow: int, url: str) -> None:
    """Measure everything, one after another, and print it."""
    threads = ThreadPoolExecutor(CALLERS[-1])  # the peer's callers
    asyncio.get_running_loop().set_default_executor(threads)
    rows = await ours(calls)
    rows += await subprocesses(calls)
    rows += await peer(url, calls) if url else []
    for row in rows:
        print(
            f"{row.kind:26} {row.callers:3} callers {row.per_s:8.1f}/s   p50 {row.p50_ms:8.2f} ms   "
            f"p99 {row.p99_ms:8.2f} ms   not the tool {row.overhead_ms:7.2f} ms   "
            f"processors {row.cpu_ms:6.2f} ms"
        )
    session_mb = await idle_mb(sessions)
    print(f"{sessions} idle python sessions: {session_mb:.2f} MB each")
    slow_s = await slow_calls(slow)
    print(f"{slow} calls that sleep 1 s, all at once: {slow_s:.1f} s")
    print(json.dumps(figures(rows) | {"session_idle_mb": session_mb, "slow_calls_s": slow_s}))


def figures(rows: list[Measured]) -> dict[str, Any]:
    """What is compared; of the peer's, None when there is none."""
    found = {(row.kind, row.callers): row for row in rows}

    def p50_ms(kind: str) -> float | None:
        row = found.get((kind, 1))
        return row and round(row.p50_ms, 3)

    def per_s(kind: str) -> float | None:
        rates = [row.per_s for (of, _), row in found.items() if of == kind]
        return round(max(rates), 1) if rates else None

    libraries = f"python, {'+'.join(LIBRARIES)} ready"
    return {
        "python_p50_ms": p50_ms("python"),
        "python_calls_per_s": per_s("python"),
        "python_cpu_ms": round(min(row.cpu_ms for row in rows if row.kind == "python"), 2),
        "python_libraries_p50_ms": p50_ms(libraries),
        "python_libraries_calls_per_s": per_s(libraries),
        "session_cell_p50_ms": p50_ms("python session"),
        "bash_cell_p50_ms": p50_ms("bash session"),
        "noop_p50_ms": p50_ms("no-op"),
        "noop_calls_per_s": per_s("no-op"),
        "subprocess_p50_ms": p50_ms("python -c"),
        "subprocess_calls_per_s": per_s("python -c"),
        "peer_python_p50_ms": p50_ms("peer"),
        "peer_python_calls_per_s": per_s("peer"),
    }


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=320, help="of each kind")
    parser.add_argument("--sessions", type=int, default=1000, help="idle ones, for their memory")
    parser.add_argument("--slow", type=int, default=2000, help="calls at once that sleep for 1 s")
    parser.add_argument("--url", default="", help="of a peer's /get_observation")
    given = parser.parse_args()
    uvloop.run(run(given.calls, given.sessions, given.slow, given.url))


if __name__ == "__main__":
    main()
