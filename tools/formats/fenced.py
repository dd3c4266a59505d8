"""The format `fenced`: Markdown code blocks whose first word names the function."""

import re
from collections.abc import Mapping

from schemas.events import Call
from tools.formats.format import CallFormat, Functions

_ALIASES = {"python": ("py", "python3"), "bash": ("sh", "shell")}
_OPENING = re.compile(r"^(?P<fence>`{3,})[ \t]*+(?P<word>[\w-]*+)[^`\n]*+$", re.MULTILINE)


class Fenced(CallFormat):
    """A block ends at a line of at least as many backticks as it began with; blocks of other words are text.

    Sampling stops where the policy begins to write a result itself.
    """

    stop = ("```output", "```result")

    def __init__(self, functions: Functions, tags: Mapping[str, str]) -> None:
        """`tags`: of functions that have another word than their name."""
        super().__init__(functions)
        self._renamed = tags
        self._words = {f.name: tags.get(f.name, f.name) for f in functions}
        self._names = {word: name for name, word in self._words.items()}
        for name, words in _ALIASES.items():
            if name in self._words and name not in tags:
                self._names = dict.fromkeys(words, name) | self._names

    def over(self, functions: Functions) -> "Fenced":
        """See CallFormat."""
        return Fenced(functions, self._renamed)

    def read(self, text: str) -> list[Call | str]:
        """See CallFormat."""
        found: list[Call | str] = []
        position, unclosed = 0, len(text)
        while opening := _OPENING.search(text, position):
            fence, word = opening["fence"], opening["word"]
            position = opening.end()
            closing = re.compile(rf"^`{{{len(fence)},}}[ \t\r]*$", re.MULTILINE)
            # what closes a longer fence would have closed a shorter one
            end = closing.search(text, position + 1) if len(fence) < unclosed else None
            name = self._names.get(word)
            if end is None:
                unclosed = min(unclosed, len(fence))
                if name is not None:
                    found.append(
                        f"{fence}{word} without {fence} on a line of its own at the end: "
                        "the call was cut off and did not run."
                    )
                continue
            if name is not None:
                body = text[position + 1 : end.start()].removesuffix("\n")
                found.append(self.functions.bare(name, body))
            position = end.end()
        return found

    def render(self, call: Call) -> str:
        """See CallFormat."""
        function, body = self.functions.bare_body(call)
        inside = [len(run) for run in re.findall(r"^`{3,}", body, re.MULTILINE)]
        fence = "`" * max(3, *(length + 1 for length in inside)) if inside else "```"
        return f"{fence}{self._words[function.name]}\n{body}\n{fence}"

    def explain(self) -> str:
        """See CallFormat."""
        lines = ["To call a function, write a code block whose first word names it:"]
        for function in self.functions:
            inside = function.argument or '{"argument": value, …} as JSON'
            lines.append(f"```{self._words[function.name]}\n{inside}\n```")
        return "\n".join(lines)
