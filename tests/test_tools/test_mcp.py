"""The `mcp` tool against real servers: over standard input and output, and over streamable HTTP."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from actors.sessions import Kept
from bus.embedded import free_port
from schemas.events import Call
from tools.errors import ToolError
from tools.formats import Parsed, open_format
from tools.registry import load_tools, open_tools, resolve_options
from tools.sandbox.sandbox import Limits, Outcome
from tools.sandbox.unsafe import UnsafeSandbox
from tools.tool import Context, Image, Observation, Place, Tool

SERVER = '''
import os, sys, time
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    CallToolResult, EmbeddedResource, ImageContent, ResourceLink, TextResourceContents, ToolAnnotations,
)

server = MCPServer("test")
count = 0

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

@server.tool()
def tick() -> str:
    """Count how often this was called."""
    global count
    count += 1
    return f"{os.getpid()} {count}"

@server.tool()
def fail(why: str) -> str:
    raise ToolError(why)

@server.tool()
def picture() -> list:
    return ["before <image>", Image(data=b"PNG!", format="png"), "after"]

@server.tool()
def odd() -> CallToolResult:
    text = TextResourceContents(uri="file:///a", text="a <image>")
    return CallToolResult(content=[
        EmbeddedResource(type="resource", resource=text),
        ResourceLink(type="resource_link", uri="file:///b", name="<image>"),
        ImageContent(type="image", data="!", mime_type="image/png"),
        ImageContent(type="image", data="UE5HIQ==", mime_type="image/png"),
    ])

@server.tool()
def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "waited"

@server.tool()
def die() -> str:
    os._exit(3)

@server.tool(name="strange name/é")
def strange() -> dict[str, int]:
    return {"x": 1}

@server.tool()
def environment() -> str:
    return " ".join(sorted(os.environ)) + " " + os.environ.get("GIVEN", "") + " " + os.getcwd()

if len(sys.argv) > 1:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run()
'''


async def no_sandbox(code: str, **_: Any) -> Outcome:
    raise AssertionError("mcp runs no code")


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return str(path)


@asynccontextmanager
async def bridge(
    servers: dict[str, Any], folder: str = ".", wall_s: float = 30, **options: Any
) -> AsyncIterator[tuple[Tool, Callable[..., Any]]]:
    """The tool as a run has it: listed first, then opened with what was listed; and a way to call it."""
    given = {"servers": servers, **options}
    place = Place(recipe_dir=folder)
    found = await resolve_options(load_tools(["mcp"], options={"mcp": given}), place)
    (tool,) = load_tools(["mcp"], options={"mcp": given | found["mcp"]}).values()
    context = Context(run=no_sandbox, limits=Limits(wall_s=wall_s), task={})

    async def call(function: str, **arguments: Any) -> Observation:
        return await tool(context, {"function": function, "arguments": arguments})

    async with open_tools([tool], place):
        yield tool, call


def start_http(program: str, port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    process = subprocess.Popen(
        [sys.executable, program, str(port)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            httpx2.get(f"http://127.0.0.1:{port}/mcp", timeout=5)
        except httpx2.TransportError:
            time.sleep(0.1)
        else:
            return process
    process.kill()
    raise AssertionError("the server does not start")


@pytest.fixture
def http(program: str) -> Iterator[tuple[dict[str, Any], list[subprocess.Popen[bytes]]]]:
    """A server over HTTP: its options, and its process, which a test may replace."""
    port = free_port()
    processes = [start_http(program, port)]
    yield {"url": f"http://127.0.0.1:{port}/mcp"}, processes
    for process in processes:
        process.kill()
        process.wait()


async def check_everything(servers: dict[str, Any]) -> None:
    """What holds whatever the transport."""
    async with bridge(servers) as (tool, call):
        names = [function.name for function in tool.functions]
        assert names[:3] == ["s__add", "s__tick", "s__fail"]
        assert "s__strange_name__" in names
        add = tool.functions[0]
        assert add.description == "Add two numbers."
        assert add.parameters["required"] == ["a", "b"]
        assert tool.effects == "external"
        assert await call("s__add", a=2, b=3) == Observation(text="5")
        first, second = [(await call("s__tick")).text.split() for _ in range(2)]
        assert (first[1], second[1]) == ("1", "2")  # the connection is kept
        assert first[0] == second[0]
        seen = await call("s__fail", why="no reason")
        assert not seen.ok
        assert "no reason" in seen.text
        seen = await call("s__add", a="many")
        assert not seen.ok
        assert "b" in seen.text
        seen = await call("s__picture")
        assert seen == Observation(
            text="before [image]\n<image>\nafter",
            images=[Image(data=b"PNG!", media_type="image/png")],
        )
        assert await call("s__odd") == Observation(
            text="a [image]\n[[image]: file:///b]\n[a broken image, image/png]\n<image>",
            images=[Image(data=b"PNG!", media_type="image/png")],
        )
        assert '"x"' in (await call("s__strange_name__")).text
        assert not (await call("s__nothing")).ok
        assert not (await call("add", a=1, b=2)).ok
        many = await asyncio.gather(*(call("s__add", a=n, b=n) for n in range(20)))
        assert [seen.text for seen in many] == [str(2 * n) for n in range(20)]


async def test_over_standard_input_and_output(program: str) -> None:
    """List, call, errors, images, many calls at once."""
    await check_everything({"s": {"command": [sys.executable, program]}})


async def test_over_http(http: Any) -> None:
    """The same."""
    await check_everything({"s": http[0]})


@pytest.mark.slow
async def test_policies_call_each_function_by_its_name(program: str) -> None:
    """Formats show and read them as functions of their own, and name the tool's queue."""
    async with bridge({"s": {"command": [sys.executable, program], "functions": ["add"]}}) as (
        tool,
        _,
    ):
        assert tool.effects == "none"  # it says that it only reads
        hermes = open_format("hermes", {"mcp": tool}, {})
        assert [schema["function"]["name"] for schema in hermes.schemas] == ["s__add"]
        text = '<tool_call>{"name": "s__add", "arguments": {"a": 1, "b": 2}}</tool_call>'
        call = Call(tool="mcp", arguments={"function": "s__add", "arguments": {"a": 1, "b": 2}})
        assert hermes.parse(text) == Parsed(calls=[call])
        assert hermes.parse(hermes.render(call)) == Parsed(calls=[call])
        context = Context(run=no_sandbox, limits=Limits(wall_s=30), task={})
        assert await tool(context, call.arguments) == Observation(text="3")


STATEFUL = """
import os, sys
from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("notes")
notes = {}

@server.tool()
def write(text: str, context: Context) -> str:
    mine = notes.setdefault((context.headers or {}).get("mcp-session-id"), [])
    mine.append(text)
    return f"{os.getpid()} {' '.join(mine)}"

@server.tool()
def die() -> str:
    os._exit(3)

if len(sys.argv) > 1:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run()
"""


@pytest.fixture
def stateful(tmp_path: Path) -> str:
    path = tmp_path / "stateful.py"
    path.write_text(STATEFUL)
    return str(path)


@asynccontextmanager
async def trajectory(tool: Tool) -> AsyncIterator[Callable[..., Any]]:
    """A way to call as one trajectory, whose session is closed in the end."""
    kept = Kept(UnsafeSandbox(), Limits())
    context = Context(run=no_sandbox, limits=Limits(wall_s=30), task={}, keep=kept.keep)

    async def call(function: str, **arguments: Any) -> Observation:
        return await tool(context, {"function": function, "arguments": arguments})

    try:
        yield call
    finally:
        await kept.close()


async def check_state(servers: dict[str, Any]) -> list[int]:
    """Trajectories do not see one another's notes; returns the processes that took them."""
    async with (
        bridge(servers) as (tool, _),
        trajectory(tool) as first,
        trajectory(tool) as second,
    ):
        assert (tool.session, tool.replay) == (True, False)
        (one, *_), (other, *_) = [
            (await call("s__write", text=text)).text.split()
            for call, text in ((first, "a"), (second, "b"))
        ]
        assert (await first("s__write", text="c")).text == f"{one} a c"
        assert (await second("s__write", text="d")).text == f"{other} b d"
        return [int(one), int(other)]


async def test_each_trajectory_has_a_process_of_its_own(stateful: str) -> None:
    """For as long as it lives."""
    one, other = await check_state({"s": {"command": [sys.executable, stateful]}})
    assert one != other
    assert not psutil.pid_exists(one)
    assert not psutil.pid_exists(other)


@pytest.mark.slow
async def test_each_trajectory_has_a_session_of_its_own_over_http(stateful: str) -> None:
    """With the one server that there is."""
    port = free_port()
    process = await asyncio.to_thread(start_http, stateful, port)
    try:
        one, other = await check_state({"s": {"url": f"http://127.0.0.1:{port}/mcp"}})
        assert one == other == process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
async def test_a_lost_connection_is_a_lost_session(stateful: str) -> None:
    """Never a new one in silence: what the policy has written would not be there."""
    async with (
        bridge({"s": {"command": [sys.executable, stateful]}}) as (tool, _),
        trajectory(tool) as call,
    ):
        await call("s__write", text="a")
        for _ in range(2):
            with pytest.raises(ToolError, match="mcp server s"):
                await call("s__die")
        with pytest.raises(ToolError, match="its session with it"):
            await call("s__write", text="b")


@pytest.mark.slow
async def test_which_servers_have_a_connection_for_each_trajectory(
    program: str, stateful: str
) -> None:
    """Those that may keep a state, unless the recipe says otherwise."""
    reads = {"command": [sys.executable, program], "functions": ["add"]}
    writes = {"command": [sys.executable, stateful]}
    for server, own in (
        (reads, False),
        (writes, True),
        (reads | {"connection": "trajectory"}, True),
        (writes | {"connection": "shared"}, False),
    ):
        async with bridge({"s": server}) as (tool, _):
            assert tool.session == own


async def test_a_server_that_dies_is_started_again(program: str) -> None:
    """The call that it died in is lost infrastructure; the next one has a new server."""
    async with bridge({"s": {"command": [sys.executable, program]}}) as (_, call):
        (pid, count) = (await call("s__tick")).text.split()
        with pytest.raises(ToolError, match="mcp server s"):
            await call("s__die")
        (new_pid, count) = (await call("s__tick")).text.split()
        assert new_pid != pid
        assert count == "1"
        os.kill(int(new_pid), signal.SIGKILL)
        with pytest.raises(ToolError, match="mcp server s"):
            await call("s__tick")
        assert (await call("s__tick")).text.split()[1] == "1"


@pytest.mark.slow
async def test_an_http_server_may_restart(http: Any, program: str) -> None:
    """At most one call is lost."""
    options, processes = http
    async with bridge({"s": options}) as (_, call):
        assert (await call("s__tick")).ok
        processes[0].kill()
        processes[0].wait()
        with pytest.raises(ToolError, match="mcp server s"):
            await call("s__tick")
        port = int(options["url"].split(":")[2].split("/")[0])
        processes.append(await asyncio.to_thread(start_http, program, port))
        try:
            seen = await call("s__tick")
        except ToolError:
            seen = await call("s__tick")
        assert seen.ok


@pytest.mark.slow
async def test_a_slow_call_ends(program: str) -> None:
    """At the call's own time; the server goes on serving."""
    async with bridge({"s": {"command": [sys.executable, program]}}, wall_s=5) as (_, call):
        assert await call("s__wait", seconds=60) == Observation(
            text="Timed out after 5 s.", ok=False
        )


@pytest.mark.slow
async def test_a_server_sees_what_it_is_given(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own environment and folder; none of the toolbox's variables."""
    monkeypatch.setenv("SECRET_OF_THE_TOOLBOX", "x")
    monkeypatch.setenv("TO_BE_GIVEN", "a value")
    (tmp_path / "inside").mkdir()
    server = {
        "command": [sys.executable, program],
        "env": {"GIVEN": "env:TO_BE_GIVEN"},
        "folder": "inside",
    }
    async with bridge({"s": server}, folder=str(tmp_path)) as (_, call):
        seen = (await call("s__environment")).text
    assert "SECRET_OF_THE_TOOLBOX" not in seen
    assert seen.endswith(f"a value {tmp_path}/inside")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "says"),
    [
        ({"command": ["no-such-program-anywhere"]}, "mcp server s"),
        ({"command": [sys.executable, "-c", "pass"]}, "mcp server s"),
        ({"command": [sys.executable, "-c", "print('junk')"]}, "mcp server s"),
        ({"url": "http://127.0.0.1:{port}/mcp"}, "mcp server s"),
        ({"command": ["env:NO_SUCH_VARIABLE"]}, "NO_SUCH_VARIABLE is not set"),
        ({"command": ["x"], "url": "http://x/"}, "give a `command` or a `url`"),
        ({}, "give a `command` or a `url`"),
        ({"comand": ["x"]}, "comand"),
    ],
)
async def test_a_server_that_is_not_there_is_said_at_once(
    server: dict[str, Any], says: str
) -> None:
    """When the run begins."""
    if "{port}" in server.get("url", ""):
        server = {"url": server["url"].format(port=free_port())}
    with pytest.raises(ToolError, match=says):
        async with bridge({"s": server}):
            pass


async def test_a_function_that_is_not_offered_is_said_at_once(program: str) -> None:
    server = {"command": [sys.executable, program], "functions": ["add", "subtract"]}
    with pytest.raises(ToolError, match="has no subtract"):
        async with bridge({"s": server}):
            pass
