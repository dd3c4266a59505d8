"""The format `template`: calls as the model's own chat template writes them, found out by letting it write some.

{"name": "zqname", "parameters": {"zqkey": "zqvalue"}}                      → bare JSON
<tool_call>{"name": "zqname", "arguments": {"zqkey": "zqvalue"}}</tool_call>   → JSON between marks
[TOOL_CALLS]zqname[ARGS]{"zqkey": "zqvalue"}                                → a name, then JSON
<function=zqname><parameter=zqkey>zqvalue</parameter></function>               → a name, then its arguments one by one
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from schemas.events import Call
from tools.errors import ToolError
from tools.formats.format import CallFormat, Functions, read_json, write_json
from tools.formats.hermes import Hermes
from tools.formats.llama import BareJson

Write = Callable[[list[tuple[str, dict[str, str]]]], str]
"""What the chat template writes for a turn with these calls (name, arguments)."""

_NAME, _KEY, _VALUE = "zqname", "zqkey", "zqvalue"
_CALL = (_NAME, {_KEY: _VALUE})


def open_template(functions: Functions, write: Write) -> CallFormat:
    """The format that the template has. Raises ToolError if none can be made out."""
    one, two = write([_CALL]), write([_CALL, _CALL])
    if found := _json_with_name(one, two):
        begin, end, keys = found
        return Hermes(functions, begin, end, keys) if begin else BareJson(functions, keys)
    if frame := _name_then_json(one, two) or _name_then_pairs(one, write):
        return Framed(functions, frame)
    raise ToolError(
        "no_call_format",
        f'the chat template writes no calls that can be read, but {one[:200]!r}: use tools.format = "hermes"',
    )


class Pairs(NamedTuple):
    """What stands around an argument's name and value."""

    begin: str
    after_key: str
    end: str


class Frame(NamedTuple):
    """What stands around a call's name and arguments."""

    begin: str
    after_name: str
    end: str
    pairs: Pairs | None = None
    """None: the arguments are JSON."""


class Framed(CallFormat):
    """A name, then the arguments, between marks; white space in the marks may differ."""

    def __init__(self, functions: Functions, frame: Frame) -> None:
        super().__init__(functions)
        self._frame = frame
        self.stop = (frame.end.strip(),) if frame.end.strip() else ()
        self._begin, self._after_name, self._end = (_loose(mark) for mark in frame[:3])

    def over(self, functions: Functions) -> "Framed":
        """See CallFormat."""
        return Framed(functions, self._frame)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        found: list[Call | str] = []
        position = 0
        while begin := self._begin.search(text, position):
            position = begin.end()
            mark = self._end if self.stop else self._begin
            end = mark.search(text, position)
            if end is None and self.stop:
                opening = self._frame.begin.strip()
                found.append(
                    f"{opening} without {self.stop[0]}: the call was cut off and did not run."
                )
                continue
            body = text[position : end.start() if end else len(text)]
            found.append(self._call(body))
            position = end.end() if end and self.stop else position + len(body)
        return found

    def render(self, call: Call) -> str:
        """See CallFormat."""
        function, arguments = self.functions.written(call)
        frame = self._frame
        pairs = self._frame.pairs
        if pairs is None:
            body = f"{function.name}{frame.after_name}{write_json(arguments)}"
        else:
            body = f"{function.name}{frame.after_name}" + "".join(
                f"{pairs.begin}{key}{pairs.after_key}"
                f"{value if isinstance(value, str) else write_json(value)}{pairs.end}"
                for key, value in arguments.items()
            )
        text = f"{frame.begin}{body}{frame.end}"
        if self.read(text) != [call]:
            raise ValueError(
                "the call holds marks of its format, or a text that would be read as a value"
            )
        return text

    def explain(self) -> str:
        """See CallFormat."""
        frame = self._frame
        inside = "<arguments as JSON object>"
        if frame.pairs:
            inside = f"{frame.pairs.begin}<argument>{frame.pairs.after_key}<value>{frame.pairs.end}"
        example = f"{frame.begin}<function>{frame.after_name}{inside}{frame.end}"
        return f"To call a function, write:\n{example.strip()}"

    def _call(self, body: str) -> Call | str:
        after = self._after_name.search(body)
        name = (body[: after.start()] if after else body).strip()
        rest = body[after.end() :] if after else ""
        if self._frame.pairs is None:
            arguments = read_json(rest.strip()) if after else "The call has no arguments."
            return arguments if isinstance(arguments, str) else self.functions.call(name, arguments)
        return self.functions.call(name, dict(self._pairs(name, rest, self._frame.pairs)))

    def _pairs(self, name: str, text: str, pairs: Pairs) -> Iterator[tuple[str, Any]]:
        function = self.functions.find(name)
        properties = function.parameters.get("properties", {}) if function else {}
        begin, after_key, end = (_loose(mark).pattern for mark in pairs)
        # a text keeps its white space, but for the one newline that belongs to a mark
        after_key = after_key.removesuffix(r"\s*") + r"\n?" * pairs.after_key.endswith("\n")
        end = r"\n?" * pairs.end.startswith("\n") + end.removeprefix(r"\s*")
        for key, value in re.findall(f"{begin}(.*?){after_key}(.*?)(?:{end}|\\Z)", text, re.DOTALL):
            wanted = properties.get(key.strip(), {}).get("type")
            known = read_json(value) if wanted != "string" else value
            yield key.strip(), value if isinstance(known, str) else known


def _json_with_name(one: str, two: str) -> tuple[str, str, tuple[str, str]] | None:
    """The marks around an object that holds name and arguments, and their keys."""
    at = one.find(_NAME)
    for start in (i for i in range(at, -1, -1) if one[i : i + 1] == "{"):
        value, end = _object_at(one, start)
        keys = {_as_key(item): key for key, item in (value or {}).items()}
        if not {"name", "arguments"} <= set(keys):
            continue
        begin, close = _core(one[:start], one[end:], two, one[start:end])
        begin, close = begin.strip(), close.strip()
        if "{" in begin:
            return None
        return begin, close, (keys["name"], keys["arguments"])
    return None


def _as_key(item: Any) -> str:
    if item == _NAME:
        return "name"
    if item == _CALL[1] or (isinstance(item, str) and _KEY in item):
        return "arguments"
    return ""


def _name_then_json(one: str, two: str) -> Frame | None:
    """The marks around a name and a JSON object."""
    name = one.find(_NAME)
    start = one.find("{", name)
    value, end = _object_at(one, start) if 0 <= name < start else (None, 0)
    if value != _CALL[1]:
        return None
    begin, close = _core(one[:name], one[end:], two, one[name:end])
    after_name = one[name + len(_NAME) : start]
    return Frame(begin, after_name, close) if begin.strip() and after_name.strip() else None


def _name_then_pairs(one: str, write: Write) -> Frame | None:
    """The marks around a name, and around each argument's name and value."""
    places = [one.find(mark) for mark in (_NAME, _KEY, _VALUE)]
    if -1 in places or places != sorted(places):
        return None
    name, key, value = places
    both = write([(_NAME, {_KEY: _VALUE, f"{_KEY}2": _VALUE})])
    between = both[both.find(_VALUE) + len(_VALUE) : both.find(f"{_KEY}2")]
    head = one[name + len(_NAME) : key]
    opening = between.rfind("<")
    if opening < 0 or not head.endswith(between[opening:]):
        return None
    pairs = Pairs(between[opening:], one[key + len(_KEY) : value], between[:opening].rstrip())
    tail = one[value + len(_VALUE) :]
    if not tail.startswith(pairs.end):
        return None
    after_name = head.removesuffix(pairs.begin)
    return Frame(one[:name], after_name, tail.removeprefix(pairs.end).rstrip(), pairs)


def _core(before: str, after: str, two: str, call: str) -> tuple[str, str]:
    """The marks that belong to each call, and not to all of a turn's together."""
    first = two.find(call)
    second = two.find(call, first + len(call))
    between = two[first + len(call) : second] if second > first >= 0 else ""
    begin = _ending(before, between)
    if not begin.strip():  # calls in a list
        return before.rstrip().removesuffix("["), ""
    return begin, _beginning(after, between[: len(between) - len(begin)])


def _beginning(one: str, two: str) -> str:
    """What both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
    return "".join(character for character, _ in same)


def _ending(one: str, two: str) -> str:
    return _beginning(one[::-1], two[::-1])[::-1]


def _object_at(text: str, start: int) -> tuple[dict[str, Any] | None, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError:
        return None, start
    return (value, end) if isinstance(value, dict) else (None, start)


def _loose(mark: str) -> re.Pattern[str]:
    """The mark, whatever white space stands in it and at its ends."""
    words = [re.escape(word) for word in mark.split()]
    return re.compile(r"\s*" + r"\s*".join(words) + r"\s*" if words else r"\s*\n\s*")
