"""The formats `llama` and `json`: bare JSON objects in the text, `{"name": "python", "parameters": {"code": "1"}}`."""

import json
import re
from typing import Any

from schemas.events import Call
from tools.formats.format import CallFormat, Functions, read_json, write_json
from tools.formats.hermes import ARGUMENT_KEYS, call_of

_OBJECT = re.compile(r'\{\s*"')


class BareJson(CallFormat):
    """An object with a name and arguments is a call, wherever it stands and whatever else it has; other JSON is text.

    Llama's `<|python_tag|>` before it, and `;`, `,` or white space between several, are text too.
    """

    def __init__(
        self, functions: Functions, keys: tuple[str, str] = ("name", "parameters")
    ) -> None:
        super().__init__(functions)
        self._keys = keys
        texts = r'(?:"\w*"\s*:\s*"[^"\\]*"\s*,\s*)*'  # like "type": "function",
        name = rf'"{re.escape(keys[0])}"\s*:\s*"(?P<name>[^"\\]*)"?'
        self._beginning = re.compile(rf"\{{\s*{texts}{name}")
        self._decoder = json.JSONDecoder()

    def over(self, functions: Functions) -> "BareJson":
        """See CallFormat."""
        return BareJson(functions, self._keys)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        found: list[Call | str] = []
        end = 0
        while opening := _OBJECT.search(text, end):
            start, end = opening.span()
            try:
                value, value_end = self._decoder.raw_decode(text, start)
            except (ValueError, RecursionError):
                beginning = self._beginning.match(text, start)
                # with another name it is no more than like a call
                if beginning and self.functions.find(beginning["name"]):
                    found.append(self._complaint(text[start:]))
                continue
            if not self._is_call(value):
                continue  # one may stand in it
            end = value_end
            strict = read_json(text[start:end])
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

    def _is_call(self, value: dict[str, Any]) -> bool:
        name_key, arguments_key = self._keys
        named = isinstance(value.get(name_key), str)
        return named and any(key in value for key in (arguments_key, *ARGUMENT_KEYS))

    @staticmethod
    def _complaint(rest: str) -> str:
        wrong = read_json(rest)
        return wrong if isinstance(wrong, str) else "The call is not valid JSON."
