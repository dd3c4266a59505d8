"""How VerlTool's policies write calls, and how they are shown results; docs/verltool.md has both as tables.

The first tool of the recipe that finds its own call in the action is called; `<tool_call>{json}</tool_call>` comes
after all of them. Where VerlTool takes all blocks of an action, or the last, so does this.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from textwrap import dedent
from typing import Any

from msgspec.structs import replace

from actors.gateway_prelude import with_imports
from schemas.events import Call, Result
from tools.formats import CallFormat
from tools.formats.format import Functions
from tools.formats.hermes import Hermes
from tools.tool import Tool

PYTHON = ("python", "python_session")
ALIASES = {
    "python_code": "python",
    "ipython_code": "python_session",
    "bash_terminal": "bash",
    "search_retrieval": "search",
    "google_search": "web_search",
}
"""VerlTool's names of what has another name here."""

_CODE = re.compile(r"```\n?(?:python3?|py)\b")
_SHELL = re.compile(r"```\s*(?:bash|shell|sh|terminal)\b")
_STDIN = re.compile(r"```input\n")
_QUERY = re.compile(r"```search\b")
_QUERY_LINE = re.compile(r"^(?:search|google):", re.MULTILINE)
_OPENED = re.compile(r"<(output|result|o)>\Z")
_FINAL = {"sql": "solution", "search": "answer", "web_search": "answer"}
"""Tags that hold a final answer, by the tool that knows them."""


class Actions(CallFormat):
    """VerlTool's ways to write a call."""

    def __init__(self, functions: Functions) -> None:
        super().__init__(functions)
        self._json = Hermes(_Aliased(functions.tools))

    @classmethod
    def of(cls, tools: Mapping[str, Tool]) -> "Actions":
        """For these tools."""
        return cls(Functions(tools))

    def over(self, functions: Functions) -> "Actions":
        """See CallFormat."""
        return Actions(functions)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        for function in self.functions:
            body = _BODIES.get(function.name, _tagged(function.name))(text)
            if body is None:
                continue
            found = self.functions.bare(function.name, body)
            if isinstance(found, Call) and function.name in PYTHON:
                found = with_stdin(found, _last(_STDIN, "\n```", text))
            return [found]
        return self._json.read(text)

    def render(self, call: Call) -> str:
        """See CallFormat."""
        return self._json.render(call)

    def explain(self) -> str:
        """See CallFormat."""
        lines = [f"• {f.name}: {f.description.partition(chr(10))[0]}" for f in self.functions]
        return "\n".join(["Available tools:", *lines])

    def answers(self, text: str) -> bool:
        """Whether the action holds a final answer: VerlTool calls it invalid, and done."""
        tags = {_FINAL[f.name] for f in self.functions if f.name in _FINAL}
        return any(_tagged(tag)(text) is not None for tag in tags)


class _Aliased(Functions):
    """Knows tools by VerlTool's names too."""

    def call(self, name: str, arguments: Any) -> Call | str:
        """See Functions."""
        other = ALIASES.get(name, "python_session" if name == "python" else "")
        known = self.find(name) or not self.find(other)
        return super().call(name if known else other, arguments)


def with_stdin(call: Call, stdin: object) -> Call:
    """The call with what its program reads, unless it says so itself."""
    if call.tool not in PYTHON or "stdin" in call.arguments or not isinstance(stdin, str):
        return call
    return replace(call, arguments=call.arguments | {"stdin": stdin})


def prepared(call: Call, extra: Mapping[str, Any]) -> Call:
    """The call with what VerlTool's Python has besides: the trainer's stdin, and imports that nobody wrote."""
    call = with_stdin(call, extra.get("stdin"))
    code = call.arguments.get("code")
    if call.tool != "python" or not isinstance(code, str):
        return call
    return replace(call, arguments=call.arguments | {"code": with_imports(code)})


# -- what a tool finds in an action ----------------------------------------------------------------


def _tagged(tag: str) -> Callable[[str], str | None]:
    """The last body between such tags."""
    opening, closing = _tag(tag)
    return lambda text: _last(opening, closing, text)


def _tag(name: str) -> tuple[re.Pattern[str], str]:
    """How it opens, and how it closes."""
    return re.compile(re.escape(f"<{name}>")), f"</{name}>"


def _between(opening: re.Pattern[str], closing: str, text: str) -> Iterator[tuple[int, str]]:
    """Where something opens, and what it holds until it closes. Each character is looked at twice at most."""
    end = 0
    while (begun := opening.search(text, end)) and (at := text.find(closing, begun.end())) >= 0:
        yield begun.start(), text[begun.end() : at]
        end = at + len(closing)


def _last(opening: re.Pattern[str], closing: str, text: str) -> str | None:
    found = [body for _, body in _between(opening, closing, text)]
    return found[-1].strip() if found else None


def _blocks(tag: str, fence: re.Pattern[str]) -> Callable[[str], str | None]:
    """All bodies between tags, else all of fenced blocks, a line's end between them."""
    opening, closing = _tag(tag)

    def find(text: str) -> str | None:
        found = [*_between(opening, closing, text)] or [*_between(fence, "```", text)]
        return "\n".join(dedent(body).strip() for _, body in found) if found else None

    return find


def _web_query(text: str) -> str | None:
    found = [*islice(_between(*_tag("search"), text), 1)]
    if not found:
        found += islice(_between(_QUERY, "```", text), 1)
        if line := _QUERY_LINE.search(text):
            found.append((line.start(), text[line.end() :]))
    return min(found)[1].strip() if found else None


_python = _blocks("python", _CODE)
_BODIES: dict[str, Callable[[str], str | None]] = {
    "python": _python,
    "python_session": _python,
    "bash": _blocks("bash", _SHELL),
    "web_search": _web_query,
}
"""Of the functions that have more than their own tag."""


# -- what the policy is shown ----------------------------------------------------------------------


def observation(
    action: str, calls: Sequence[Call], results: Sequence[Result], extra: Mapping[str, Any]
) -> str | dict[str, Any]:
    """The results of an action's calls, wrapped as the called tool's are in VerlTool."""
    text = "\n".join(result.text for result in results).strip(" \n")
    match calls[0].tool:
        case "python" | "python_session":
            return _wrapped(action, text, "</python>", "result", "result")
        case "bash":
            return _wrapped(action, text, "</bash>", "output", "o")
        case "sql":
            left = extra.get("turns_left")
            reminder = f"<reminder>You have {left} turns left to complete the task.</reminder>"
            inside = text if left is None else f"{text}\n{reminder}"
            query = calls[-1].arguments.get("query", "")
            return {
                "obs": f"\n\n<observation>{inside}</observation>\n\n",
                "parsed_sql": query,
            }
        case "search":
            return f"\n\n<information>{text}</information>\n\n"
        case "web_search":
            return f"\n<result>\n{text}\n</result>\n"
    return f"\n<tool_response>\n{text}\n</tool_response>\n"


def _wrapped(action: str, text: str, closing: str, fence: str, tag: str) -> str:
    """As the call was written: between tags, or in a fence; what the policy has opened itself is only closed."""
    written = action.rstrip(" \n")
    if written.endswith(("```output", "```result")):
        return f"\n{text}\n```\n"
    if opened := _OPENED.search(written):
        return f"\n{text}\n</{opened[1]}>\n"
    if closing not in action and "```" in action:
        if action.count("```") % 2:
            return f"{fence}\n{text}\n```\n"
        return f"\n```{fence}\n{text}\n```\n"
    if "</tool_call>" in action:
        return f"\n<tool_response>\n```{fence}\n{text}\n```\n</tool_response>\n"
    return f"\n<{tag}>\n{text}\n</{tag}>\n"
