"""Names to tools, functions as tools, and the tools that are there."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas.events import Call
from schemas.images import PLACEHOLDER
from tools.errors import ToolError, UnknownTool
from tools.function import FunctionTool, tool
from tools.observation import decode_output, shorten, shorten_observation
from tools.registry import load_tools, open_tools, tool_names
from tools.sandbox import root
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits
from tools.sandbox.select import open_sandbox
from tools.tool import Context, Image, Observation, Options, Place, Tool

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture
async def context() -> AsyncIterator[Context]:
    """With a real sandbox."""
    sandbox = NamespaceSandbox()
    yield Context(run=sandbox.run, limits=Limits(wall_s=60.0), task={"mark": "?"})
    await sandbox.close()


# -- the python tool ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "ok"),
    [
        ("1 + 1", "2\n", True),
        ("x = 1", "(no output)", True),
        (
            "import time\nprint('a', end='', flush=True)\ntime.sleep(9)",
            "a\nTimed out after 0.5 s.",
            False,
        ),
        ("import sys\nsys.stdout.buffer.write(b'\\xff')\nNone", "\ufffd", True),
        ("import sys; sys.exit(3)", "Ended with exit code 3.", False),
        ("import os; os.abort()", "Killed by SIGABRT.", False),
    ],
)
async def test_the_python_tool_says_what_happened(
    context: Context, code: str, text: str, ok: bool
) -> None:
    """Output, and a plain sentence where the output does not say why it ended."""
    (tool,) = load_tools(["python"]).values()
    if "sleep" in code:
        context = replace(context, limits=Limits(wall_s=0.5))
    assert await tool(context, {"code": code}) == Observation(text=text, ok=ok)


async def test_the_python_tool_keeps_no_state(context: Context) -> None:
    """Each call begins anew; an error is an observation with its traceback."""
    (tool,) = load_tools(["python"]).values()
    await tool(context, {"code": "x = 1; open('/tmp/x', 'w')"})
    seen = await tool(context, {"code": "import os; print(os.listdir('/tmp')); x"})
    in_tmp = [Path(p).parts[2] for p in root.visible_paths() if p.startswith("/tmp/")]
    assert seen.text.startswith(f"{sorted(set(in_tmp))}\nTraceback")
    assert seen.text.endswith("NameError: name 'x' is not defined\n")
    assert not seen.ok


async def test_the_unsafe_tier_runs_the_same_tool() -> None:
    """By explicit choice only: same output, same limits of time and output."""
    sandbox = await open_sandbox("unsafe")
    (tool,) = load_tools(["python"]).values()
    context = Context(run=sandbox.run, limits=Limits(wall_s=5, output_bytes=1000), task={})
    assert await tool(context, {"code": "6 * 7"}) == Observation(text="42\n")
    seen = await tool(context, {"code": "while True: print('x')"})
    assert seen.text.endswith("Killed: it printed more than 1000 bytes.")
    slow = Context(run=sandbox.run, limits=Limits(wall_s=0.5), task={})
    seen = await tool(slow, {"code": "import time; time.sleep(9)"})
    assert seen == Observation(text="Timed out after 0.5 s.", ok=False)
    await sandbox.close()


# -- functions as tools ------------------------------------------------------------------------------


async def search(
    context: Context, query: str, limit: int = 3, order: Literal["new", "old"] = "new"
) -> str:
    """Find pages.

    Not people.

    Args:
        query: What to look for,
            in a few words.
        limit: At most so many.
    """
    return f"{query} {limit} {order}"


async def test_a_function_describes_itself(context: Context) -> None:
    """Name, description and schema come from the function; the first argument takes a tag's body."""
    tool: Tool = FunctionTool(search)
    (function,) = tool.functions
    assert (tool.name, function.name, function.argument) == ("search", "search", "query")
    assert function.description == "Find pages.\n\nNot people."
    assert function.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for, in a few words."},
            "limit": {"type": "integer", "description": "At most so many.", "default": 3},
            "order": {"enum": ["new", "old"], "default": "new"},
        },
        "required": ["query"],
        "additionalProperties": False,
    }
    assert await tool(context, {"query": "q", "limit": "5"}) == Observation(text="q 5 new")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "query"),
        ({"query": 1}, "query"),
        ({"query": "q", "limit": "many"}, "limit"),
        ({"query": "q", "order": "best"}, "order"),
        ({"query": "q", "colour": "red"}, "colour"),
    ],
)
async def test_wrong_arguments_are_told_by_name(
    context: Context, arguments: dict[str, Any], named: str
) -> None:
    """An observation, not an error: the policy made it."""
    seen = await FunctionTool(search)(context, arguments)
    assert not seen.ok
    assert f"`{named}`" in seen.text
    assert "$" not in seen.text


class ShelfOptions(Options, frozen=True):
    """Of the tool below."""

    books: list[str] = []


@asynccontextmanager
async def open_shelf(options: ShelfOptions, place: Place) -> AsyncIterator[list[str]]:
    shelf = [place.recipe_dir, *options.books]
    yield shelf
    shelf.clear()


@tool(session=True, effects="external", keep="tail", options=ShelfOptions, opens=open_shelf)
async def shelf(context: Context, number: int) -> str:
    """Take a book.

    Parameters
    ----------
    number
        Which one.
    """
    return str(context.opened[number])


async def test_a_tool_says_more_of_itself(context: Context) -> None:
    """Traits, options of its own, and something that is open around all calls."""
    assert (shelf.session, shelf.effects, shelf.ends, shelf.keep) == (
        True,
        "external",
        False,
        "tail",
    )
    assert shelf.functions[0].parameters["properties"]["number"]["description"] == "Which one."
    mine = shelf.configured({"books": ["a", "b"], "timeout_s": 3})
    assert mine.options == ShelfOptions(books=["a", "b"], timeout_s=3.0)
    assert shelf.options == ShelfOptions()
    async with open_tools([mine], Place(recipe_dir="here")):
        assert await mine(context, {"number": "2"}) == Observation(text="b")
        assert await mine(context, {"number": 0}) == Observation(text="here")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"python": {"tmeout_s": 1}}, "tools.options.python: .*tmeout_s"),
        ({"python": {"timeout_s": 0}}, "tools.options.python: .*> 0"),
        ({"pyton": {}}, "names pyton, not in tools.use"),
    ],
)
def test_options_that_a_tool_does_not_have_are_refused(options: Any, says: str) -> None:
    """Before a run, by the key."""
    with pytest.raises(ToolError, match=says):
        load_tools(["python"], options=options)


async def undescribed(context: Context, a: int) -> str:
    """Do it.

    Args:
        b: What is not there.
    """
    return ""


async def unnamed(context: Context, *things: str) -> str:
    return ""


async def unwritable(context: Context, thing: complex) -> str:
    return ""


@pytest.mark.parametrize("function", [undescribed, unnamed, unwritable])
def test_a_function_that_cannot_be_described_is_refused(function: Any) -> None:
    """Rather than shown to the policy wrongly."""
    with pytest.raises(ToolError, match="bad_tool"):
        FunctionTool(function)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["query", "limit", "order", "x"]) | st.text(), JSON))
def test_any_arguments_are_answered(arguments: dict[str, Any]) -> None:
    """What the policy sends never raises: it is taken, or told in one line what is wrong."""
    wrong = FunctionTool(search).check(Call(tool="search", arguments=arguments))
    assert wrong == "" or wrong.startswith("Wrong arguments for search: ")


# -- names -------------------------------------------------------------------------------------------


async def test_a_tool_beside_the_recipe(context: Context) -> None:
    """`module:function` is looked up in the recipe's directory; the example works."""
    (tool,) = load_tools(["shout_tool:shout"], EXAMPLES).values()
    assert tool.name == "shout"
    assert await tool(context, {"text": "hi", "marks": 2}) == Observation(text="HI??")
    assert not (await tool(context, {"text": " "})).ok


OBJECT_TOOL = """
from tools.tool import Function, Options, Tool

class Stateful(Tool):
    name = 'stateful'
    functions = (Function(name='look', description='', parameters={}),)
    options = Options()
    session = True
    def configured(self, options): return self
    async def __call__(self, context, arguments): ...

stateful = Stateful()
other = Stateful()
"""


def test_an_object_is_a_tool_too(tmp_path: Path) -> None:
    """What has a tool's attributes is used as it is, under the name that it gives itself."""
    Path(tmp_path, "object_tool.py").write_text(OBJECT_TOOL)
    (tool,) = load_tools(["object_tool:stateful"], str(tmp_path)).values()
    assert (tool.name, tool.session, tool.effects) == ("stateful", True, "none")
    with pytest.raises(ToolError, match="use one name"):
        load_tools(["object_tool:other"], str(tmp_path))


def test_an_installed_package_brings_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its entry points; they are named, listed and loaded as the built-in ones are."""
    Path(tmp_path, "plugged_in.py").write_text(
        "async def bark(context, loudly: bool = False) -> str:\n    return 'woof'\n"
    )
    info = tmp_path / "plugged_in-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[agentic_actors.tools]\nbark = plugged_in:bark\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "bark" in tool_names()
    (bark,) = load_tools(["bark"]).values()
    assert bark.functions[0].argument == "loudly"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pyton", "did you mean python"),
        ("zzz", "there are .*python"),
        ("no_such_module:f", "no_such_module"),
        ("json:no_such_function", "no_such_function"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, says: str) -> None:
    """With the closest there is."""
    with pytest.raises(UnknownTool, match=says):
        load_tools([name])


@pytest.mark.parametrize("name", ["json:dumps", "json:__doc__"])
def test_what_is_not_a_tool_is_refused(name: str) -> None:
    """Before the run begins."""
    with pytest.raises(ToolError):
        load_tools([name])


def test_an_import_error_inside_a_users_module_is_its_own(tmp_path: Path) -> None:
    """Not taken for an unknown tool."""
    Path(tmp_path, "broken_tool.py").write_text("import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_tools(["broken_tool:f"], str(tmp_path))


def test_two_tools_of_one_name_are_refused() -> None:
    """The policy could not tell them apart."""
    with pytest.raises(ToolError, match="duplicate"):
        load_tools(["python", "tools.python:python"])


# -- observations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("both", "ab\n[4 characters cut]\ng"),
        ("head", "abc\n[4 characters cut]"),
        ("tail", "[4 characters cut]\nefg"),
    ],
)
def test_shortened_text_says_how_much_is_missing(keep: Any, expected: str) -> None:
    """The kept parts are those asked for."""
    assert shorten("abcdefg", 3, keep) == expected


@given(st.text(), st.integers(1, 50))
def test_shortening_keeps_what_fits(text: str, max_chars: int) -> None:
    """Text within the limit is untouched; otherwise exactly the limit is kept."""
    short = shorten(text, max_chars)
    if len(text) <= max_chars:
        assert short == text
    else:
        marker = f"[{len(text) - max_chars} characters cut]"
        kept = short.replace(marker, "", 1)
        assert len(kept) - max_chars in (1, 2)  # the newlines around the marker
        assert short.startswith(text[: (max_chars + 1) // 2])


IMAGES = [Image(data=bytes([n]), media_type="image/png") for n in range(4)]


@given(
    st.lists(st.text(st.characters(exclude_characters="<>"), max_size=6), min_size=1, max_size=5),
    st.integers(1, 60),
    st.sampled_from(["head", "tail", "both"]),
)
def test_an_image_goes_with_its_placeholder(texts: list[str], max_chars: int, keep: Any) -> None:
    """Kept whole or cut whole; those that stay are those of the placeholders that stay."""
    whole = Observation(text=PLACEHOLDER.join(texts), images=IMAGES[: len(texts) - 1])
    short = shorten_observation(whole, max_chars, keep)
    assert len(short.images) == short.text.count(PLACEHOLDER)
    assert short.text.replace(PLACEHOLDER, "").count("<") == 0
    cut = len(whole.images) - len(short.images)
    expected = {
        "head": whole.images[: len(short.images)],
        "tail": whole.images[cut:],
        "both": short.images,
    }
    assert short.images == expected[keep]
    if len(whole.text) <= max_chars:
        assert short == whole


@given(st.text(), st.integers(0, 40))
def test_half_a_character_is_no_part_of_an_output(text: str, kept_bytes: int) -> None:
    """Of an output that was cut; of a whole one, junk stays visible."""
    output = text.encode()[:kept_bytes]
    assert text.startswith(decode_output(output, cut=True))
    assert decode_output(b"\xc3") == "\ufffd"
