"""A kept connection to one MCP server, by the official SDK. Imported only where there are MCP servers.

The SDK wants a connection to be opened and closed by one task: a task of its own holds it, calls come from any.
"""

import asyncio
import os
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pydantic
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    PARSE_ERROR,
    REQUEST_TIMEOUT,
    UNSUPPORTED_PROTOCOL_VERSION,
    URL_ELICITATION_REQUIRED,
    CallToolResult,
    Tool,
)

from tools.errors import ToolError
from tools.mcp_transports import (
    HTTP_FAILED,
    MAX_ANSWER_BYTES,
    SESSION_UNKNOWN,
    HttpClient,
    over_pipes,
)
from tools.tool import Observation

if TYPE_CHECKING:
    from tools.mcp import Server

_CONNECT_S = 30.0
_ALIVE_S = 5.0
_MAX_PAGES = 100
_HTTP_READ_S = 300.0
_FAILURES = {
    *(CONNECTION_CLOSED, REQUEST_TIMEOUT, HTTP_FAILED, SESSION_UNKNOWN),
    *(PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, UNSUPPORTED_PROTOCOL_VERSION),
    *(HEADER_MISMATCH, MISSING_REQUIRED_CLIENT_CAPABILITY, URL_ELICITATION_REQUIRED),
}
"""What goes wrong between the SDK and a server; any other error is what the server says of the call."""


class Connection:
    """One server. Connects when first asked, and, unless a session was on it, anew after the connection was lost."""

    def __init__(
        self, name: str, server: "Server", recipe_dir: str, *, in_session: bool = False
    ) -> None:
        """`in_session`: one trajectory's own, on which the server may keep a state."""
        self._in_session = in_session
        self._begun = False
        self._name = name
        self._server = server
        self._recipe_dir = recipe_dir
        self._opening = asyncio.Lock()
        self._client: Client | None = None
        self._holder: asyncio.Task[None] | None = None
        self._let_go = asyncio.Event()
        self._ended: Exception | None = None
        """Why the connection has, if not by our own doing."""

    async def list_functions(self, wall_s: float) -> list[Tool]:
        """Everything that the server offers, however many pages it takes. Raises ToolError."""
        found: list[Tool] = []
        cursor: str | None = None
        try:
            async with asyncio.timeout(wall_s):
                client = await self._connected()
                for _ in range(_MAX_PAGES):
                    page = await client.list_tools(cursor=cursor)
                    found += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        return found
        except (MCPError, TimeoutError, pydantic.ValidationError) as error:
            raise self._failed(error) from error
        raise self._failed(f"more than {_MAX_PAGES} pages of tools")

    async def call(
        self, name: str, arguments: dict[str, Any], wall_s: float, *, again: bool = True
    ) -> CallToolResult | Observation:
        """What the server answers; its refusal is an observation.

        Raises ToolError, and TimeoutError where the call takes too long for a server that answers all the same.
        `again`: where the server wants a new session, has not run the call, and nobody's state was in the old one.
        """
        client = await self._connected()
        try:
            return await self._ask(client, name, arguments, wall_s)
        except TimeoutError:
            await self._look_alive(client)
            raise
        except MCPError as error:
            if error.code not in _FAILURES:
                return Observation(text=f"Error: {error.message}", ok=False)
            if error.code in (CONNECTION_CLOSED, SESSION_UNKNOWN):
                await self._lose(client)
            if error.code != SESSION_UNKNOWN or self._in_session or not again:
                raise self._failed(self._ended or error) from error
        return await self.call(name, arguments, wall_s, again=False)

    async def _ask(
        self, client: Client, name: str, arguments: dict[str, Any], wall_s: float
    ) -> CallToolResult:
        """Raises MCPError, TimeoutError, and ToolError for what the server had declared otherwise."""
        try:
            async with asyncio.timeout(wall_s):
                return await client.call_tool(name, arguments)
        except (RuntimeError, pydantic.ValidationError) as error:
            raise self._failed(error) from error

    async def _look_alive(self, client: Client) -> None:
        """Raises ToolError for a server that does not even say what it offers."""
        try:
            async with asyncio.timeout(_ALIVE_S):
                await client.list_tools()
        except (MCPError, TimeoutError, pydantic.ValidationError) as error:
            await self._lose(client)
            raise self._failed(error) from error

    async def close(self) -> None:
        """Let the server go; the next call connects again."""
        holder, self._holder, self._client = self._holder, None, None
        if holder is not None:
            self._let_go.set()
            await asyncio.wait({holder})

    async def _lose(self, client: Client) -> None:
        """Close what this client was, if nobody else has."""
        if self._client is client:
            await self.close()

    async def _connected(self) -> Client:
        async with self._opening:
            if self._holder is not None and self._holder.done():
                self._holder = self._client = None
            if self._client is None:
                if self._begun and self._in_session:
                    raise self._failed("the connection was lost, and its session with it")
                self._let_go, self._ended = asyncio.Event(), None
                opened: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
                self._holder = asyncio.create_task(
                    self._hold(opened, self._let_go), name=f"mcp {self._name}"
                )
                self._client = await opened
                self._begun = True
            return self._client

    async def _hold(self, opened: asyncio.Future[Client], let_go: asyncio.Event) -> None:
        """Open, wait, close: all in this task."""
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(_CONNECT_S):
                    client = await self._connect(stack)
                if not opened.cancelled():  # else nobody waits for it any more
                    opened.set_result(client)
                    await let_go.wait()
        except (OSError, ValueError, RuntimeError, MCPError, httpx2.HTTPError) as error:
            self._report(opened, error)
        except ExceptionGroup as group:  # of the SDK's task groups
            self._report(opened, group)

    def _report(self, opened: asyncio.Future[Client], error: Exception) -> None:
        """Tell who waits for the connection; later losses are told by the calls that meet them."""
        self._ended = error
        if not opened.done():
            opened.set_exception(self._failed(error))

    async def _connect(self, stack: AsyncExitStack) -> Client:
        """Over HTTP only the older protocol has sessions; a server may know just the newer one."""
        if self._in_session:
            with suppress(MCPError):
                return await stack.enter_async_context(self._open(stack, "legacy"))
        return await stack.enter_async_context(self._open(stack, "auto"))

    def _open(self, stack: AsyncExitStack, mode: str) -> Client:
        server = self._server
        if server.command:
            pipes = over_pipes(
                [_from_environment(part) for part in server.command],
                {name: _from_environment(value) for name, value in server.env.items()},
                Path(self._recipe_dir, server.folder).resolve(),
            )
            return Client(pipes, mode=mode)
        http = HttpClient(
            headers={"accept-encoding": "identity"}
            | {name: _from_environment(value) for name, value in server.headers.items()},
            timeout=httpx2.Timeout(_CONNECT_S, read=_HTTP_READ_S),
            # calls wait for the server, and not for one another
            limits=httpx2.Limits(max_connections=None),
        )
        stack.push_async_callback(http.aclose)
        streams = streamable_http_client(
            server.url, http_client=http, max_sse_event_size=MAX_ANSWER_BYTES
        )
        return Client(streams, mode=mode)

    def _failed(self, why: object) -> ToolError:
        while isinstance(why, ExceptionGroup):
            why = why.exceptions[0]
        if isinstance(why, TimeoutError):
            why = "no answer in time"
        text = str(why) or type(why).__name__
        return ToolError("mcp_server", f"mcp server {self._name}: {text}")


def _from_environment(value: str) -> str:
    """`env:NAME` → the variable. Raises ValueError if it is not set."""
    if not value.startswith("env:"):
        return value
    name = value.removeprefix("env:")
    if name not in os.environ:
        raise ValueError(f"the variable {name} is not set")
    return os.environ[name]
