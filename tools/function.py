"""An async function as a tool: name, schema and checks come from its signature and docstring.

    @tool(keep="head", options=LookupOptions, opens=open_index)
    async def lookup(context: Context, word: str, limit: int = 3) -> str:
        '''Look a word up.

        Args:
            word: What to look up.
            limit: How many entries to return.
        '''

The decorator is needed only by a tool that says more of itself than the function does.
"""

import inspect
import re
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import copy
from typing import Annotated, Any, Literal, Protocol

import docstring_parser
import msgspec
from msgspec import Meta
from msgspec.structs import replace

from schemas.events import Call
from tools.errors import ToolError
from tools.tool import Context, Effects, Function, Keep, Observation, Options, Place, Tool

Opens = Callable[[Any, Place], AbstractAsyncContextManager[Any]]
"""`opens(options, place)`: around all calls of a process; what it yields is `context.opened`."""


class ToolFunction(Protocol):
    """An async function whose first parameter is the context and whose others are the policy's arguments."""

    __name__: str

    def __call__(
        self, context: Context, /, *args: Any, **kwargs: Any
    ) -> Awaitable[str | Observation]: ...


def tool(
    *,
    session: bool | Literal["unreplayable"] = False,
    effects: Effects = "none",
    ends: bool = False,
    keep: Keep = "both",
    options: type[Options] = Options,
    opens: Opens | None = None,
) -> "Callable[[ToolFunction], FunctionTool]":
    """Say of a function what its signature cannot; see Tool for what each means.

    A session is `unreplayable` when its calls, run again, do not lead to the same state.
    """

    def declare(function: ToolFunction) -> FunctionTool:
        declared = FunctionTool(function)
        declared.session = bool(session)
        declared.replay = session != "unreplayable" and effects == "none"
        declared.effects, declared.ends = effects, ends
        declared.keep, declared.options, declared.opens = keep, options(), opens
        return declared

    return declare


class FunctionTool(Tool):
    """A function as a tool."""

    options: Options = Options()
    opens: Opens | None = None

    def __init__(self, function: ToolFunction) -> None:
        """Raises ToolError for a function that cannot be described to a policy."""
        self.name = function.__name__
        self._function = function
        self._opened: Any = None
        text = docstring_parser.parse(inspect.getdoc(function) or "")
        try:
            self._arguments = msgspec.defstruct(
                self.name,
                _fields(function, {p.arg_name: p.description or "" for p in text.params}),
                kw_only=True,
                forbid_unknown_fields=True,
            )
            parameters = _json_schema(self._arguments)
        except TypeError as error:  # a type that JSON cannot carry
            raise ToolError("bad_tool", f"{self.name}: {error}") from error
        parts = (text.short_description, text.long_description)
        described = Function(
            name=self.name,
            description="\n\n".join(part for part in parts if part),
            parameters=parameters,
            argument=bare_argument(parameters),
        )
        self.functions = (described,)

    def configured(self, options: dict[str, Any]) -> "FunctionTool":
        """The tool with a recipe's options. Raises ToolError for those that it does not have."""
        try:
            checked = msgspec.convert(options, type(self.options))
        except msgspec.ValidationError as error:
            raise ToolError("bad_options", f"tools.options.{self.name}: {error}") from error
        one = copy(self)
        one.options = checked
        return one

    @asynccontextmanager
    async def open(self, place: Place) -> AsyncIterator[None]:
        """See Tool."""
        if self.opens is None:
            yield
            return
        async with self.opens(self.options, place) as self._opened:
            yield
        self._opened = None

    def check(self, call: Call) -> str:
        """See Tool."""
        checked = self._convert(call.arguments)
        return checked if isinstance(checked, str) else ""

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """See Tool. Numbers and booleans may come as text, as in the body of a tagged call."""
        checked = self._convert(arguments)
        if isinstance(checked, str):
            return Observation(text=checked, ok=False)
        values = {name: getattr(checked, name) for name in checked.__struct_fields__}
        context = replace(context, options=self.options, opened=self._opened)
        result = await self._function(context, **values)
        return Observation(text=result) if isinstance(result, str) else result

    def _convert(self, arguments: dict[str, Any]) -> msgspec.Struct | str:
        """The arguments as the function takes them, or what is wrong with them."""
        try:
            return msgspec.convert(arguments, self._arguments, strict=False)
        except msgspec.ValidationError as error:
            return f"Wrong arguments for {self.name}: {_plainly(str(error))}"


_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]+)`")
_AT = re.compile(r"(?P<what>.*) - at `\$\.?(?P<where>[^`]*)`", re.DOTALL)


def _plainly(error: str) -> str:
    """A validation error in the words of someone who calls a function.

    "Expected `int`, got `str` - at `$.limit`" becomes "`limit`: expected `int`, got `str`".
    """
    at = _AT.fullmatch(error)
    what, where = (at["what"], at["where"]) if at else (error, "")
    prefix = f"`{where}`: " if where else ""
    if missing := _MISSING.match(what):
        return f"{prefix}`{missing[1]}` is missing"
    if unknown := _UNKNOWN.match(what):
        return f"{prefix}there is no argument `{unknown[1]}`"
    return prefix + (what[:1].lower() + what[1:] if prefix else what)


def bare_argument(parameters: dict[str, Any]) -> str:
    """The argument of an object's schema that a body without names can fill; empty if it takes names to tell.

    It is the first one, of text or a number, where no other is required.
    """
    properties: dict[str, Any] = parameters.get("properties") or {}
    first = next(iter(properties), "")
    others = set(parameters.get("required") or ()) - {first}
    described = properties.get(first)
    kind = described.get("type") if isinstance(described, dict) else None  # `true`: anything
    bare = {"string", "integer", "number", "boolean"}
    return first if isinstance(kind, str) and kind in bare and not others else ""


def _fields(
    function: ToolFunction, described: dict[str, str]
) -> list[tuple[str, Any] | tuple[str, Any, Any]]:
    """Name, type and default of each parameter after the context; text unless it says otherwise."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ToolError("bad_tool", f"{function.__name__} needs a context, then named arguments")
    if strange := sorted(set(described) - {p.name for p in parameters}):
        detail = f"{function.__name__} describes {', '.join(strange)}, not among its arguments"
        raise ToolError("bad_tool", detail)
    hints = typing.get_type_hints(function, include_extras=True)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for p in parameters[1:]:
        kind = hints.get(p.name, str)
        if text := " ".join(described.get(p.name, "").split()):
            kind = Annotated[kind, Meta(description=text)]
        fields.append((p.name, kind) if p.default is p.empty else (p.name, kind, p.default))
    return fields


def _json_schema(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    _, definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    schema: dict[str, Any] = definitions.pop(arguments.__name__)
    del schema["title"]
    return schema | {"$defs": definitions} if definitions else schema
