"""The format `hermes`, Qwen's too: `<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>`."""

from typing import Any

from schemas.events import Call
from tools.formats.format import CallFormat, Functions, read_json, write_json

ARGUMENT_KEYS = ("arguments", "parameters")


class Hermes(CallFormat):
    """JSON between two marks; a body reaches to the first closing mark. A list of calls in one pair is read too."""

    def __init__(
        self,
        functions: Functions,
        begin: str = "<tool_call>",
        end: str = "</tool_call>",
        keys: tuple[str, str] = ("name", "arguments"),
    ) -> None:
        """`end` may be empty: then a body reaches to the next `begin` or the end of the turn."""
        super().__init__(functions)
        self._begin, self._end, self._keys = begin, end, keys
        self.stop = (end,) if end else ()

    def over(self, functions: Functions) -> "Hermes":
        """See CallFormat."""
        return Hermes(functions, self._begin, self._end, self._keys)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        found: list[Call | str] = []
        before, *pieces = text.split(self._begin)
        if self._end and self._end in before:
            found.append(f"{self._end} without {self._begin} before it.")
        for piece in pieces:
            body, closed, after = piece.partition(self._end) if self._end else (piece, "", "")
            if self._end and not closed:
                complaint = (
                    f"{self._begin} without {self._end}: the call was cut off and did not run."
                )
                found.append(complaint)
                continue
            found += self._calls(body)
            if closed and self._end in after:
                found.append(f"{self._end} without {self._begin} before it.")
        return found

    def render(self, call: Call) -> str:
        """See CallFormat."""
        function, arguments = self.functions.written(call)
        name_key, arguments_key = self._keys
        body = write_json({name_key: function.name, arguments_key: arguments})
        for mark in filter(None, (self._begin, self._end)):  # inside a JSON string
            body = body.replace(mark, f"\\u{ord(mark[0]):04x}{mark[1:]}")
        if any(mark in body for mark in (self._begin, self._end) if mark):
            raise ValueError(f"the body holds {self._begin} or {self._end}, which would end it")
        return f"{self._begin}\n{body}\n{self._end}"

    def explain(self) -> str:
        """See CallFormat."""
        name_key, arguments_key = self._keys
        example = f'{{"{name_key}": <function>, "{arguments_key}": <arguments as JSON object>}}'
        return f"To call a function, write:\n{self._begin}\n{example}\n{self._end}"

    def _calls(self, body: str) -> list[Call | str]:
        value = read_json(body.strip())
        values: list[Any] = value if isinstance(value, list) and value else [value]
        return [
            one
            if isinstance(one, str) and one is value
            else call_of(self.functions, one, self._keys)
            for one in values
        ]


def call_of(functions: Functions, value: Any, keys: tuple[str, str]) -> Call | str:
    """The call that a JSON object describes, or what is wrong with it."""
    if not isinstance(value, dict):
        return "The call must be a JSON object."
    name = value.get(keys[0])
    if not isinstance(name, str):
        return f'The call needs "{keys[0]}", the name of a function.'
    key = next((key for key in (keys[1], *ARGUMENT_KEYS) if key in value), "")
    arguments = value[key] if key else {}
    if isinstance(arguments, str):  # JSON inside JSON, as some interfaces write it
        arguments = read_json(arguments)
        if isinstance(arguments, str):
            return arguments
    return functions.call(name, arguments)
