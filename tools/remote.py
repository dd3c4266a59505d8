"""Tools that are not run here: a worker of its own serves them, in any language. docs/wire.md says how.

Here is only what the policy is shown of them, from a recipe or from the log:

    [tools.remote.word_count]
    description = "Count the words of a text."
    parameters = '{"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}'
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from schemas import recipe
from schemas.events import Call, ShownFunction
from tools.errors import ToolError
from tools.function import bare_argument
from tools.registry import load_tools
from tools.tool import Context, Function, Observation, Options, Place, Tool

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class ShownTool(Tool):
    """A tool of which only the functions are known."""

    def __init__(
        self,
        name: str,
        functions: Sequence[ShownFunction],
        why: str = "is served by its own worker",
    ) -> None:
        """`why` it does not run here. Raises ToolError for functions that cannot be shown."""
        self.name = name
        self._why = why
        self.options = Options()
        self.functions = tuple(_function(shown) for shown in functions)

    def configured(self, options: dict[str, Any]) -> "ShownTool":
        """See Tool: it has none."""
        del options
        raise ToolError("bad_options", f"tools.options.{self.name}: its options are its worker's")

    @asynccontextmanager
    async def open(self, place: Place) -> AsyncIterator[None]:
        """See Tool."""
        del place
        yield

    def check(self, call: Call) -> str:
        """See Tool: its worker looks at the arguments."""
        del call
        return ""

    async def __call__(self, context: Context, arguments: dict[str, Any]) -> Observation:
        """See Tool: it cannot be run here."""
        del context, arguments
        raise ToolError("not_here", f"{self.name} {self._why}")


def remote_tools(remote: Mapping[str, recipe.RemoteTool]) -> dict[str, Tool]:
    """The tools of a recipe's `tools.remote`. Raises ToolError."""
    return {name: ShownTool(name, [_shown(name, table)]) for name, table in remote.items()}


def all_tools(config: recipe.Tools, recipe_dir: str = "") -> dict[str, Tool]:
    """All that a recipe lets the policy call, run here or elsewhere. Raises ToolError."""
    tools = load_tools(config.use, recipe_dir, config.options)
    remote = remote_tools(config.remote)
    if both := sorted(tools.keys() & remote.keys()):
        raise ToolError("duplicate", f"tools.remote.{both[0]} is in tools.use too")
    return tools | remote


def read_shown(text: str | bytes) -> ShownFunction:
    """A function from the JSON that chat templates take and `actors tools schema` prints. Raises ToolError."""
    try:
        return msgspec.json.decode(text, type=_Described).function
    except msgspec.DecodeError as error:
        shape = '{"type": "function", "function": {"name", "description", "parameters"}}'
        raise ToolError("bad_tool", f"it is not {shape}: {error}") from error


class _Described(msgspec.Struct):
    function: ShownFunction


def _shown(name: str, table: recipe.RemoteTool) -> ShownFunction:
    try:
        parameters = msgspec.json.decode(table.parameters, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ToolError("bad_tool", f"tools.remote.{name}.parameters: {error}") from error
    return ShownFunction(name=name, description=table.description, parameters=parameters)


def _function(shown: ShownFunction) -> Function:
    if not _NAME.fullmatch(shown.name):
        why = "a name has letters, digits, _ and -, 64 at most, and begins with no digit"
        raise ToolError("bad_tool", f"{shown.name!r}: {why}")
    try:
        checked = msgspec.convert(shown.parameters, _Parameters)
    except msgspec.ValidationError as error:
        detail = f"the parameters of {shown.name} are no JSON schema of an object: {error}"
        raise ToolError("bad_tool", detail) from error
    return Function(
        name=shown.name,
        description=shown.description,
        parameters={"type": "object", "properties": checked.properties} | shown.parameters,
        argument=bare_argument(shown.parameters),
    )


class _Parameters(msgspec.Struct, tag_field="type", tag="object"):
    """As much of a JSON schema as is relied upon here."""

    properties: dict[str, dict[str, Any]] = {}
    required: list[str] = []
