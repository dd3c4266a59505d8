"""The `mcp` tool: the functions of any MCP servers, called over kept connections.

    [tools.options.mcp.servers.files]
    command = ["npx", "-y", "some-server", "."]     # over its standard input and output

    [tools.options.mcp.servers.tickets]
    url = "https://tickets.example/mcp"             # over streamable HTTP
    headers = { Authorization = "env:TICKETS_AUTHORIZATION" }

A server may keep a state: each trajectory has a connection of its own (over standard input and output: a process),
closed when it ends, unless all that the server offers says that it only reads. Where it is lost, the trajectory fails,
since calls that act on the world do not run again.

The policy sees each function as `<server>__<function>`, with `_2` and so on behind it where there is one already. They
are listed once, when the run begins, and written into its recipe: all replicas and the whole run show the same ones. A
server runs with the rights of the toolbox: choose whom to trust.
"""

import base64
import itertools
import re
from collections.abc import AsyncIterator, Container
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from schemas.events import Call
from schemas.images import PLACEHOLDER
from tools.errors import ToolError
from tools.function import bare_argument
from tools.tool import (
    Context,
    Effects,
    Function,
    Image,
    Observation,
    Options,
    Place,
    Tool,
)

if TYPE_CHECKING:  # the client takes half a second to import
    from mcp_types import CallToolResult, ContentBlock

    from tools.mcp_client import Connection

_MAX_NAME_CHARS = 64
_MAX_IMAGE_BYTES = 16 << 20
_LISTING_S = 60.0


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One MCP server: a `command` or a `url`. `env:NAME` in a value takes it from an environment variable."""

    command: list[str] = []
    """Program and arguments."""
    env: dict[str, str] = {}
    """Given to the program, beside PATH, HOME and the like; nothing else is."""
    folder: str = ""
    """Where it runs, relative to the recipe."""
    url: str = ""
    headers: dict[str, str] = {}
    functions: list[str] = []
    """Only these; empty: all."""
    connection: Literal["auto", "trajectory", "shared"] = "auto"
    """One for each trajectory, or one for all of a toolbox's; `auto`: shared where all functions say they only read."""


class McpOptions(Options, frozen=True):
    """The servers."""

    servers: dict[str, Server] = {}
    effects: Literal["auto", "none", "external"] = "auto"
    """Whether calls act on the world and must not run twice; `auto`: unless all say that they only read."""
    listed: str = ""
    """JSON, written when the run begins: what the servers offer."""


class Listed(msgspec.Struct, frozen=True):
    """One function of a server, as the policy sees it and as the server calls it."""

    function: Function
    server: str
    name: str
    reads_only: bool


class Mcp(Tool):
    """MCP servers as one tool with many functions."""

    name = "mcp"

    def __init__(self, options: McpOptions | None = None) -> None:
        """Raises ToolError for a server with neither a command nor a URL."""
        options = options or McpOptions()
        self.options = options
        for name, server in options.servers.items():
            if bool(server.command) == bool(server.url):
                raise ToolError("bad_options", f"mcp server {name}: give a `command` or a `url`")
        try:
            listed = msgspec.json.decode(options.listed or "[]", type=list[Listed])
        except msgspec.DecodeError as error:
            raise ToolError("bad_options", f"tools.options.mcp.listed: {error}") from error
        self.functions = tuple(one.function for one in listed)
        self._listed = {one.function.name: one for one in listed}
        reads_only = all(one.reads_only for one in listed)
        auto: Effects = "none" if reads_only else "external"
        self.effects = auto if options.effects == "auto" else options.effects
        self._own = {
            name
            for name, server in options.servers.items()
            if server.connection == "trajectory"
            or (server.connection == "auto" and not _reads_only(name, listed))
        }
        self.session = bool(self._own)
        self.replay = self.effects == "none"
        self._recipe_dir = ""
        self._connections: dict[str, Connection] = {}

    def configured(self, options: dict[str, Any]) -> "Mcp":
        """See Tool."""
        try:
            return Mcp(msgspec.convert(options, McpOptions))
        except msgspec.ValidationError as error:
            raise ToolError("bad_options", f"tools.options.mcp: {error}") from error

    async def resolve(self, place: Place) -> dict[str, Any]:
        """See Tool: asks every server what it offers."""
        listed: list[Listed] = []
        async with self.open(place):
            for name, connection in self._connections.items():
                only = self.options.servers[name].functions
                offered = await connection.list_functions(self.options.timeout_s or _LISTING_S)
                if missing := sorted(set(only) - {tool.name for tool in offered}):
                    detail = f"mcp server {name} has no {', '.join(missing)}"
                    raise ToolError("bad_options", detail)
                wanted = {tool.name: tool for tool in offered if not only or tool.name in only}
                for tool in wanted.values():
                    taken = {one.function.name for one in listed}
                    listed.append(_listed(name, tool, taken))
        return {"listed": msgspec.json.encode(listed).decode()}

    @asynccontextmanager
    async def open(self, place: Place) -> AsyncIterator[None]:
        """See Tool. A connection is made when it is first needed, and again when it was lost."""
        try:
            from tools.mcp_client import Connection
        except ModuleNotFoundError as error:
            detail = f"mcp needs {error.name}: `make setup` installs it"
            raise ToolError("not_installed", detail) from error
        self._recipe_dir = place.recipe_dir
        async with AsyncExitStack() as stack:
            for name, server in self.options.servers.items():
                self._connections[name] = connection = Connection(name, server, place.recipe_dir)
                stack.push_async_callback(connection.close)
            yield
        self._connections = {}

    def check(self, call: Call) -> str:
        """See Tool. The server checks arguments itself."""
        del call
        return ""

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """See Tool. `arguments`: `function` and its `arguments`."""
        listed = self._listed.get(str(arguments.get("function")))
        given = arguments.get("arguments")
        if listed is None or not isinstance(given, dict):
            return Observation(
                text=f"There is no such call of an MCP server: {arguments}", ok=False
            )
        wall_s = context.limits.wall_s
        try:
            result = await self._connection(context, listed.server).call(listed.name, given, wall_s)
        except TimeoutError:
            return Observation(text=f"Timed out after {wall_s:g} s.", ok=False)
        return result if isinstance(result, Observation) else observe(result)

    def _connection(self, context: Context, server: str) -> "Connection":
        """The trajectory's own, or that of all; where no session is kept, there is just one trajectory."""
        if context.keep is None or server not in self._own:
            return self._connections[server]
        from tools.mcp_client import Connection

        own: Connection = context.keep(
            server,
            lambda: Connection(
                server, self.options.servers[server], self._recipe_dir, in_session=True
            ),
        )
        return own


mcp = Mcp()


def observe(result: "CallToolResult") -> Observation:
    """What a server's answer looks like to the policy."""
    texts: list[str] = []
    images: list[Image] = []
    for block in result.content:
        shown = _show(block)
        if isinstance(shown, Image):
            images.append(shown)
            texts.append(PLACEHOLDER)
        else:
            texts.append(shown.replace(PLACEHOLDER, "[image]"))  # no image stands for it
    if not texts and result.structured_content is not None:
        structured = msgspec.json.encode(result.structured_content).decode()
        texts.append(structured.replace(PLACEHOLDER, "[image]"))
    text = "\n".join(texts) or "(no result)"
    return Observation(text=text, ok=not result.is_error, images=images)


def _show(block: "ContentBlock") -> str | Image:
    match block.type:
        case "text":
            return block.text
        case "image":
            try:
                data = base64.b64decode(block.data, validate=True)
            except ValueError:  # no base64, or not even ASCII
                return f"[a broken image, {block.mime_type}]"
            if len(data) > _MAX_IMAGE_BYTES:
                return f"[an image of {len(data)} bytes, which is too large]"
            return Image(data=data, media_type=block.mime_type)
        case "audio":
            return f"[audio, {block.mime_type}]"
        case "resource_link":
            return f"[{block.name}: {block.uri}]"
        case "resource":
            text = getattr(block.resource, "text", None)
            kind = block.resource.mime_type or "bytes"
            return text if text is not None else f"[{block.resource.uri}, {kind}]"
    return f"[{block.type}]"


def _reads_only(server: str, listed: list[Listed]) -> bool:
    return all(one.reads_only for one in listed if one.server == server)


def _listed(server: str, tool: Any, taken: Container[str]) -> Listed:
    """As the policy sees it: a name of its own, whatever letters the server's has."""
    whole = re.sub(r"[^\w-]", "_", f"{server}__{tool.name}", flags=re.ASCII)
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    names = (whole[: _MAX_NAME_CHARS - len(ending)] + ending for ending in endings)
    name = next(name for name in names if name not in taken)
    parameters = {"type": "object", **tool.input_schema}
    parameters["properties"] = {
        key: described if isinstance(described, dict) else {}  # `true`: anything
        for key, described in (parameters.get("properties") or {}).items()
    }
    return Listed(
        function=Function(
            name=name,
            description=tool.description or tool.title or "",
            parameters=parameters,
            argument=bare_argument(parameters),
        ),
        server=server,
        name=tool.name,
        reads_only=bool(tool.annotations and tool.annotations.read_only_hint),
    )
