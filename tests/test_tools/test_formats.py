"""How `tagged` calls are read from text; the other formats are in test_call_formats.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import Call
from tools.errors import ToolError, UnknownTool
from tools.formats import Parsed, open_format
from tools.registry import load_tools

TOOLS = load_tools(["python"])
FORMAT = open_format("tagged", TOOLS, {})


def python(code: str) -> Call:
    return Call(tool="python", arguments={"code": code})


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        ("no call", []),
        ("<python>1</python>", ["1"]),
        ("I think <python>\n1 + 1\n</python> so", ["1 + 1"]),
        ("<python>\n\n  x\n\n</python>", ["\n  x\n"]),
        ("<python>1</python> then <python>2</python>", ["1", "2"]),
        ("<python>print('<python>')</python>", ["print('<python>')"]),
        ("<python>'<b>' < '</b>'</python>", ["'<b>' < '</b>'"]),
        ("<python></python>", [""]),
        ("<think>a < b</think><answer>3</answer>", []),
        ("<pythonic>1</pythonic> < python>", []),
    ],
)
def test_calls_are_read_in_order(text: str, bodies: list[str]) -> None:
    """Several calls in a turn; one newline at each end belongs to the tags; other tags are text."""
    assert FORMAT.parse(text) == Parsed(calls=[python(body) for body in bodies])


@pytest.mark.parametrize(
    ("text", "bodies", "feedback"),
    [
        ("<python>1 + ", [], "<python> without </python>: the call was cut off and did not run."),
        ("1</python>", [], "</python> without <python> before it."),
        ("<python lang='3'>1</python>", [], "<python> takes nothing inside the tag."),
        (
            "<python>1</python> <python>2",
            ["1"],
            "<python> without </python>: the call was cut off and did not run.",
        ),
    ],
)
def test_malformed_calls_are_told(text: str, bodies: list[str], feedback: str) -> None:
    """The policy reads what was wrong; calls that are whole are kept."""
    assert FORMAT.parse(text) == Parsed(calls=[python(b) for b in bodies], feedback=feedback)


@given(st.text() | st.lists(st.sampled_from(["<python>", "</python>", "<python ", ">", "\n", "x"])))
def test_parsing_never_raises_and_misses_no_tag(text: str | list[str]) -> None:
    """Whatever the text: a tag is a call's or it is complained about."""
    text = "".join(text)
    parsed = FORMAT.parse(text)
    if "<python>" in text or "</python>" in text:
        assert parsed.calls or parsed.feedback


@given(
    st.lists(st.text().filter(lambda body: "</python>" not in body), max_size=4),
    st.text(alphabet=st.characters(blacklist_characters="<>")),
)
def test_what_is_rendered_is_read_back(bodies: list[str], between: str) -> None:
    """Any body that does not hold its own closing tag, with any text without tags around it."""
    text = between + between.join(FORMAT.render(python(body)) for body in bodies)
    assert FORMAT.parse(text) == Parsed(calls=[python(body) for body in bodies])


@given(st.text(), st.text(alphabet=st.characters(blacklist_characters="<>")))
def test_a_whole_call_is_never_lost(body: str, before: str) -> None:
    """A call after text without tags is the first one found, whatever follows it."""
    text = f"{before}<python>x = 1</python>{body}"
    assert FORMAT.parse(text).calls[0] == python("x = 1")


@pytest.mark.parametrize(
    "call",
    [
        python("'</python>'"),
        Call(tool="sql", arguments={"query": "1"}),
        Call(tool="python", arguments={}),
        Call(tool="python", arguments={"code": 1}),
        Call(tool="python", arguments={"code": "1", "more": "2"}),
    ],
)
def test_what_cannot_be_written_is_refused(call: Call) -> None:
    """Rather than written so that it reads differently."""
    with pytest.raises(ValueError, match=r"."):
        FORMAT.render(call)


def test_tags_of_the_recipe_are_used() -> None:
    """A tool may have another tag than its name, and sampling stops at it."""
    renamed = open_format("tagged", TOOLS, {"python": "code"})
    assert renamed.stop == ("</code>",)
    assert renamed.parse("<code>1</code><python>2</python>") == Parsed(calls=[python("1")])


@pytest.mark.parametrize("tag", ["", "a b", "<x>", "1x"])
def test_strange_tags_are_refused(tag: str) -> None:
    """A tag is one word."""
    with pytest.raises(ToolError, match="bad_tag"):
        open_format("tagged", TOOLS, {"python": tag})


def test_names_that_lead_nowhere_are_refused() -> None:
    """Formats and tools, by name."""
    with pytest.raises(ToolError, match="unknown_format"):
        open_format("xml", TOOLS, {})
    with pytest.raises(UnknownTool, match="pythn"):
        open_format("tagged", TOOLS, {"pythn": "p"})
    two = load_tools(["python", "finish"])
    with pytest.raises(ToolError, match="same tag"):
        open_format("tagged", two, {"finish": "python"})


def test_without_tools_everything_is_text() -> None:
    """A recipe without tools has the same format."""
    empty = open_format("tagged", {}, {})
    assert empty.stop == ()
    assert empty.parse("<python>1</python>") == Parsed()
