"""Names to tools: built in, from an installed package, or `module:function` beside the recipe.

Your own tool is one typed async function; its docstring is what the policy reads (see tools/function.py):

    async def shout(context: Context, text: str) -> str:
        '''Say it louder.'''
        return text.upper()
"""

import inspect
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import entry_points
from typing import Any, cast

from schemas import names
from tools.errors import ToolError, UnknownTool
from tools.function import FunctionTool, ToolFunction
from tools.tool import Place, Tool

ENTRY_POINTS = "agentic_actors.tools"
BUILT_IN = {
    "python": "tools.python:python",
    "python_session": "tools.python:python_session",
    "bash": "tools.bash:bash",
    "finish": "tools.finish:finish",
    "image": "tools.image:image",
    "mcp": "tools.mcp:mcp",
    "repo": "tools.repo:repo",
    "search": "tools.search:search",
    "sql": "tools.sql:sql",
    "visit": "tools.visit:visit",
    "web_search": "tools.web_search:web_search",
}


def load_tools(
    use: Sequence[str],
    recipe_dir: str = "",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Tool]:
    """The tools of the names, by the name that each gives itself, with the recipe's options.

    Raises UnknownTool for a name that leads nowhere, ToolError for what is not a tool, for two of one name and for
    options that a tool does not have.
    """
    options = options or {}
    tools: dict[str, Tool] = {}
    for name in use:
        try:
            found = names.find(name, recipe_dir, built_in=BUILT_IN, group=ENTRY_POINTS)
        except names.UnknownName as error:
            raise UnknownTool("unknown_tool", str(error)) from error
        except ModuleNotFoundError as error:
            if name not in BUILT_IN:
                raise
            detail = f"{name} needs {error.name}: `make setup` installs it"
            raise ToolError("not_installed", detail) from error
        tool = _as_tool(name, found)
        if tool.name in tools:
            raise ToolError("duplicate", f"two tools are called {tool.name!r}")
        tools[tool.name] = tool.configured(dict(options.get(tool.name, {})))
    if strange := sorted(set(options) - set(tools)):
        raise UnknownTool(
            "unknown_tool", f"tools.options names {', '.join(strange)}, not in tools.use"
        )
    return tools


def tool_names() -> list[str]:
    """What can be named without a module: built in, or from an installed package."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


async def resolve_options(tools: Mapping[str, Tool], place: Place) -> dict[str, dict[str, Any]]:
    """What each tool wants to be added to its options for the whole run, by its name. Raises ToolError."""
    found = {name: await tool.resolve(place) for name, tool in tools.items()}
    return {name: options for name, options in found.items() if options}


@asynccontextmanager
async def open_tools(tools: Iterable[Tool], place: Place) -> AsyncIterator[None]:
    """Open each for the calls of one process; close them in the opposite order."""
    async with AsyncExitStack() as stack:
        for tool in tools:
            await stack.enter_async_context(tool.open(place))
        yield


def _as_tool(name: str, found: object) -> Tool:
    if inspect.iscoroutinefunction(found):
        found = FunctionTool(cast(ToolFunction, found))
    if not (callable(found) and all(hasattr(found, a) for a in Tool.__annotations__)):
        detail = f"{name!r} is neither an async function nor a Tool: {found!r}"
        raise ToolError("bad_tool", detail)
    tool = cast(Tool, found)
    if tool.name != name.rpartition(":")[2]:  # its queue is found by either
        raise ToolError("bad_tool", f"{name!r} calls itself {tool.name!r}: use one name")
    return tool
