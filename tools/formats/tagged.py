"""The format `tagged`: `<python>print(1)</python>`. The tag names the function, the body fills its argument."""

import re
from collections.abc import Mapping

from schemas.events import Call
from tools.formats.format import CallFormat, Functions


class Tagged(CallFormat):
    """One newline after the opening tag and one before the closing tag belong to the tags.

    A body reaches to the first closing tag of its own; other tags in it are part of it.
    """

    def __init__(self, functions: Functions, tags: Mapping[str, str]) -> None:
        """`tags`: of functions that have another tag than their name."""
        super().__init__(functions)
        self._renamed = tags
        self._tags = {f.name: tags.get(f.name, f.name) for f in functions}
        self._names = {tag: name for name, tag in self._tags.items()}
        words = "|".join(re.escape(tag) for tag in self._names) or "(?!)"
        self._tag = re.compile(rf"<(?P<slash>/?)(?P<name>{words})(?P<rest>\s[^<>]*)?>")
        self.stop = tuple(f"</{tag}>" for tag in self._names)

    def over(self, functions: Functions) -> "Tagged":
        """See CallFormat."""
        return Tagged(functions, self._renamed)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        found: list[Call | str] = []
        position = 0
        while tag := self._tag.search(text, position):
            name, position = tag["name"], tag.end()
            if tag["slash"]:
                found.append(f"</{name}> without <{name}> before it.")
                continue
            if tag["rest"] is not None:
                found.append(f"<{name}> takes nothing inside the tag.")
            end = text.find(f"</{name}>", position)
            if end < 0:
                found.append(f"<{name}> without </{name}>: the call was cut off and did not run.")
                continue
            if tag["rest"] is None:
                body = text[position:end].removeprefix("\n").removesuffix("\n")
                found.append(self.functions.bare(self._names[name], body))
            position = end + len(f"</{name}>")
        return found

    def render(self, call: Call) -> str:
        """See CallFormat."""
        function, body = self.functions.bare_body(call)
        tag = self._tags[function.name]
        if f"</{tag}>" in body:
            raise ValueError(f"the body holds </{tag}>, which would end it")
        return f"<{tag}>\n{body}\n</{tag}>"

    def explain(self) -> str:
        """See CallFormat."""
        lines = ["To call a function, write its tag with what it takes inside:"]
        for function in self.functions:
            tag = self._tags[function.name]
            inside = function.argument or '{"argument": value, …} as JSON'
            lines.append(f"<{tag}>{inside}</{tag}>")
        return "\n".join(lines)
