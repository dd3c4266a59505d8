"""`actors serve`, asked as VerlTool's client asks: real gateways, toolboxes and server, some of which are killed."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from actors.fleet import Fleet
from actors.run_folder import Live
from bus.connection import connect
from bus.embedded import free_port
from schemas.messages import Heartbeat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RUN = "served"
PATIENCE_S = 120.0
RECIPE = """
[tools]
use = ["python", "bash", "sql"]

[gateway]
port = {port}

[replicas]
recorder = 0
"""


class Stack:
    """What `actors serve` has started, and what joined it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        (folder / "tools.toml").write_text(RECIPE.format(port=self.port))
        self.commands: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = subprocess.Popen(
            [sys.executable, "-m", "actors", *arguments],
            env=os.environ | {"ACTORS_RUNS": str(self.folder / "runs"), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.commands.append(command)
        return command

    @property
    def live(self) -> Live:
        return msgspec.json.decode(
            (self.folder / "runs" / RUN / "endpoint.json").read_bytes(), type=Live
        )

    @asynccontextmanager
    async def beats(self) -> AsyncIterator[Callable[..., Awaitable[Heartbeat]]]:
        """`await beat(is_so)`: the first sign of life of which this is so, heard while the block runs."""
        fleet = Fleet()

        async def beat(is_so: Callable[[Heartbeat], bool]) -> Heartbeat:
            while True:
                if found := next(filter(is_so, fleet.alive()), None):
                    return found
                await asyncio.sleep(0.05)

        async with (
            connect(self.live.logins.of("operator"), "test") as bus,
            asyncio.timeout(PATIENCE_S),
        ):
            await fleet.hear(bus, RUN)
            yield beat

    async def ask(self, *actions: tuple[str, str], port: int = 0, **fields: Any) -> dict[str, Any]:
        """One request as VerlTool's client sends it: again after a second where none answers."""
        body = {
            "trajectory_ids": [name for name, _ in actions],
            "actions": [text for _, text in actions],
            "finish": [False] * len(actions),
            "is_last_step": [False] * len(actions),
        } | fields
        url = f"http://127.0.0.1:{port or self.port}/get_observation"
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as client, asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    reply = await client.post(url, json=body)
                    reply.raise_for_status()
                except httpx2.TransportError:
                    await asyncio.sleep(1.0)
                    continue
                found: dict[str, Any] = reply.json()
                return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """It drains in the end, leaves nothing behind, and its log balances."""
    stack = Stack(tmp_path_factory.mktemp("serve"))
    server = stack.start("serve", str(stack.folder / "tools.toml"), "--run", RUN)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"gateway at http://127.0.0.1:(\d+)", line):
                assert int(found[1]) == stack.port
                break
        else:
            raise AssertionError("it ended before a gateway was there")
        yield stack
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=PATIENCE_S)
        assert f"go on with --run {RUN}" in output
        verified = stack.start("verify", "--run", RUN)
        output, _ = verified.communicate(timeout=PATIENCE_S)
        assert verified.returncode == 0, output
        assert "balanced" in output
    finally:
        for command in stack.commands:
            command.kill()
            command.communicate()


async def test_one_action_and_many(stack: Stack) -> None:
    """Each answered in its place: what prints, what raises, what is no call, what is none that is known."""
    found = await stack.ask(("s1", "<python>print(6 * 7)</python>"))
    assert found["observations"] == ["\n<result>\n42\n</result>\n"]
    assert (found["dones"], found["valids"]) == ([False], [True])
    assert found["processing_time_ms"] > 0
    assert found["queue_time_ms"] >= 0
    found = await stack.ask(
        ("b1", "```python\n1 / 0\n```"),
        ("b2", "The answer is 7."),
        ("b3", '<tool_call>{"name": "browse", "arguments": {}}</tool_call>'),
        ("b4", "<python>print(input())</python>"),
        extra_fields=[{}, {}, {}, {"stdin": "hello"}],
    )
    raised, none, unknown, read = found["observations"]
    assert "ZeroDivisionError" in raised
    assert raised.startswith("\n```result\n")
    assert none["invalid_reason"] == "No valid tool found for action"
    assert "There is no function 'browse'" in unknown["obs"]
    assert "hello" in read
    assert found["valids"] == [True, False, False, True]
    assert found["dones"] == [False] * 4


async def test_a_session_of_several_actions(stack: Stack) -> None:
    """What VerlTool's bash cannot: loops over lines, and functions; an action that is repeated is run again."""
    await stack.ask(("shell", "<bash>cd /tmp && export N=3\nf() { echo got $1; }</bash>"))
    found = await stack.ask(
        ("shell", "```bash\nfor i in $(seq $N)\ndo\n  f $i\ndone\npwd\n```"),
    )
    assert found["observations"] == ["\n```output\ngot 1\ngot 2\ngot 3\n/tmp\n```\n"]
    told = [await stack.ask(("shell", "<bash>echo $((N += 1))</bash>")) for _ in range(2)]
    assert [each["observations"][0].split() for each in told] == [["<o>", n, "</o>"] for n in "45"]


async def test_a_database_of_the_trainer_s(stack: Stack) -> None:
    """`db_path` begins at the recipe's folder."""
    with sqlite3.connect(stack.folder / "shop.db") as link:
        link.execute("CREATE TABLE goods AS SELECT 'tea' AS name, 3 AS price")
    link.close()
    fields = {"extra_fields": [{"db_path": "shop.db", "turns_left": 2}]}
    found = await stack.ask(("q", "<sql>SELECT name, price FROM goods</sql>"), **fields)
    (shown,) = found["observations"]
    assert shown["parsed_sql"] == "SELECT name, price FROM goods"
    assert "tea" in shown["obs"]
    assert "You have 2 turns left" in shown["obs"]
    found = await stack.ask(("q", "<solution>SELECT 1</solution>"), **fields)
    assert (found["observations"], found["dones"], found["valids"]) == ([""], [True], [False])


async def test_a_killed_toolbox_is_only_late(stack: Stack) -> None:
    """SIGKILL during a call: the client has its answer, once, in the session that it had."""
    await stack.ask(("k", "<bash>x=1</bash>"))
    async with stack.beats() as beat:
        asked = asyncio.create_task(stack.ask(("k", "<bash>sleep 8; x=$((x + 1)); echo $x</bash>")))
        holder = await beat(lambda beat: beat.role == "toolbox" and bool(beat.held))
        os.kill(holder.pid, signal.SIGKILL)
        found = await asked
    assert found["observations"] == ["\n<o>\n2\n</o>\n"]
    assert (found["dones"], found["valids"]) == ([False], [True])


async def test_a_killed_gateway_is_asked_again(stack: Stack) -> None:
    """It comes back at its port; the call that it had sent is not sent twice."""
    await stack.ask(("g", "<bash>x=1</bash>"))
    async with stack.beats() as beat:
        gateway = await beat(lambda beat: beat.role == "gateway")
        asked = asyncio.create_task(stack.ask(("g", "<bash>sleep 8; x=$((x + 1)); echo $x</bash>")))
        await beat(lambda beat: beat.role == "toolbox" and bool(beat.held))
        os.kill(gateway.pid, signal.SIGKILL)
        assert (await asked)["observations"] == ["\n<o>\n2\n</o>\n"]
    again = await stack.ask(("g", "<bash>echo $x</bash>"))
    assert again["observations"] == ["\n<o>\n2\n</o>\n"]


async def test_another_gateway_goes_on(stack: Stack) -> None:
    """`actors run gateway` takes the next port; a trajectory's actions may come to any."""
    await stack.ask(("two", "<bash>x=5</bash>"))
    joined = stack.start("run", "gateway", "--run", RUN)
    async with stack.beats() as beat:
        other = await beat(
            lambda beat: "at http" in beat.phase and str(stack.port) not in beat.phase
        )
    port = int(other.phase.rpartition(":")[2])
    found = await stack.ask(("two", "<bash>echo $x</bash>"), port=port)
    assert found["observations"] == ["\n<o>\n5\n</o>\n"]
    joined.send_signal(signal.SIGINT)
    await asyncio.to_thread(joined.wait, PATIENCE_S)


async def test_a_trajectory_is_finished(stack: Stack) -> None:
    """As the client does it in the end; its shell is gone then, and what comes next has a new one."""
    await stack.ask(("f", "<bash>x=5</bash>"))
    found = await stack.ask(("f", ""), finish=[True], is_last_step=[True])
    assert (found["observations"], found["dones"], found["valids"]) == ([""], [True], [True])
    found = await stack.ask(("f", "<bash>echo ${x:-none}</bash>"))
    assert found["observations"] == ["\n<o>\nnone\n</o>\n"]


async def test_health_and_figures(stack: Stack) -> None:
    """VerlTool's fields, and Prometheus's text."""
    await stack.ask(("h", "<python>1</python>"))
    async with stack.beats() as beat:
        await beat(lambda beat: beat.role == "toolbox" and not beat.phase)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{stack.port}") as client:
        health = await client.get("/health")
        figures = (await client.get("/metrics")).text
    assert health.status_code == 200
    told = json.loads(health.content)
    assert told["status"] == "healthy"
    assert told["tools"] == ["python", "bash", "sql"]
    assert (told["max_concurrent"], told["concurrent_requests"]) == (1024, 0)
    assert 'gateway_calls_total{tool="python",valid="true"}' in figures
    assert "gateway_in_flight 0.0" in figures


async def test_a_web_page_is_refused(stack: Stack) -> None:
    """A browser says from where it asks, and asks without leave where the content is called plain text."""
    asked = {"trajectory_ids": ["page"], "actions": ["<python>1</python>"]}
    headers = {"Origin": "http://page.example", "Content-Type": "text/plain"}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{stack.port}") as client:
        refused = await client.post("/get_observation", content=json.dumps(asked), headers=headers)
        figures = (await client.get("/metrics")).text
    assert refused.status_code == 403
    assert "Origin" in json.loads(refused.content)["detail"]
    assert 'gateway_refused_total{status="403"} 1.0' in figures


async def test_the_trajectories_can_be_seen(stack: Stack) -> None:
    """`actors show` has the action, its call and its result, under the trainer's name."""
    await stack.ask(("seen", "<python>print(11 * 11)</python>"))
    shown = stack.start("show", "x_seen-0-0", "--run", RUN)
    output, _ = await asyncio.to_thread(shown.communicate, None, PATIENCE_S)
    assert "task seen   external" in output
    assert "121" in output


def test_a_recipe_without_tools_is_refused(tmp_path: Path) -> None:
    """In one line."""
    (tmp_path / "none.toml").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "actors", "serve", "none.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert done.stderr == "actors: recipe: tools.use: no tools to serve: name them\n"
    assert [path.name for path in tmp_path.iterdir()] == ["none.toml"]
