"""How a policy writes calls in its text, and how they are read. Chosen by the recipe, whatever the tools are.

format      the seam, and what the formats share
tagged      <python>print(1)</python>
fenced      ```python
hermes      <tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>
llama       {"name": "python", "parameters": {"code": "print(1)"}}; also `json`, with "arguments"
template    as the model's own chat template writes them
"""

import re
from collections.abc import Mapping, Sequence

from tools.errors import ToolError, UnknownTool
from tools.formats.fenced import Fenced
from tools.formats.format import CallFormat, Functions, Parsed, with_functions
from tools.formats.hermes import Hermes
from tools.formats.llama import BareJson
from tools.formats.tagged import Tagged
from tools.formats.template import Write, open_template
from tools.tool import Tool

__all__ = ["CallFormat", "Parsed", "open_format", "with_functions"]


def open_format(
    name: str, tools: Mapping[str, Tool], tags: Mapping[str, str], write: Write | None = None
) -> CallFormat:
    """The format of a recipe (`tools.format`, `tools.tags`) for these tools.

    `write` asks the chat template, for `template`. Raises ToolError for bad names, and for a template without calls.
    """
    _check_tags([f.name for tool in tools.values() for f in tool.functions], tags)
    functions = Functions(tools)
    match name:
        case "tagged":
            return Tagged(functions, tags)
        case "fenced":
            return Fenced(functions, tags)
        case "hermes":
            return Hermes(functions)
        case "llama":
            return BareJson(functions)
        case "json":
            return BareJson(functions, ("name", "arguments"))
        case "template" if write is not None:
            return open_template(functions, write)
    raise ToolError(
        "unknown_format",
        f"no call format {name!r}; there are tagged, fenced, hermes, llama, json, template",
    )


def _check_tags(names: Sequence[str], tags: Mapping[str, str]) -> None:
    if strange := sorted(set(tags) - set(names)):
        raise UnknownTool(
            "unknown_tool", f"tools.tags names {', '.join(strange)}, not in tools.use"
        )
    owners: dict[str, str] = {}
    for name in names:
        tag = tags.get(name, name)
        if not re.fullmatch(r"[A-Za-z_][\w-]*", tag):
            raise ToolError("bad_tag", f"{tag!r} is not a tag: letters, digits, _ and - only")
        if tag in owners:
            raise ToolError("bad_tag", f"{name} and {owners[tag]} have the same tag {tag!r}")
        owners[tag] = name
