"""What holds for every call format, and what is each one's own."""

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from schemas.events import Call
from schemas.task import ChatMessage
from tools.errors import ToolError
from tools.formats import CallFormat, Parsed, open_format, with_functions
from tools.function import FunctionTool
from tools.registry import load_tools
from tools.tool import Context


async def write(context: Context, content: str, path: str | None = None) -> str:
    """Write a file.

    Args:
        content: What it shall hold.
        path: Where.
    """
    return f"{path} {content}"


async def move(context: Context, x: int, y: int, label: str = "") -> str:
    """Move the pen.

    Args:
        x: To the right.
        y: Downwards.
    """
    return f"{x} {y} {label}"


TOOLS = load_tools(["python", "finish"]) | {
    "move": FunctionTool(move),
    "write": FunctionTool(write),
}


def written(shape: str) -> Any:
    """A chat template's part that writes calls, in each of the shapes that models have."""

    def write(calls: list[tuple[str, dict[str, str]]]) -> str:
        match shape:
            case "qwen":
                return "".join(
                    f'\n<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
                    for name, arguments in calls
                )
            case "llama":
                name, arguments = calls[0]
                return json.dumps({"name": name, "parameters": arguments})
            case "mistral":
                listed = [
                    {"name": name, "arguments": arguments, "id": f"zqcallid{index}"}
                    for index, (name, arguments) in enumerate(calls)
                ]
                return f"[TOOL_CALLS] {json.dumps(listed)}"
            case "mistral-11":
                return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)
            case "deepseek":
                body = "\n".join(
                    f"<CALL>function<SEP>{name}\n```json\n{json.dumps(arguments)}\n```<END>"
                    for name, arguments in calls
                )
                return f"<CALLS>{body}<CALLS_END>"
            case "qwen-coder":
                return "".join(
                    f"\n<tool_call>\n<function={name}>\n"
                    + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
                    + "</function>\n</tool_call>"
                    for name, arguments in calls
                )
        return "".join(
            f"\n<tool_call>{name}\n"
            + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in a.items())
            + "</tool_call>"
            for name, a in calls
        )

    return write


SHAPES = ["qwen", "llama", "mistral", "mistral-11", "deepseek", "qwen-coder", "glm"]
FORMATS: dict[str, CallFormat] = {
    name: open_format(name, TOOLS, {}) for name in ("tagged", "fenced", "hermes", "llama", "json")
} | {f"template-{shape}": open_format("template", TOOLS, {}, written(shape)) for shape in SHAPES}
JSON_ONES = ["hermes", "llama", "json", "template-qwen", "template-llama", "template-mistral"]

each_format = pytest.mark.parametrize("name", FORMATS)


def python(code: str) -> Call:
    return Call(tool="python", arguments={"code": code})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MOVES = st.builds(
    lambda arguments: Call(tool="move", arguments=arguments), st.dictionaries(st.text(), JSON)
)
CALLS = st.lists(st.builds(python, st.text()) | MOVES, min_size=1, max_size=3)
QUIET = st.text(st.characters(exclude_characters="<>`{}[]"), max_size=20)
BITS = st.lists(
    st.sampled_from(
        [
            *(
                "<tool_call>",
                "</tool_call>",
                "```",
                "\n```",
                "```python\n",
                "[TOOL_CALLS]",
                "[ARGS]",
            ),
            *("<python>", "</python>", '{"name": "python", ', '"arguments": ', '"parameters": {}'),
            *('{"code": "1"}', "}", "]", "[", '"', "\\", "\n", "1e999", "9" * 30, '"\\ud800"', ","),
            *("<function=python>", "<parameter=code>", "</parameter>", "</function>", "python\n"),
            *("<CALL>function<SEP>", "```json\n", "<END>", "<arg_key>", "</arg_key>\n<arg_value>"),
        ]
    )
).map("".join)


@each_format
@settings(max_examples=40)
@given(text=st.text() | BITS)
def test_no_text_raises(name: str, text: str) -> None:
    """Whatever the policy writes: calls that a message can carry, or words for it."""
    parsed = FORMATS[name].parse(text)
    assert all(isinstance(call.arguments, dict) for call in parsed.calls)


@each_format
@settings(max_examples=40)
@given(calls=CALLS, between=QUIET)
def test_what_is_rendered_is_read_back(name: str, calls: list[Call], between: str) -> None:
    """Any calls with any text between them; what a format cannot hold it refuses to write."""
    calls_format = FORMATS[name]
    try:
        texts = [calls_format.render(call) for call in calls]
    except ValueError:
        assert name not in JSON_ONES, "JSON can say anything"
        return
    text = between + "".join(f"\n{one}\n{between}" for one in texts)
    if name in ("template-mistral", "template-mistral-11"):  # nothing ends a call but the next one
        text = between + "\n".join(texts)
    assert FORMATS[name].parse(text) == Parsed(calls=calls)


@pytest.mark.parametrize("shape", ["qwen-coder", "glm"])
@given(
    code=st.text("\n\t x<", min_size=1) | st.text(),
    before=st.sampled_from(["", "\n", "Now:\n\n"]),
)
@example(code="    pass", before="")
@example(code="x = 1\n", before="")
@example(code="\r\n", before="")
def test_a_text_keeps_its_white_space(shape: str, code: str, before: str) -> None:
    """What the model's template writes around it belongs to the mark, and no more; `render` writes the same."""
    calls_format = FORMATS[f"template-{shape}"]
    call = Call(tool="write", arguments={"content": code, "path": f"{code}."})
    text = written(shape)([("write", call.arguments)])
    assume(not any(mark in code for mark in ("</tool_call>", "</parameter>", "</arg_value>")))
    assert calls_format.parse(before + text) == Parsed(calls=[call])
    assert calls_format.parse(calls_format.render(call)) == Parsed(calls=[call])


@each_format
def test_a_cut_call_is_told(name: str) -> None:
    """Wherever the limit cut it: it never runs, and once it has begun the policy is told."""
    text = FORMATS[name].render(python("print('a')"))
    told = 0
    for length in range(len(text)):
        parsed = FORMATS[name].parse(text[:length])
        rest = text[length:].strip()
        assert not parsed.calls or not rest or rest in ("}", "]"), text[:length]
        told += bool(parsed.feedback)
    assert told > 10


@each_format
def test_a_call_that_was_cut_does_not_take_whole_ones_with_it(name: str) -> None:
    """Those before it are kept."""
    whole, cut = FORMATS[name].render(python("1")), FORMATS[name].render(python("2"))
    parsed = FORMATS[name].parse(f"{whole}\n{cut[:-3]}")
    assert parsed.calls == [python("1")]
    assert parsed.feedback


@each_format
def test_an_unknown_function_is_told_with_what_there_is(name: str) -> None:
    """Where the format's marks do not name the functions themselves."""
    if name in ("tagged", "fenced"):
        return
    text = FORMATS[name].render(python("1")).replace("python", "pyton")
    parsed = FORMATS[name].parse(text)
    assert parsed.calls == []
    assert "'pyton'" in parsed.feedback
    assert "python, finish, move, write" in parsed.feedback


@each_format
def test_a_finish_ends_the_trajectory(name: str) -> None:
    """Its call is the answer; one with wrong arguments is told, since no tool will look at it."""
    finish = Call(tool="finish", arguments={"answer": "forty-two"})
    parsed = FORMATS[name].parse(FORMATS[name].render(finish))
    assert parsed == Parsed(calls=[finish], ends=True)
    wrong = FORMATS["hermes"].parse('<tool_call>{"name": "finish", "arguments": {}}</tool_call>')
    assert wrong == Parsed(feedback="Wrong arguments for finish: `answer` is missing.")


@each_format
def test_a_task_may_be_granted_less(name: str) -> None:
    """What is not granted is no call, and is not shown."""
    full = FORMATS[name]
    granted = full.granting(["move"])
    assert [schema["function"]["name"] for schema in granted.schemas] == ["move"]
    assert granted.parse(full.render(python("1"))).calls == []
    move_call = Call(tool="move", arguments={"x": 1, "y": 2})
    assert granted.parse(full.render(move_call)).calls == [move_call]
    assert full.granting(None) is full


@each_format
def test_stop_strings_end_a_call(name: str) -> None:
    """A turn that stops there holds a whole call."""
    text = FORMATS[name].render(python("1"))
    if name != "fenced":
        assert any(text.endswith(stop) for stop in FORMATS[name].stop) or FORMATS[name].stop == ()


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("hermes", ("</tool_call>",)),
        ("template-qwen", ("</tool_call>",)),
        ("template-qwen-coder", ("</function>\n</tool_call>",)),
        ("template-glm", ("</tool_call>",)),
        ("template-deepseek", ("```<END>",)),
        ("template-llama", ()),
        ("template-mistral", ()),
    ],
)
def test_a_template_is_found_out(name: str, stop: tuple[str, ...]) -> None:
    """By what it writes."""
    assert FORMATS[name].stop == stop


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_template_writes_is_read(shape: str) -> None:
    """One call, and several, as the template itself writes them."""
    calls = [("move", {"x": "1", "y": "2"}), ("python", {"code": "a < b"})]
    for some in (calls[:1], calls[1:], calls):
        if shape == "llama":
            some = some[:1]
        seen = FORMATS[f"template-{shape}"].parse(written(shape)(some)).calls
        values = [(call.tool, {k: str(v) for k, v in call.arguments.items()}) for call in seen]
        assert values == some


@pytest.mark.parametrize("text", ["", "zqname", "call zqname with zqkey and zqvalue", "{}"])
def test_a_template_without_calls_is_refused(text: str) -> None:
    """With what to do."""
    with pytest.raises(ToolError, match=r'tools\.format = "hermes"'):
        open_format("template", TOOLS, {}, lambda _: text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"name": "python", "arguments": "{\\"code\\": \\"1\\"}"}</tool_call>', python("1")),
        ("hermes", '<tool_call>[{"name": "python", "arguments": {"code": "1"}}]</tool_call>', python("1")),
        ("hermes", '<tool_call>{"name": "python", "parameters": {"code": "1"}}</tool_call>', python("1")),
        ("llama", '<|python_tag|>{"name": "python", "parameters": {"code": "1"}}', python("1")),
        ("llama", 'So: {"type": "function", "x": 1} {"name": "python", "arguments": {"code": "1"}}.', python("1")),
        ("llama", '{"type": "function", "name": "python", "parameters": {"code": "1"}}', python("1")),
        ("json", '[{"id": 1, "name": "python", "parameters": {"code": "1"}}]', python("1")),
        ("json", 'So {1}: {"parameters": {"code": "{}"}, "name": "python"}', python("{}")),
        ("json", '{"type": "function", "function": {"parameters": {"code": "1"}, "name": "python"}}', python("1")),
        ("fenced", "```py\n1\n```", python("1")),
        ("fenced", "````python\n1\n````\n", python("1")),
        ("fenced", "```text\n```python\n```\n```python\n1\n```", python("1")),
        ("tagged", '<move>{"x": 1, "y": 2}</move>', Call(tool="move", arguments={"x": 1, "y": 2})),
    ],
)  # fmt: skip
def test_ways_to_write_a_call(name: str, text: str, expected: Call) -> None:
    """As models do."""
    assert FORMATS[name].parse(text) == Parsed(calls=[expected])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("hermes", "<tool_call>{'name': 'python'}</tool_call>", "not valid JSON"),
        ("hermes", "<tool_call>[]</tool_call>", "must be a JSON object"),
        ("hermes", '<tool_call>"python"</tool_call>', "must be a JSON object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'needs "name"'),
        ("hermes", '<tool_call>{"name": "python", "arguments": [1]}</tool_call>', "must be a JSON"),
        ("hermes", f'<tool_call>{{"name": "move", "arguments": {{"x": {"9" * 40}}}}}</tool_call>', "too large"),
        ("hermes", "</tool_call>", "without <tool_call> before it"),
        ("llama", '{"name": "python", "parameters": {"code": 1', "not valid JSON"),
        ("llama", '{"type": "function", "name": "python", "parameters": {"code": 1', "not valid JSON"),
        ("json", '{"parameters": {}, "name": "pyton"}', "no function 'pyton'"),
        ("json", f'{{"name": "move", "parameters": {{"x": {"9" * 5000}}}}}', "out of range"),
        ("tagged", "<move>1</move>", "must be a JSON object"),
    ],
)  # fmt: skip
def test_malformed_calls_are_told(name: str, text: str, says: str) -> None:
    """In a short line, and the policy gets another turn."""
    parsed = FORMATS[name].parse(text)
    assert parsed.calls == []
    assert says in parsed.feedback
    assert len(parsed.feedback) < 200


@pytest.mark.parametrize(
    "text",
    [
        *('{"name": "Ann"}', '{"names": 1}', 'The set {1, 2}. {"name": "x', '{"parameters": {}}'),
        *('{"text": "{\\"name\\": \\"python\\", \\"parameters\\": {}}"}', '{"name": 1, "parameters": {}}'),
        *("{" * 5000, '{"a":' * 5000, '{"x": ' + "9" * 5000),
    ],
)  # fmt: skip
def test_json_that_is_no_call_is_text(text: str) -> None:
    """An answer may be JSON."""
    assert FORMATS["json"].parse(text) == Parsed()


def test_functions_are_written_into_the_system_message() -> None:
    """At the end of the one there is, or in a new one; with names, types and how to call."""
    user = ChatMessage(role="user", content="?")
    system = ChatMessage(role="system", content="Be brief.")
    for before in ([user], [system, user]):
        first, *rest = with_functions(before, FORMATS["hermes"])
        assert rest == [user]
        assert first.role == "system"
        for part in ("Move the pen.", "To the right.", "<tool_call>", '"required":["x","y"]'):
            assert part in first.content
    assert first.content.startswith("Be brief.\n\n")
    assert with_functions([user], open_format("hermes", {}, {})) == [user]


@pytest.mark.timeout(60)  # it took hours
def test_fences_that_are_never_closed_cost_no_more_than_their_length() -> None:
    """Each is complained of; a longer one is not looked for where a shorter one was not found."""
    parsed = open_format("fenced", load_tools(["python"]), {}).parse(
        "````python\n```python\n" * 50_000
    )
    assert parsed.calls == []
    assert "cut off" in parsed.feedback
