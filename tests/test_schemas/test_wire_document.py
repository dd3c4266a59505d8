"""docs/wire.md ends with tables and an example that are made from the schemas; run this file to make them anew."""

import ast
import inspect
import json
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec

from bus import subjects
from bus.codec import decode, encode
from bus.work import work_message
from schemas.events import Admitted, AnyEvent, Call, Event, Result, Started, Turn
from schemas.images import StoredImage
from schemas.messages import DeadLetter, Heartbeat, Held, Work
from schemas.task import ChatMessage, PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory, fold

DOCS = Path(__file__).parents[2] / "docs" / "wire.md"
HEADING = "## The messages\n"
RUN = "demo"

MESSAGES: list[type[msgspec.Struct]] = [
    Work,
    Trajectory,
    Admitted,
    PublicPart,
    ChatMessage,
    Turn,
    Tokens,
    Call,
    Result,
    StoredImage,
    Started,
    Heartbeat,
    Held,
    DeadLetter,
]

ADMITTED = Admitted(
    replica="dispatcher-host-1",
    trajectory="g12-3-0",
    task="poem",
    public=PublicPart(
        messages=[ChatMessage(role="user", content="How many words: a rose is a rose")]
    ),
    private_key="g12",
    seed=2**62,
)
TURN = Turn(
    replica="generator-host-2",
    trajectory="g12-3-0",
    tokens=Tokens.given([1, 2]) + Tokens.sampled([3], [-0.25], [7]),
    text="<word_count>a rose is a rose</word_count>",
    calls=[Call(tool="word_count", arguments={"text": "a rose is a rose"})],
)
RESULT = Result(
    replica="toolbox-host-3", trajectory="g12-3-0", turn=0, call=0, text="5", duration_ms=0.5
)


def tables() -> str:
    """A table for each message: its fields, what they are in msgpack, what they are without, what they mean."""
    parts = [HEADING]
    for message in MESSAGES:
        parts += [f"### {message.__name__}", "", (inspect.getdoc(message) or "").partition("\n")[0]]
        parts += ["", "| field | msgpack | default | |", "| --- | --- | --- | --- |"]
        if issubclass(message, Event):
            kind = message.__struct_config__.tag
            parts.append(f"| `kind` | str | | `{kind}` |")
        said = meanings(message)
        for field in msgspec.structs.fields(message):
            text = said.get(field.name, "")
            parts.append(
                f"| `{field.name}` | {in_msgpack(field.type)} | {default(field)} | {text} |"
            )
        parts.append("")
    return "\n".join(parts)


def meanings(message: type[msgspec.Struct]) -> dict[str, str]:
    """What stands below each field in the source."""
    found: dict[str, str] = {}
    for kind in reversed(message.__mro__):
        if not issubclass(kind, msgspec.Struct) or kind is msgspec.Struct:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, said in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = said.value if isinstance(said, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = " ".join(text.value.split())
    return found


def in_msgpack(kind: Any) -> str:
    """A type as msgpack knows it."""
    if get_origin(kind) is Annotated:  # with its limits
        return in_msgpack(get_args(kind)[0])
    plain = {str: "str", int: "int", float: "float", bool: "bool", bytes: "bin", Any: "any"}
    if kind in plain:
        return plain[kind]
    if kind is type(None):
        return "nil"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return f"array of {in_msgpack(arguments[0])}"
    if origin is dict:
        return f"map of {in_msgpack(arguments[0])} to {in_msgpack(arguments[1])}"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(in_msgpack, arguments))
    return f"{kind.__name__}"


def default(field: msgspec.structs.FieldInfo) -> str:
    """What a field is when it is absent; nothing for one that must be there."""
    value = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    return "" if value is msgspec.NODEFAULT else f"`{msgspec.json.encode(value).decode()}`"


def example() -> str:
    """One call from the work message to the next one, as this code writes them."""
    before = fold(fold(None, ADMITTED, 41), TURN, 57)
    after = fold(before, RESULT, 58)
    scope = subjects.trajectory(RUN, "g12-3-0")
    parts = [
        "## Example",
        "",
        "A run `demo` in which `word_count` is called. Its trajectory's last event has the sequence 57.",
        f"This comes from the consumer `{subjects.durable(RUN, 'word_count')}`, published on "
        f"`{subjects.work('tool', RUN, 'word_count')}`:",
        shown(work_message(before)),
        f"The result, on `{subjects.trajectory(RUN, 'g12-3-0', 'result')}`, with the headers "
        f"`Nats-Expected-Last-Subject-Sequence: 57` and "
        f"`Nats-Expected-Last-Subject-Sequence-Subject: {scope}`:",
        shown(encode(RESULT)),
        f"It is stored as 58. Then, on `{subjects.work('gen', RUN)}`, with `Nats-Msg-Id: demo.g12-3-0.58.0`:",
        shown(work_message(after, with_state=False)),
        "And `+ACK` to the reply subject of the first message.",
        "",
    ]
    return "\n".join(parts)


def shown(data: bytes) -> str:
    """A message as JSON, where `{\"bin\": …}` stands for bytes, and as its bytes in hexadecimal."""
    text = json.dumps(decode(data, Any), indent=1, default=lambda value: {"bin": value.hex()})
    return "\n".join(
        ["", "```json", text, "```", "", "```hex", *textwrap.wrap(data.hex(), 100), "```", ""]
    )


def generated() -> str:
    return tables() + "\n" + example()


def test_the_document_says_what_the_code_does() -> None:
    """Every field with its form, its default and its meaning, and the bytes of a call."""
    assert DOCS.read_text().endswith(HEADING + generated().removeprefix(HEADING))


def test_the_example_is_what_is_sent() -> None:
    """Whoever reads the bytes of the document has the very messages, and the least that a worker may send is read."""
    blocks = DOCS.read_text().split("```hex\n")[1:]
    sent = [bytes.fromhex("".join(block.partition("```")[0].split())) for block in blocks]
    work, result, following = (
        decode(sent[0], Work),
        decode(sent[1], AnyEvent),
        decode(sent[2], Work),
    )
    assert work.state is not None
    assert work.state.next_call == (0, TURN.calls[0])
    assert result == RESULT
    assert (following.trajectory, following.seq, following.state) == ("g12-3-0", 58, None)
    least = {"kind": "result", "trajectory": "g12-3-0", "turn": 0, "call": 0, "text": "5"}
    assert decode(encode(least), Result) == Result(trajectory="g12-3-0", turn=0, call=0, text="5")


def write() -> None:
    text = DOCS.read_text()
    DOCS.write_text(text.partition(HEADING)[0] + generated())


if __name__ == "__main__":
    write()
