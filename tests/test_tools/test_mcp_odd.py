"""The `mcp` tool and servers that do what the protocol allows, and what it does not."""

import asyncio
import json
import sys
from typing import Any

import pytest

from schemas.events import Call
from tests.test_tools.odd_server import DONE, TOOL, Asked, Does, Server, calling, listed, serving
from tools.errors import ToolError
from tools.formats import open_format
from tools.mcp_transports import MAX_ANSWER_BYTES
from tools.tool import Image, Observation

# -- what a call may be answered with --------------------------------------------------------------------


def request(number: int, method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def notice(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


async def test_what_comes_before_an_answer_is_not_the_answer() -> None:
    """Progress, logs, changed lists, comments, and requests to us, which are refused so that the server can go on."""
    message = {"role": "user", "content": {"type": "text", "text": "?"}}

    async def call(asked: Asked) -> None:
        await asked.stream(
            ": a comment\n\n",
            notice("notifications/progress", progressToken=1, progress=0.5),
            notice("notifications/message", level="error", data={"a": [1]}),
            notice("notifications/tools/list_changed"),
            notice("notifications/nobody/knows"),
            request(91, "sampling/createMessage", messages=[message], maxTokens=5),
            request(92, "elicitation/create", message="who?", requestedSchema={"type": "object"}),
            request(93, "roots/list"),
            request(94, "nobody/knows"),
            asked.result(DONE),
        )

    server = Server(call)
    async with serving(server) as options, calling({"s": options}) as do:
        assert await do() == Observation(text="done")
        assert await do() == Observation(text="done")
    refused = {asked.message["id"] for asked in server.asked if "error" in asked.message}
    assert refused == {91, 92, 93, 94}


CONTENTS: list[tuple[dict[str, Any], Observation]] = [
    ({"content": []}, Observation(text="(no result)")),
    (
        {"content": [], "structuredContent": {"a": "<image>", "b": [1]}},
        Observation(text='{"a":"[image]","b":[1]}'),
    ),
    (
        {**DONE, "structuredContent": {"a": 1}, "isError": True},
        Observation(text="done", ok=False),
    ),
    (
        {"content": [{"type": "audio", "data": "AA==", "mimeType": "audio/wav"}]},
        Observation(text="[audio, audio/wav]"),
    ),
    (
        {
            "content": [
                {"type": "resource_link", "uri": "x://y", "name": "n"},
                {"type": "resource", "resource": {"uri": "x://t", "text": "inside"}},
                {"type": "resource", "resource": {"uri": "x://b", "blob": "AA=="}},
            ]
        },
        Observation(text="[n: x://y]\ninside\n[x://b, bytes]"),
    ),
    (
        {
            "content": [
                {"type": "image", "data": "é", "mimeType": "image/png"},
                {"type": "image", "data": "AA=", "mimeType": "image/png"},
                {"type": "image", "data": "UE5H", "mimeType": "image/png"},
            ]
        },
        Observation(
            text="[a broken image, image/png]\n[a broken image, image/png]\n<image>",
            images=[Image(data=b"PNG", media_type="image/png")],
        ),
    ),
]


async def test_every_kind_of_content() -> None:
    """As JSON and as events."""
    results = iter([result for result, _ in CONTENTS for _ in range(2)])
    as_events = iter([False, True] * len(CONTENTS))

    async def call(asked: Asked) -> None:
        result = next(results)
        if next(as_events):
            await asked.stream(asked.result(result))
        else:
            await asked.say(result=result)

    async with serving(Server(call)) as options, calling({"s": options}) as do:
        for _, seen in CONTENTS:
            assert [await do(), await do()] == [seen, seen]


@pytest.mark.parametrize("code", [-32602, -32603, 0, 7])
async def test_what_the_server_says_of_a_call_is_seen(code: int) -> None:
    """Its errors about arguments, and what it threw; also with a status that goes with it."""
    statuses = iter(["200 OK", "400 Bad Request"])

    async def call(asked: Asked) -> None:
        await asked.say(next(statuses), error={"code": code, "message": "no such file"})

    async with serving(Server(call)) as options, calling({"s": options}) as do:
        assert await do() == Observation(text="Error: no such file", ok=False)
        if code == -32602:
            assert await do() == Observation(text="Error: no such file", ok=False)


# -- what is nobody's answer -----------------------------------------------------------------------------


def answers(status: str, body: bytes = b"", **headers: str) -> Does:
    async def call(asked: Asked) -> None:
        await asked.answer(status, body, **headers)

    return call


def says(status: str, code: int, message: str) -> Does:
    async def call(asked: Asked) -> None:
        await asked.say(status, error={"code": code, "message": message})

    return call


def streams(*events: dict[str, Any] | str) -> Does:
    async def call(asked: Asked) -> None:
        await asked.stream(*events)

    return call


def gives(result: dict[str, Any]) -> Does:
    async def call(asked: Asked) -> None:
        await asked.say(result=result)

    return call


JSON = {"content_type": "application/json"}
BROKEN: dict[str, tuple[Does, str]] = {
    "500": (answers("500 Internal Server Error"), "HTTP 500 Internal Server Error"),
    "502": (answers("502 Bad Gateway", b"<html>", content_type="text/html"), "HTTP 502"),
    "500 in JSON": (says("500 Oh", -32603, "disk full"), "HTTP 500 Oh: disk full"),
    "401": (answers("401 Unauthorized"), "HTTP 401"),
    "429": (answers("429 Too Many Requests", b"slow down"), "HTTP 429"),
    "404": (answers("404 Not Found"), "HTTP 404"),
    "404 in JSON": (says("404 Not Found", -32001, "Session not found"), "Session not found"),
    "400 in JSON": (says("400 Bad Request", -32000, "No valid session"), "No valid session"),
    "not a time-out": (says("200 OK", -32001, "Session not found"), "Session not found"),
    "unknown method": (says("200 OK", -32601, "Method not found"), "Method not found"),
    "elsewhere": (answers("302 Found", location="/other"), "Redirect to"),
    "another host": (answers("307 Moved", location="http://127.0.0.2:1/"), "Redirect to"),
    "accepted": (answers("202 Accepted"), "202 Accepted"),
    "a page": (answers("200 OK", b"<html>", content_type="text/html"), "text/html"),
    "no JSON": (answers("200 OK", b"{", **JSON), "parse"),
    "half a character": (answers("200 OK", b'"\xc3"', **JSON), "parse"),
    "compressed": (answers("200 OK", b"x", content_encoding="gzip", **JSON), "compressed"),
    "cut": (answers("200 OK", b"{", **JSON | {"content_length": "9"}), "RemoteProtocolError"),
    "no HTTP": (answers("what?"), "mcp server s"),
    "no event": (streams(), "without a response"),
    "junk events": (streams("data: junk\n\n"), "parse"),
    "another shape": (gives({"content": "text"}), "content"),
    "too large": (gives({"content": [], "x": "x" * MAX_ANSWER_BYTES}), "more than 24 MB"),
    "too large an event": (streams("data: " + "x" * MAX_ANSWER_BYTES + "\n\n"), "more than 24 MB"),
    "too many events": (streams(*[": " + "x" * (1 << 20) + "\n"] * 25), "more than 24 MB"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_servers_failure_is_no_observation(name: str) -> None:
    """It has the server's name, and what it was."""
    broken, says_so = BROKEN[name]
    async with serving(Server(broken)) as options, calling({"s": options}) as do:
        with pytest.raises(ToolError, match="mcp server s: ") as raised:
            await do()
    assert says_so in raised.value.detail


async def test_a_failure_is_of_one_call() -> None:
    """Others that wait for the same server over the same connection get their answers."""
    both = asyncio.Event()

    async def call(asked: Asked) -> None:
        if asked.message["params"]["arguments"]["number"] == 1:
            both.set()
            await asked.answer("200 OK", b"{", **JSON | {"content_length": "9"})
        else:
            await both.wait()
            await asked.say(result=DONE)

    async with (
        serving(Server(call)) as options,
        calling({"s": options | {"connection": "shared"}}) as do,
    ):
        broken, whole = await asyncio.gather(do(number=1), do(number=2), return_exceptions=True)
    assert isinstance(broken, ToolError)
    assert whole == Observation(text="done")


READS = {"readOnlyHint": True}


async def test_a_session_that_the_server_forgot_is_made_anew_where_nobody_had_one() -> None:
    """Shared: at once, and the call with it, which the server has not run. A trajectory's own: it has failed."""
    forgotten = {"s2"}  # the first one is the listing's

    async def call(asked: Asked) -> None:
        if asked.headers["mcp-session-id"] in forgotten:
            await asked.say("404 Not Found", error={"code": -32001, "message": "Session not found"})
        else:
            await asked.say(result=DONE)

    async def tools_list(asked: Asked) -> None:
        await asked.say(result={"tools": [TOOL | {"annotations": READS}]})

    server = Server(call, tools_list=tools_list)
    async with serving(server) as options:
        async with calling({"s": options}) as do:
            assert await do() == Observation(text="done")
        assert server.sessions == 3
        forgotten.add("s5")
        async with calling({"s": options | {"connection": "trajectory"}}) as do:
            for said in ("Session not found", "its session with it"):
                with pytest.raises(ToolError, match=said):
                    await do()


@pytest.mark.slow
async def test_nothing_waits_for_ever() -> None:
    """A slow first byte is waited for; what never comes ends with the call's time, and so does a farewell."""
    patience, over = asyncio.Event(), asyncio.Event()

    async def call(asked: Asked) -> None:
        way = asked.message["params"]["arguments"]["way"]
        if way == "slow":
            patience.set()
            await asyncio.sleep(0.2)
            await asked.say(result=DONE)
            return
        if way == "events":
            asked.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: \n\n")
        await over.wait()

    async def leave(asked: Asked) -> None:
        del asked
        await over.wait()

    server = Server(call, DELETE=leave)
    async with serving(server) as options:
        try:
            async with asyncio.timeout(60), calling({"s": options}, wall_s=2) as do:
                assert await do(way="slow") == Observation(text="done")
                for way in ("nothing", "events"):
                    seen = await do(way=way)
                    assert seen == Observation(text="Timed out after 2 s.", ok=False)
        finally:
            over.set()
    assert "DELETE" in {asked.verb for asked in server.asked}


# -- what a server may offer -----------------------------------------------------------------------------

SCHEMAS: dict[str, dict[str, Any]] = {
    "plain.name": {"type": "object"},
    "plain_name": {"type": "object", "properties": {"any": True, "none": False}},
    "搜索": {
        "type": "object",
        "properties": {"where": {"$ref": "#/$defs/place"}},
        "$defs": {"place": {"anyOf": [{"type": "string"}, {"type": ["integer", "null"]}]}},
    },
    "翻译": {"type": "object", "properties": {}, "additionalProperties": False},
    "long" * 40: {"type": "object"},
    "long" * 41: {"type": "object"},
}


async def test_whatever_is_offered_can_be_called() -> None:
    """In pages; by names with other letters, or too long; under odd schemas; the same function of two servers."""

    async def tools_list(asked: Asked) -> None:
        at = int(asked.message.get("params", {}).get("cursor", 0))
        name = list(SCHEMAS)[at]
        more = {"nextCursor": str(at + 1)} if at + 1 < len(SCHEMAS) else {}
        await asked.say(result={"tools": [{"name": name, "inputSchema": SCHEMAS[name]}], **more})

    async def call(asked: Asked) -> None:
        text = json.dumps(asked.message["params"], ensure_ascii=False)
        await asked.say(result={"content": [{"type": "text", "text": text}]})

    async with serving(Server(call, tools_list=tools_list)) as options:
        servers = {"s": options, "t": options}
        names = [function.name for function in (await listed(servers)).functions]
        assert names[:4] == ["s__plain_name", "s__plain_name_2", "s____", "s_____2"]
        assert len(set(names)) == len(names) == 2 * len(SCHEMAS)
        assert all(name.isascii() and len(name) <= 64 for name in names)
        async with calling(servers) as do:
            for function, name in zip(names, [*SCHEMAS, *SCHEMAS], strict=True):
                told = json.loads((await do(function, any="é")).text)
                assert (told["name"], told["arguments"]) == (name, {"any": "é"})


async def test_formats_read_calls_under_odd_schemas() -> None:
    """No schema that a server may have breaks the policy's turn."""
    tools = [{"name": name, "inputSchema": schema} for name, schema in SCHEMAS.items()]

    async def tools_list(asked: Asked) -> None:
        await asked.say(result={"tools": tools})

    async with serving(Server(gives(DONE), tools_list=tools_list)) as options:
        mcp = await listed({"s": options})
    for name in ("hermes", "tagged", "llama", "json"):
        written = open_format(name, {"mcp": mcp}, {})
        for function in mcp.functions:
            call = Call(tool="mcp", arguments={"function": function.name, "arguments": {"any": 1}})
            assert written.parse(written.render(call)).calls == [call]


@pytest.mark.parametrize(
    ("method", "does", "says_so"),
    [
        ("tools_list", answers("500 Oh"), "HTTP 500"),
        ("tools_list", gives({"tools": [TOOL], "nextCursor": "again"}), "pages of tools"),
        ("tools_list", gives({"tools": [{"name": "do"}]}), "inputSchema"),
        ("initialize", answers("502 Bad Gateway"), "HTTP 502"),
        (
            "initialize",
            gives({"protocolVersion": "1999-01-01", "capabilities": {}, "serverInfo": {}}),
            "mcp server s",
        ),
    ],
)
async def test_what_cannot_be_listed_ends_the_run_at_its_beginning(
    method: str, does: Does, says_so: str
) -> None:
    async with serving(Server(gives(DONE), **{method: does})) as options:
        with pytest.raises(ToolError, match=says_so):
            await listed({"s": options})


# -- over pipes ------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
print("a greeting that is no message", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    said = {"error": {"code": -32601, "message": "no such method"}}
    if asked["method"] == "initialize":
        server = {"name": "odd", "version": "1"}
        said = {"result": {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": server}}
    elif asked["method"] == "tools/list":
        said = {"result": {"tools": [{"name": "do", "inputSchema": {"type": "object"}}]}}
        if sys.argv[1] == "dies after listing":
            sys.argv[1] = "dead"
    elif asked["method"] == "tools/call":
        if sys.argv[1] == "deaf":
            import time
            time.sleep(600)
        text = {"type": "text", "text": "é" * asked["params"]["arguments"]["size"]}
        said = {"result": {"content": [text]}}
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **said}, ensure_ascii=False), flush=True)
    if sys.argv[1] == "dead":
        break
"""


def program(way: str) -> dict[str, Any]:
    return {"command": [sys.executable, "-c", PROGRAM, way]}


async def test_large_answers_over_pipes() -> None:
    """Read as fast as they come up to the limit, and refused by name above it."""
    async with calling({"s": program("")}) as do:
        assert len((await do(size=5 << 20)).text) == 5 << 20
        with pytest.raises(ToolError, match="an answer of more than 24 MB"):
            await do(size=16 << 20)


@pytest.mark.slow
async def test_a_program_that_reads_nothing() -> None:
    """Neither a call nor the end waits for it, and the policy is not blamed."""
    async with asyncio.timeout(60), calling({"s": program("deaf")}, wall_s=1) as do:
        for why in ("no answer in time", "the connection was lost, and its session with it"):
            with pytest.raises(ToolError, match=f"mcp server s: {why}"):
                await do(size=1, padding="x" * (1 << 20))  # more than its pipe holds


async def test_a_program_that_dies_after_it_was_asked_what_it_offers() -> None:
    """The listing's own is gone before the first call; that call's looks at the list, and is gone before the next."""
    async with calling({"s": program("dies after listing")}) as do:
        assert await do(size=1) == Observation(text="é")
        with pytest.raises(ToolError, match="mcp server s"):
            await do(size=1)
