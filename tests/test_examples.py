"""The examples for analytics: run as their users run them, against a real server with a recorded run in it."""

import ast
import asyncio
import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import nkeys
import pytest

from actors import run_folder
from actors.run_folder import RunFolder
from bus import subjects
from bus.connection import Bus, Message
from bus.embedded import EmbeddedServer
from bus.log import Log
from schemas.events import (
    Admitted,
    AnyTrajectoryEvent,
    Call,
    Ended,
    Evaluated,
    Opened,
    Result,
    Scored,
    Turn,
)
from schemas.recipe import Policy, Recipe
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = "test"
RESULTS = 100
"""Of a megabyte each; the server keeps 64 MB for a subscriber that does not read."""
REWARDS = (0.25, 1.0, 0.5, 0.0)


def life(name: str, reward: float | None) -> list[AnyTrajectoryEvent]:
    """With one tool call; an evaluation has no reward here."""
    public = PublicPart(messages=[ChatMessage(role="user", content="What is 47 * 86?")])
    call = Call(tool="python", arguments={"code": "47*86"})
    sampled = Tokens.sampled([3, 4], [-0.5, -0.25], [7, 8])
    end = (
        Scored(trajectory=name, reward=reward)
        if reward is not None
        else Evaluated(trajectory=name, reward=1.0)
    )
    return [
        Admitted(trajectory=name, task="47x86", public=public, private_key="g", seed=2**62),
        Turn(trajectory=name, tokens=sampled, text="<python>47*86</python>", calls=[call]),
        Result(trajectory=name, turn=0, call=0, text="4042"),
        Turn(trajectory=name, tokens=sampled, text="4042", last=True),
        end,
    ]


async def follow(log: Log, events: list[AnyTrajectoryEvent], after: int = 0) -> int:
    """Append by the commit rule; returns the last sequence."""
    for event in events:
        after = await log.append(event, after)
    return after


@pytest.fixture
async def run(
    log: Log, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a live run with four scored trajectories and one evaluated."""
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    folder = RunFolder(RUN)
    folder.path.mkdir()
    folder.write_endpoint(server.logins)
    await log.append_run(Opened(recipe=Recipe(policy=Policy(model="m"))))
    for number, reward in enumerate((*REWARDS, None)):
        await follow(log, life(f"g{number}-0-0", reward))
    return folder.path


def totals(output: str) -> tuple[int, int, float]:
    """Scored, tool calls, and the sum of rewards, over all minutes: a test may run into the next one."""
    scored, calls, reward = 0, 0, 0.0
    for line in output.splitlines():
        _, _, mean, _, count, called, *rest = line.split()
        assert rest == ["tool", "calls"]
        scored += int(count)
        calls += int(called)
        reward += 0.0 if mean == "-" else float(mean) * int(count)
    return scored, calls, reward


async def watch(log: Log, *command: str) -> str:
    """What an example prints, that is started in the middle of a run and sees its end."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        await follow(log, life("g9-0-0", 0.75))
        await log.append_run(Ended(reason="all steps done"))
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


EXPECTED = (len(REWARDS) + 1, len(REWARDS) + 2, pytest.approx(sum(REWARDS) + 0.75, abs=0.01))


async def test_analytics_in_python(run: Path, log: Log) -> None:
    """From the run's start to its end; evaluations are not among its rewards."""
    output = await watch(log, sys.executable, str(EXAMPLES / "analytics.py"), str(run))
    assert totals(output) == EXPECTED


async def test_analytics_in_javascript(
    run: Path, log: Log, tmp_path: Path, npm_install: Callable[[Path], None]
) -> None:
    """The same lines, with packages of npm at the versions that package.json names."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: examples/analytics.mjs is not tested")
    folder = tmp_path / "javascript"
    folder.mkdir()
    for name in ("analytics.mjs", "package.json"):
        shutil.copy(EXAMPLES / name, folder)
    await asyncio.to_thread(npm_install, folder)
    script = str(folder / "analytics.mjs")
    output = await watch(log, "node", script, str(run))
    assert totals(output) == EXPECTED
    assert output == await watch_again(run)


async def watch_again(run: Path) -> str:
    """What the example in Python prints of a run that has ended."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(EXAMPLES / "analytics.py"), str(run)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_need_nothing_of_ours() -> None:
    """They are for people who have only the server's address."""
    tree = ast.parse((EXAMPLES / "analytics.py").read_text())
    modules = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert modules - sys.stdlib_module_names == {"msgpack", "nats"}
    packages = json.loads((EXAMPLES / "package.json").read_text())["dependencies"]
    assert set(packages) == {"@msgpack/msgpack", "@nats-io/transport-node"}


# -- one that is too slow --------------------------------------------------------------------------


def never_reading(server: EmbeddedServer) -> socket.socket:
    """A subscriber to everything that reads nothing."""
    where = urlsplit(server.endpoint.url)
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect((where.hostname, where.port))
    nonce = json.loads(link.recv(4096).split(b" ", 1)[1])["nonce"].encode()
    key = nkeys.from_seed(bytearray(server.logins.of("analytics").seed.encode()))
    options = {
        "nkey": key.public_key.decode(),
        "sig": base64.b64encode(key.sign(nonce)).decode(),
        "verbose": False,
        "pedantic": False,
        "name": "slow analytics",
    }
    link.sendall(f"CONNECT {json.dumps(options)}\r\nSUB log.{RUN}.> 1\r\nPING\r\n".encode())
    return link


async def test_a_subscriber_that_never_reads_slows_nobody(
    bus: Bus, log: Log, server: EmbeddedServer, tmp_path: Path
) -> None:
    """The server cuts it off; every event is stored, and reaches the others, as if it were not there."""
    heard = 0

    async def hear(_: Message) -> None:
        nonlocal heard
        heard += 1

    await bus.subscribe(subjects.trajectory(RUN, "*", "result"), hear)
    with never_reading(server) as link:
        after = await follow(log, life("g0-0-0", None)[:2])
        for call in range(RESULTS):
            result = Result(trajectory="g0-0-0", turn=0, call=call, text="x" * (1 << 20))
            after = await log.append(result, after)
        cut_off = asyncio.create_task(asyncio.to_thread(read_to_the_end, link))
        async with asyncio.timeout(60):
            assert await cut_off < RESULTS << 20
    assert "Slow Consumer Detected" in (tmp_path / "nats" / "nats.log").read_text()
    state = await log.trajectory("g0-0-0")
    assert state is not None
    assert len(state.results) == heard == RESULTS


def read_to_the_end(link: socket.socket) -> int:
    """How many bytes there were until the server closed it."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while data := link.recv(1 << 20):
            count += len(data)
    return count
