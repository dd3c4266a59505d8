"""Names to tools: built in, from an installed package, or `module:function` beside the recipe.

Your own tool is one typed async function; its docstring is what the policy reads:

    async def shout(context: Context, text: str) -> str:
        '''Say it louder.'''
        return text.upper()
"""

import inspect
import typing
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, cast

import msgspec

from schemas import names
from tools.errors import ToolError, UnknownTool
from tools.tool import Context, Observation, Tool

ENTRY_POINTS = "agentic_actors.tools"
BUILT_IN = {"python": "tools.python:python"}


class ToolFunction(Protocol):
    """An async function whose first parameter is the context and whose others are the policy's arguments."""

    __name__: str

    def __call__(
        self, context: Context, /, *args: Any, **kwargs: Any
    ) -> Awaitable[str | Observation]: ...


def load_tools(use: Sequence[str], recipe_dir: str = "") -> dict[str, Tool]:
    """The tools of the names, by the name that each gives itself.

    Raises UnknownTool for a name that leads nowhere, ToolError for what is not a tool and for two of one name.
    """
    tools: dict[str, Tool] = {}
    for name in use:
        try:
            found = names.find(name, recipe_dir, built_in=BUILT_IN, group=ENTRY_POINTS)
        except names.UnknownName as error:
            raise UnknownTool("unknown_tool", str(error)) from error
        tool = _as_tool(name, found)
        if tool.name in tools:
            raise ToolError("duplicate", f"two tools are called {tool.name!r}")
        tools[tool.name] = tool
    return tools


class FunctionTool:
    """A function as a tool: the schema and the checks of arguments come from its signature."""

    def __init__(self, function: ToolFunction) -> None:
        self.name = function.__name__
        self.description = inspect.getdoc(function) or ""
        self._function = function
        fields = _fields(function)
        self.argument: str = fields[0][0]
        try:
            self._arguments = msgspec.defstruct(
                self.name, fields, kw_only=True, forbid_unknown_fields=True
            )
            self.parameters = _json_schema(self._arguments)
        except TypeError as error:  # a type that JSON cannot carry
            raise ToolError("bad_tool", f"{self.name}: {error}") from error

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """See Tool. Numbers and booleans may come as text, as in the body of a tagged call."""
        try:
            checked = msgspec.convert(arguments, self._arguments, strict=False)
        except msgspec.ValidationError as error:
            return Observation(text=f"Wrong arguments for {self.name}: {error}", ok=False)
        values = {name: getattr(checked, name) for name in checked.__struct_fields__}
        result = await self._function(context, **values)
        return Observation(text=result) if isinstance(result, str) else result


def _fields(function: ToolFunction) -> list[tuple[str, Any] | tuple[str, Any, Any]]:
    """Name, type and default of each parameter after the context; text unless it says otherwise."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if not parameters or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ToolError("bad_tool", f"{function.__name__} needs named arguments after the context")
    hints = typing.get_type_hints(function, include_extras=True)
    return [
        (p.name, hints.get(p.name, str))
        if p.default is p.empty
        else (p.name, hints.get(p.name, str), p.default)
        for p in parameters
    ]


def _json_schema(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    _, definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    schema: dict[str, Any] = definitions.pop(arguments.__name__)
    del schema["title"]
    return schema | {"$defs": definitions} if definitions else schema


def _as_tool(name: str, found: object) -> Tool:
    if inspect.iscoroutinefunction(found):
        return FunctionTool(cast(ToolFunction, found))
    if callable(found) and all(hasattr(found, a) for a in Tool.__annotations__):
        return cast(Tool, found)
    raise ToolError("bad_tool", f"{name!r} is neither an async function nor a Tool: {found!r}")
