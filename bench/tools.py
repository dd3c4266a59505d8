"""What running code costs: calls and sessions of the `ns` sandbox, beside `python -c` and another tool server.

Every call prints a sum and is checked. Rates and percentiles are of whole calls, from the caller's code to its output
in hand; processor time is of this process and all its children. The peer is any server with VerlTool's
`POST /get_observation`, which is given the same program.

    python -m bench.tools [--calls N] [--sessions N] [--url http://localhost:5500/get_observation]
"""

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any, NamedTuple

import psutil
import uvloop

from tools.function import FunctionTool
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Session, SessionKind
from tools.tool import Context

CALLERS = (1, 8, 64)
PROGRAM = "print(sum(range(1000)))"
SCRIPT = "s=0; for i in {0..99}; do s=$((s + i)); done; echo $s"
ANSWER, SCRIPT_ANSWER = b"499500\n", b"4950\n"
LIBRARIES = ("numpy", "sympy")

Call = Callable[[int], Awaitable[bytes]]
"""One call of the caller with this number; the output."""


class Measured(NamedTuple):
    """One kind of call with so many callers at once."""

    kind: str
    callers: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Of each call."""


async def measure(kind: str, callers: int, calls: int, call: Call, expected: bytes) -> Measured:
    """So many calls, divided among the callers."""
    times_s: list[float] = []

    async def caller(number: int) -> None:
        for _ in range(max(1, calls // callers)):
            begun = time.perf_counter()
            output = await call(number)
            times_s.append(time.perf_counter() - begun)
            if output != expected:
                raise SystemExit(f"{kind}: {output!r} is not {expected!r}")

    cpu_before_s = cpu_s()
    begun = time.perf_counter()
    await asyncio.gather(*[caller(number) for number in range(callers)])
    took_s = time.perf_counter() - begun
    times_s.sort()
    return Measured(
        kind=kind,
        callers=callers,
        per_s=len(times_s) / took_s,
        p50_ms=median(times_s) * 1e3,
        p99_ms=times_s[int(len(times_s) * 0.99)] * 1e3,
        cpu_ms=(cpu_s() - cpu_before_s) / len(times_s) * 1e3,
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


async def stateless(imports: tuple[str, ...], calls: int) -> list[Measured]:
    sandbox = NamespaceSandbox(imports)
    kind = f"call, {'+'.join(imports)} ready" if imports else "call"

    async def call(_: int) -> bytes:
        return (await sandbox.run(PROGRAM)).output

    try:
        await call(0)
        return [await measure(kind, callers, calls, call, ANSWER) for callers in CALLERS]
    finally:
        await sandbox.close()


async def in_sessions(calls: int) -> list[Measured]:
    sandbox = NamespaceSandbox()
    rows = []
    kinds: dict[SessionKind, tuple[str, bytes]] = {
        "python": (PROGRAM, ANSWER),
        "bash": (SCRIPT, SCRIPT_ANSWER),
    }
    try:
        for kind, (text, expected) in kinds.items():
            for callers in CALLERS:
                sessions: list[Session] = [await sandbox.open_session(kind) for _ in range(callers)]

                async def call(
                    number: int, own: list[Session] = sessions, text: str = text
                ) -> bytes:
                    return (await own[number].run(text)).output

                rows.append(await measure(f"{kind} session", callers, calls * 5, call, expected))
                for session in sessions:
                    await session.close()
    finally:
        await sandbox.close()
    return rows


async def idle_mb(count: int) -> float:
    """Megabytes of each idle Python session; what they share with the server counts once, among all."""
    sandbox = NamespaceSandbox()
    try:
        sessions = [await sandbox.open_session("python") for _ in range(count)]
        for session in sessions:
            await session.run("x = 1")
        own = [await session.memory_bytes() for session in sessions[:: max(1, count // 20)]]
        for session in sessions:
            await session.close()
    finally:
        await sandbox.close()
    return median(own) / 1e6


async def slow_calls(count: int) -> float:
    """Seconds that so many calls take together which sleep for one second each."""
    sandbox = NamespaceSandbox()
    limits = Limits(wall_s=60.0)
    try:
        await sandbox.run("1")
        begun = time.perf_counter()
        code = "import time\ntime.sleep(1)\nprint(1)"
        outcomes = await asyncio.gather(*[sandbox.run(code, limits=limits) for _ in range(count)])
        took_s = time.perf_counter() - begun
    finally:
        await sandbox.close()
    wrong = sum(outcome.output != b"1\n" for outcome in outcomes)
    if wrong:
        raise SystemExit(f"{wrong} of {count} slow calls went wrong")
    return took_s


async def subprocesses(calls: int) -> list[Measured]:
    async def call(_: int) -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
        )
        output, _err = await process.communicate()
        return output

    return [await measure("python -c", callers, calls, call, ANSWER) for callers in CALLERS[:2]]


async def peer(url: str, calls: int) -> list[Measured]:
    def post(number: int) -> bytes:
        body = {
            "trajectory_ids": [f"bench-{number}-{time.monotonic_ns()}"],
            "actions": [f"<python>{PROGRAM}</python>"],
            "extra_fields": [{}],
        }
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            observation: Any = json.load(response)["observations"][0]
        text = observation if isinstance(observation, str) else observation["obs"]
        return ANSWER if ANSWER.decode().strip() in text else text.encode()

    async def call(number: int) -> bytes:
        return await asyncio.to_thread(post, number)

    return [await measure("peer", callers, calls, call, ANSWER) for callers in CALLERS[:2]]


async def no_op(calls: int) -> list[Measured]:
    async def nothing(_: Context, text: str) -> str:
        """Nothing."""
        return text

    tool = FunctionTool(nothing)
    sandbox = NamespaceSandbox()
    context = Context(run=sandbox.run, limits=Limits(), task={})

    async def call(_: int) -> bytes:
        return (await tool(context, {"text": "x"})).text.encode()

    return [await measure("no-op tool", callers, calls * 20, call, b"x") for callers in CALLERS]


async def run(calls: int, sessions: int, slow: int, url: str) -> None:
    rows = await no_op(calls)
    rows += await stateless((), calls)
    rows += await stateless(LIBRARIES, calls)
    rows += await in_sessions(calls)
    rows += await subprocesses(calls // 2)
    rows += await peer(url, calls // 2) if url else []
    for row in rows:
        print(
            f"{row.kind:28} {row.callers:3} callers {row.per_s:9.1f}/s   p50 {row.p50_ms:8.2f} ms   "
            f"p99 {row.p99_ms:8.2f} ms   {row.cpu_ms:7.2f} ms of processor"
        )
    session_mb = await idle_mb(sessions)
    print(f"{sessions} idle python sessions: {session_mb:.1f} MB each")
    slow_s = await slow_calls(slow)
    print(f"{slow} calls that sleep 1 s, all at once: {slow_s:.1f} s")
    found = {(row.kind, row.callers): row for row in rows}
    one, ready, cell = (
        found["call", 1],
        found["call, numpy+sympy ready", 1],
        found["python session", 1],
    )
    bare, other = found["python -c", 1], found.get(("peer", 1))
    figures: dict[str, Any] = {
        "python_p50_ms": one.p50_ms,
        "python_calls_per_s": max(found["call", callers].per_s for callers in CALLERS),
        "python_cpu_ms": one.cpu_ms,
        "python_libraries_p50_ms": ready.p50_ms,
        "python_libraries_cpu_ms": ready.cpu_ms,
        "session_cell_p50_ms": cell.p50_ms,
        "bash_cell_p50_ms": found["bash session", 1].p50_ms,
        "session_idle_mb": session_mb,
        "slow_calls_s": slow_s,
        "noop_calls_per_s": found["no-op tool", 1].per_s,
        "subprocess_p50_ms": bare.p50_ms,
        "subprocess_cpu_ms": bare.cpu_ms,
        "peer_python_p50_ms": other.p50_ms if other else None,
        "peer_python_calls_per_s": found["peer", 8].per_s if other else None,
    }
    print(
        json.dumps({name: round(value, 3) if value else value for name, value in figures.items()})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--sessions", type=int, default=100, help="idle ones, for their memory")
    parser.add_argument("--slow", type=int, default=200, help="calls at once that sleep for 1 s")
    parser.add_argument("--url", default="", help="of a peer's /get_observation")
    given = parser.parse_args()
    uvloop.run(run(given.calls, given.sessions, given.slow, given.url))


if __name__ == "__main__":
    main()
