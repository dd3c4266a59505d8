"""The formats `llama` and `json`: bare JSON objects in the text, `{"name": "python", "parameters": {"code": "1"}}`."""

import json
import re

from schemas.events import Call
from tools.formats.format import CallFormat, Functions, read_json, write_json
from tools.formats.hermes import ARGUMENT_KEYS, call_of


class BareJson(CallFormat):
    """An object with a name and arguments is a call, wherever it stands; other JSON is text.

    Llama's `<|python_tag|>` before it, and `;`, `,` or white space between several, are text too.
    """

    def __init__(
        self, functions: Functions, keys: tuple[str, str] = ("name", "parameters")
    ) -> None:
        super().__init__(functions)
        self._keys = keys
        self._start = re.compile(rf'\{{\s*"{re.escape(keys[0])}"\s*:\s*"(?P<name>[^"\\]*)"?')
        self._decoder = json.JSONDecoder()

    def over(self, functions: Functions) -> "BareJson":
        """See CallFormat."""
        return BareJson(functions, self._keys)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        found: list[Call | str] = []
        position = 0
        while start := self._start.search(text, position):
            try:
                value, end = self._decoder.raw_decode(text, start.start())
            except (json.JSONDecodeError, RecursionError):
                position = start.end()
                if self.functions.find(start["name"]):  # else it is no more than like a call
                    found.append(self._complaint(text[start.start() :]))
                continue
            position = end
            if any(key in value for key in (self._keys[1], *ARGUMENT_KEYS)):
                strict = read_json(text[start.start() : end])
                wrong = isinstance(strict, str)
                found.append(strict if wrong else call_of(self.functions, strict, self._keys))
        return found

    def render(self, call: Call) -> str:
        """See CallFormat."""
        function, arguments = self.functions.written(call)
        return write_json(dict(zip(self._keys, (function.name, arguments), strict=True)))

    def explain(self) -> str:
        """See CallFormat."""
        name_key, arguments_key = self._keys
        example = f'{{"{name_key}": <function>, "{arguments_key}": <arguments as JSON object>}}'
        return f"To call a function, write a JSON object:\n{example}"

    @staticmethod
    def _complaint(rest: str) -> str:
        wrong = read_json(rest)
        return wrong if isinstance(wrong, str) else "The call is not valid JSON."
