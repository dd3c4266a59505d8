"""An MCP server that is spoken by hand, byte by byte, and a way to call it as one trajectory does."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from actors.sessions import Kept
from tools.registry import load_tools, open_tools, resolve_options
from tools.sandbox.sandbox import Limits, Outcome
from tools.sandbox.unsafe import UnsafeSandbox
from tools.tool import Context, Observation, Place, Tool

TOOL = {"name": "do", "inputSchema": {"type": "object"}}
DONE = {"content": [{"type": "text", "text": "done"}]}


class Asked(NamedTuple):
    """One request over HTTP."""

    verb: str
    headers: dict[str, str]
    message: dict[str, Any]
    writer: asyncio.StreamWriter

    @property
    def method(self) -> str:
        return str(self.message.get("method", ""))

    async def answer(self, status: str, body: bytes = b"", **headers: str) -> None:
        """A whole answer; `content_length=""` leaves its length out."""
        given = {"content-length": str(len(body)), "connection": "close"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [
            f"HTTP/1.1 {status}",
            *(f"{name}: {value}" for name, value in given.items() if value),
        ]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()

    async def say(self, status: str = "200 OK", *, session: str = "", **said: Any) -> None:
        """JSON-RPC: `result=…` or `error=…`."""
        body = json.dumps({"jsonrpc": "2.0", "id": self.message.get("id"), **said}).encode()
        more = {"mcp_session_id": session} if session else {}
        await self.answer(status, body, content_type="application/json", **more)

    async def stream(self, *events: dict[str, Any] | str) -> None:
        """Events, then the end."""
        texts = (e if isinstance(e, str) else f"data: {json.dumps(e)}\n\n" for e in events)
        body = "".join(texts).encode()
        await self.answer("200 OK", body, content_type="text/event-stream", content_length="")

    def result(self, result: dict[str, Any]) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": self.message.get("id"), "result": result}


Does = Callable[[Asked], Awaitable[None]]


class Server:
    """Answers over HTTP with a session; `call` and `more` say what is odd about it."""

    def __init__(self, call: Does, **more: Does) -> None:
        self._does = {"tools_call": call, **more}
        self.asked: list[Asked] = []
        self.sessions = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {
                k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            asked = Asked(head[0].split()[0], headers, json.loads(body or b"{}"), writer)
            self.asked.append(asked)
            await self._answer(asked)
        writer.close()

    async def _answer(self, asked: Asked) -> None:
        name = asked.method.replace("/", "_") or asked.verb
        if does := self._does.get(name):
            await does(asked)
        elif asked.verb != "POST":
            await asked.answer("405 Method Not Allowed")
        elif asked.method == "initialize":
            self.sessions += 1
            info = {"name": "odd", "version": "1"}
            result = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": info}
            await asked.say(session=f"s{self.sessions}", result=result)
        elif asked.method == "tools/list":
            await asked.say(result={"tools": [TOOL]})
        elif "id" in asked.message:
            await asked.say(error={"code": -32601, "message": "no such method"})
        else:
            await asked.answer("202 Accepted")


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[dict[str, Any]]:
    """Its options for the tool."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/mcp"
    async with listening:
        yield {"url": server.url}


async def no_sandbox(code: str, **_: Any) -> Outcome:
    raise AssertionError("mcp runs no code")


async def listed(servers: dict[str, Any], **options: Any) -> Tool:
    """The tool as a run has it."""
    given = {"servers": servers, **options}
    found = await resolve_options(load_tools(["mcp"], options={"mcp": given}), Place())
    return load_tools(["mcp"], options={"mcp": given | found["mcp"]})["mcp"]


@asynccontextmanager
async def calling(
    servers: dict[str, Any], wall_s: float = 60
) -> AsyncIterator[Callable[..., Awaitable[Observation]]]:
    """A way to call as one trajectory."""
    tool = await listed(servers)
    kept = Kept(UnsafeSandbox(), Limits())
    context = Context(run=no_sandbox, limits=Limits(wall_s=wall_s), task={}, keep=kept.keep)

    async def call(function: str = "s__do", **arguments: Any) -> Observation:
        return await tool(context, {"function": function, "arguments": arguments})

    async with open_tools([tool], Place()):
        try:
            yield call
        finally:
            await kept.close()
