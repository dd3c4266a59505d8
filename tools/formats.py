"""How a policy writes calls in its text, and how they are read."""

import re
from collections.abc import Mapping
from typing import Protocol

import msgspec

from schemas.events import Call
from tools.errors import ToolError, UnknownTool
from tools.tool import Tool


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one turn's text."""

    calls: list[Call] = []
    """In the order they were written."""
    feedback: str = ""
    """For the policy: what could not be read as a call, and why. Calls beside it are whole."""


class CallFormat(Protocol):
    """One way to write calls."""

    stop: tuple[str, ...]
    """Where sampling may stop, since a call is complete; kept in the text."""

    def parse(self, text: str) -> Parsed:
        """Find the calls in one turn's text. Never raises: what is malformed becomes feedback."""
        ...

    def render(self, call: Call) -> str:
        """Write a call as `parse` reads it. Raises ValueError for one that the format cannot hold."""
        ...


def open_format(name: str, tools: Mapping[str, Tool], tags: Mapping[str, str]) -> CallFormat:
    """The format of a recipe (`tools.format`, `tools.tags`) for these tools. Raises ToolError for bad names."""
    if name != "tagged":
        raise ToolError("unknown_format", f"no call format {name!r}; there is tagged")
    if strange := sorted(set(tags) - set(tools)):
        raise UnknownTool(
            "unknown_tool", f"tools.tags names {', '.join(strange)}, not in tools.use"
        )
    by_tag: dict[str, Tool] = {}
    for tool_name, tool in tools.items():
        tag = tags.get(tool_name, tool_name)
        if not re.fullmatch(r"[A-Za-z_][\w-]*", tag):
            raise ToolError("bad_tag", f"{tag!r} is not a tag: letters, digits, _ and - only")
        if tag in by_tag:
            raise ToolError(
                "bad_tag", f"{tool_name} and {by_tag[tag].name} have the same tag {tag!r}"
            )
        by_tag[tag] = tool
    return Tagged(by_tag)


class Tagged:
    """`<python>print(1)</python>`: the tag names the tool, the body fills its `argument`.

    One newline after the opening tag and one before the closing tag belong to the tags. A body reaches to the first
    closing tag of its own; other tags in it are part of it.
    """

    def __init__(self, tools_by_tag: Mapping[str, Tool]) -> None:
        self.stop = tuple(f"</{tag}>" for tag in tools_by_tag)
        self._tools = tools_by_tag
        self._tags = {tool.name: tag for tag, tool in tools_by_tag.items()}
        names = "|".join(re.escape(tag) for tag in tools_by_tag) or "(?!)"
        self._tag = re.compile(rf"<(?P<slash>/?)(?P<name>{names})(?P<rest>\s[^<>]*)?>")

    def parse(self, text: str) -> Parsed:
        """See CallFormat."""
        calls: list[Call] = []
        complaints: list[str] = []
        position = 0
        while tag := self._tag.search(text, position):
            name, position = tag["name"], tag.end()
            if tag["slash"]:
                complaints.append(f"</{name}> without <{name}> before it.")
                continue
            if tag["rest"] is not None:
                complaints.append(f"<{name}> takes nothing inside the tag.")
            end = text.find(f"</{name}>", position)
            if end < 0:
                complaints.append(
                    f"<{name}> without </{name}>: the call was cut off and did not run."
                )
                continue
            if tag["rest"] is None:
                calls.append(self._call(name, text[position:end]))
            position = end + len(f"</{name}>")
        return Parsed(calls=calls, feedback=" ".join(dict.fromkeys(complaints)))

    def render(self, call: Call) -> str:
        """See CallFormat."""
        tag = self._tags.get(call.tool)
        if tag is None:
            raise ValueError(f"no tag for the tool {call.tool!r}")
        argument = self._tools[tag].argument
        body = call.arguments.get(argument)
        if not isinstance(body, str) or len(call.arguments) != 1:
            raise ValueError(f"a tagged call holds {argument!r} alone, as text: {call.arguments!r}")
        if f"</{tag}>" in body:
            raise ValueError(f"the body holds </{tag}>, which would end it")
        return f"<{tag}>\n{body}\n</{tag}>"

    def _call(self, name: str, body: str) -> Call:
        tool = self._tools[name]
        body = body.removeprefix("\n").removesuffix("\n")
        return Call(tool=tool.name, arguments={tool.argument: body})
