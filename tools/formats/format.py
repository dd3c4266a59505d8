"""What a call format is, and what the formats share: which functions there are, and JSON that a message can hold."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from schemas.events import Call
from schemas.task import ChatMessage
from tools.tool import Function, Tool


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one turn's text."""

    calls: list[Call] = []
    """In the order they were written."""
    feedback: str = ""
    """For the policy: what could not be read as a call, and why. Calls beside it are whole."""
    ends: bool = False
    """One of the calls is the trajectory's answer: the turn is the last, and none of its calls is run."""


class Functions:
    """The functions that a policy may call, by name, and the tool behind each."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.tools = tools
        self._owners = {f.name: (tool, f) for tool in tools.values() for f in tool.functions}

    def __iter__(self) -> Iterator[Function]:
        return (function for _, function in self._owners.values())

    def find(self, name: str) -> Function | None:
        """The function of the name."""
        _, function = self._owners.get(name, (None, None))
        return function

    def call(self, name: str, arguments: Any) -> Call | str:
        """The call, or what is wrong with it. Types are the tool's to check, when it runs."""
        tool, _ = self._owners.get(name, (None, None))
        if tool is None:
            known = ", ".join(self._owners) or "none"
            return f"There is no function {_short(name)}; there are: {known}."
        if not isinstance(arguments, dict):
            return f"The arguments of {name} must be a JSON object."
        if name != tool.name:  # one of several
            arguments = {"function": name, "arguments": arguments}
        return Call(tool=tool.name, arguments=arguments)

    def written(self, call: Call) -> tuple[Function, dict[str, Any]]:
        """The function that a call names, and the arguments as they were written. Raises ValueError for a stranger."""
        name, arguments = call.tool, call.arguments
        if self.find(name) is None and set(arguments) == {"function", "arguments"}:
            name, arguments = arguments["function"], arguments["arguments"]
        function = self.find(name) if isinstance(name, str) else None
        if function is None or not isinstance(arguments, dict):
            raise ValueError(f"no function for {call!r}")
        return function, arguments

    def bare(self, name: str, body: str) -> Call | str:
        """A call whose body gives no names: it is the function's one argument, or a JSON object of all."""
        function = self.find(name)
        if function is None or not function.argument:
            arguments = read_json(body) if body.strip() else {}
            return arguments if isinstance(arguments, str) else self.call(name, arguments)
        return self.call(name, {function.argument: body})

    def bare_body(self, call: Call) -> tuple[Function, str]:
        """What `bare` reads. Raises ValueError for a call that cannot be written so."""
        function, arguments = self.written(call)
        if not function.argument:
            return function, write_json(arguments)
        body = arguments.get(function.argument)
        if not isinstance(body, str) or len(arguments) != 1:
            raise ValueError(f"the body holds {function.argument!r} alone, as text: {arguments!r}")
        return function, body

    def parsed(self, found: Sequence[Call | str]) -> Parsed:
        """Calls and complaints as they were found, in order."""
        complaints = [one for one in found if isinstance(one, str)]
        calls: list[Call] = []
        ends = False
        for one in found:
            if isinstance(one, str):
                continue
            tool = self.tools[one.tool]
            if tool.ends:  # nobody else will look at its arguments
                if wrong := tool.check(one):
                    complaints.append(f"{wrong}.")
                    continue
                ends = True
            calls.append(one)
        return Parsed(calls=calls, feedback=" ".join(dict.fromkeys(complaints)), ends=ends)


class CallFormat(abc.ABC):
    """One way to write calls."""

    stop: tuple[str, ...] = ()
    """Where sampling may stop, since a call is complete; kept in the text."""

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        self._granting: dict[tuple[str, ...], CallFormat] = {}

    def parse(self, text: str) -> Parsed:
        """Find the calls in one turn's text. Never raises: what is malformed becomes feedback."""
        return self.functions.parsed(self.read(text))

    @abc.abstractmethod
    def read(self, text: str) -> list[Call | str]:
        """The calls in the text, and complaints about what is like a call, in order. Never raises."""

    @abc.abstractmethod
    def render(self, call: Call) -> str:
        """Write a call as `parse` reads it. Raises ValueError for one that the format cannot hold."""

    @abc.abstractmethod
    def explain(self) -> str:
        """How to write a call, for the policy."""

    @abc.abstractmethod
    def over(self, functions: Functions) -> "CallFormat":
        """The same format for other functions."""

    def granting(self, names: Sequence[str] | None) -> "CallFormat":
        """The format for a task that is granted only these tools; None grants all."""
        if names is None:
            return self
        key = tuple(names)
        if key not in self._granting:
            tools = {name: tool for name, tool in self.functions.tools.items() if name in key}
            self._granting[key] = self.over(Functions(tools))
        return self._granting[key]

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The functions as chat templates take them."""
        return [function.schema for function in self.functions]


def with_functions(messages: Sequence[ChatMessage], calls: CallFormat) -> list[ChatMessage]:
    """The conversation with what may be called, and how, at the end of its system message."""
    functions = "\n".join(
        msgspec.json.encode(schema["function"]).decode() for schema in calls.schemas
    )
    text = f"You may call these functions:\n{functions}\n\n{calls.explain()}"
    if not calls.schemas:
        return list(messages)
    if messages and messages[0].role == "system":
        content = f"{messages[0].content}\n\n{text}"
        system = msgspec.structs.replace(messages[0], content=content)
        return [system, *messages[1:]]
    return [ChatMessage(role="system", content=text), *messages]


_NOT_USABLE = "The call is not usable: a number is too large, or it is nested too deeply."


def _fits(value: Any, depth: int = 64) -> bool:
    """Whether it is nested no deeper: whoever takes it on, an MCP server say, could not write it down again."""
    if not isinstance(value, dict | list):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_fits(each, depth - 1) for each in inside)


def read_json(text: str) -> Any | str:
    """A JSON value that a message can carry, or a complaint."""
    try:
        value = msgspec.json.decode(text)
        msgspec.msgpack.encode(value)  # numbers beyond 64 bits are JSON, but no message holds them
    except (msgspec.DecodeError, UnicodeError) as error:
        return f"The call is not valid JSON: {error}."
    except (OverflowError, RecursionError):
        return _NOT_USABLE
    if not _fits(value):
        return _NOT_USABLE
    return "The call must be a JSON object, not a text." if isinstance(value, str) else value


def write_json(value: Any) -> str:
    """What `read_json` reads, with the spaces that models are used to. Raises ValueError for what JSON cannot hold."""
    try:
        flat = msgspec.json.encode(value)
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    return msgspec.json.format(flat, indent=0).decode()


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:40]}…")
