"""Tools that are known by what the policy is shown of them, and tools from the text of a file."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import Call, ShownFunction
from schemas.recipe import RemoteTool, Tools
from tools.errors import ToolError
from tools.formats import open_format
from tools.function import bare_argument
from tools.remote import ShownTool, all_tools, read_shown, remote_tools
from tools.sandbox.sandbox import Limits
from tools.sandbox.unsafe import UnsafeSandbox
from tools.source import load_source
from tools.tool import Context, Observation

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
WORD_COUNT = RemoteTool(description="Count the words of a text.", parameters=json.dumps(TEXT))


def test_a_remote_tool_is_shown_and_its_calls_are_read() -> None:
    """After the recipe's own, in every way to write calls; it is not run here."""
    tools = all_tools(Tools(use=["python"], remote={"word_count": WORD_COUNT}))
    assert list(tools) == ["python", "word_count"]
    call = Call(tool="word_count", arguments={"text": "a rose"})
    for name in ("tagged", "fenced", "hermes", "llama", "json"):
        calls = open_format(name, tools, {})
        assert calls.parse(calls.render(call)).calls == [call]
    (schema,) = open_format("hermes", tools, {}).granting(["word_count"]).schemas
    assert schema["function"] == {
        "name": "word_count",
        "description": "Count the words of a text.",
        "parameters": TEXT,
    }


async def test_it_cannot_be_run_here() -> None:
    (tool,) = remote_tools({"word_count": WORD_COUNT}).values()
    context = Context(run=UnsafeSandbox().run, limits=Limits(), task={})
    with pytest.raises(ToolError, match="word_count is served by its own worker"):
        await tool(context, {"text": "a rose"})


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("word_count", "{", r"tools\.remote\.word_count\.parameters"),
        ("word_count", '{"type": "array"}', "the parameters of word_count are no JSON schema"),
        ("word_count", '{"properties": {"text": 3}}', "no JSON schema of an object"),
        ("word count", "{}", "'word count': a name has letters"),
        ("python", "{}", r"tools\.remote\.python is in tools\.use too"),
    ],
)
def test_a_mistake_is_named(name: str, parameters: str, says: str) -> None:
    remote = {name: RemoteTool(description="", parameters=parameters)}
    with pytest.raises(ToolError, match=says):
        all_tools(Tools(use=["python"], remote=remote))


def test_options_are_the_workers() -> None:
    config = Tools(remote={"word_count": WORD_COUNT}, options={"word_count": {"timeout_s": 1.0}})
    with pytest.raises(ToolError, match=r"tools\.options names word_count"):
        all_tools(config)


def test_what_tools_schema_prints_is_read() -> None:
    (tool,) = remote_tools({"word_count": WORD_COUNT}).values()
    (function,) = tool.functions
    shown = read_shown(json.dumps(function.schema).encode())
    assert shown == ShownFunction(
        name="word_count", description="Count the words of a text.", parameters=TEXT
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_a_function_or_a_mistake(data: bytes) -> None:
    """Nothing else is raised by whatever a file holds."""
    try:
        shown = read_shown(data)
    except ToolError:
        return
    assert isinstance(shown, ShownFunction)


@given(
    st.text(max_size=12), st.dictionaries(st.sampled_from(["type", "properties", "required"]), JSON)
)
def test_any_schema_is_shown_or_a_mistake(name: str, parameters: dict[str, object]) -> None:
    """What is accepted can be shown and called in a format that needs more than a name."""
    try:
        tool = ShownTool("t", [ShownFunction(name=name, description="", parameters=parameters)])
    except ToolError:
        return
    assert (
        open_format("hermes", {"t": tool}, {}).schemas[0]["function"]["parameters"]["type"]
        == "object"
    )


# -- from the text of a file -----------------------------------------------------------------------

SOURCE = '''
from tools.tool import Context


class Loud(Exception):
    pass


async def shout(context: Context, text: str, marks: int = 1) -> str:
    """Say it louder."""
    return text.upper() + "!" * marks
'''


async def test_a_tool_is_made_from_text() -> None:
    """With its schema and its options; another text is another tool, and both go on."""
    first = load_source("shout", SOURCE, {"timeout_s": 2.0})
    second = load_source("shout", SOURCE.replace("!", "?"), {})
    assert first.options.timeout_s == 2.0
    assert list(first.functions[0].parameters["properties"]) == ["text", "marks"]
    context = Context(run=UnsafeSandbox().run, limits=Limits(), task={})
    assert await first(context, {"text": "a"}) == Observation(text="A!")
    assert await second(context, {"text": "a"}) == Observation(text="A?")


def test_a_text_that_fails_leaves_no_half_module() -> None:
    """It fails each time, with what it raises."""
    before = set(sys.modules)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
            load_source("shout", "import not_there_at_all", {})
    assert not {name for name in set(sys.modules) - before if name.startswith("tool_source_")}


@pytest.mark.parametrize(
    ("function", "says"),
    [("whisper", "has no attribute 'whisper'"), ("Loud", "neither an async function")],
)
def test_a_text_without_the_function_is_a_mistake(function: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        load_source(function, SOURCE, {})


def test_the_example_can_be_added(tmp_path: Path) -> None:
    """examples/shout_tool.py, by its text alone."""
    text = (Path(__file__).parents[2] / "examples" / "shout_tool.py").read_text()
    assert load_source("shout", text, {}).name == "shout"


@pytest.mark.parametrize("described", [True, {}, {"type": ["string", "null"]}])
def test_a_property_that_may_be_anything_takes_its_name(described: object) -> None:
    """`true` is a JSON schema too; a body without names fills only text and numbers."""
    assert bare_argument({"type": "object", "properties": {"x": described}}) == ""
