"""VerlTool's ways to write a call, and its ways to show a result."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.gateway_actions import Actions, observation, prepared, with_stdin
from actors.gateway_prelude import with_imports
from schemas.events import Call, Result
from tools.registry import load_tools

TOOLS = load_tools(["python", "bash", "sql", "search", "finish"])
ACTIONS = Actions.of(TOOLS)


def calls_in(text: str, *use: str) -> list[Call]:
    return (Actions.of(load_tools(use)) if use else ACTIONS).parse(text).calls


def call(tool: str, **arguments: Any) -> Call:
    return Call(tool=tool, arguments=arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>x</think><python>print(1)</python>", call("python", code="print(1)")),
        ("<python>a=1</python> <python>a</python>", call("python", code="a=1\na")),
        ("```python\nprint(1)\n```", call("python", code="print(1)")),
        ("```python\nprint(1)\n```\n```output", call("python", code="print(1)")),
        ("```\npython\nprint(1)```", call("python", code="print(1)")),
        ("```py\n1\n```\n```py\n2\n```", call("python", code="1\n2")),
        ("```python3\n1\n```", call("python", code="1")),
        ("<python>1</python>```python\n2\n```", call("python", code="1")),
        ("<python>\n  if x:\n    y\n</python>", call("python", code="if x:\n  y")),
        ("```python\ninput()\n```\n```input\n7\n```", call("python", code="input()", stdin="7")),
        ("<bash>ls\npwd</bash>", call("bash", command="ls\npwd")),
        ("```bash\nls\n```", call("bash", command="ls")),
        ("```shell\nls\n```", call("bash", command="ls")),
        ("```sh\nls\n```\n```sh\npwd\n```", call("bash", command="ls\npwd")),
        ("``` terminal\nls\n```", call("bash", command="ls")),
        ("<sql>1</sql><sql> SELECT 2 </sql>", call("sql", query="SELECT 2")),
        ("<search>a</search><search>b</search>", call("search", query="b")),
        ("<python>1</python><bash>2</bash>", call("python", code="1")),
        (
            '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>',
            call("python", code="1"),
        ),
        (
            '<tool_call>{"name": "bash_terminal", "arguments": {"command": "ls"}}</tool_call>',
            call("bash", command="ls"),
        ),
    ],
)
def test_a_call_is_found(text: str, expected: Call) -> None:
    """As VerlTool's tools find theirs; the first tool of the recipe that finds one has it."""
    assert calls_in(text) == [expected]


@pytest.mark.parametrize(
    ("use", "text", "expected"),
    [
        ("python_session", "<python>x</python>", call("python_session", code="x")),
        (
            "python_session",
            '<tool_call>{"name": "python", "arguments": {"code": "x"}}</tool_call>',
            call("python_session", code="x"),
        ),
        ("web_search", "<search>a</search><search>b</search>", call("web_search", query="a")),
        ("web_search", "```search\na b\n```", call("web_search", query="a b")),
    ],
)
def test_names_of_here_and_there(use: str, text: str, expected: Call) -> None:
    """VerlTool's names lead to the tools that do the same."""
    assert calls_in(text, use) == [expected]


@pytest.mark.parametrize(
    "text", ["", "no call", "<python>print(1)", "```javascript\n1\n```", "</python>", "<sql></SQL>"]
)
def test_no_call_is_none(text: str) -> None:
    """And no complaint either."""
    parsed = ACTIONS.parse(text)
    assert (parsed.calls, parsed.feedback, ACTIONS.answers(text)) == ([], "", False)


def test_a_malformed_call_is_explained() -> None:
    """JSON that is none, and a function that is not there."""
    parsed = ACTIONS.parse("<tool_call>{'name'}</tool_call>")
    assert "not valid JSON" in parsed.feedback
    parsed = ACTIONS.parse('<tool_call>{"name": "rm", "arguments": {}}</tool_call>')
    assert "There is no function 'rm'" in parsed.feedback


def test_a_final_answer_is_one_of_a_tool_that_is_there() -> None:
    """`<solution>` of sql, `<answer>` of search."""
    assert ACTIONS.answers("<solution>SELECT 1</solution>")
    assert ACTIONS.answers("<answer>42</answer>")
    assert not Actions.of(load_tools(["python"])).answers("<answer>42</answer>")


def test_a_call_of_finish_ends() -> None:
    """Between tags or as JSON."""
    assert ACTIONS.parse("<finish>42</finish>").ends
    text = '<tool_call>{"name": "finish", "arguments": {"answer": "42"}}</tool_call>'
    assert ACTIONS.parse(text).ends


@pytest.mark.timeout(60)  # each took hours
@pytest.mark.parametrize(
    "opening",
    ["<python>", "```python\n", "```bash ", "<search>", "```search ", "<answer>", "```input\n"],
)
def test_what_is_never_closed_costs_no_more_than_its_length(opening: str) -> None:
    """However often it is opened."""
    for text in (opening * 300_000, "<python>1</python>" + opening * 300_000):
        ACTIONS.parse(text)
        ACTIONS.answers(text)


def test_the_first_query_counts() -> None:
    """In a block or on a line, whichever is first; between tags before all."""
    assert calls_in("```search\none``` google: two", "web_search")[0].arguments == {"query": "one"}
    assert calls_in("google: two\n", "web_search")[0].arguments == {"query": "two"}
    line_first = "search: two\n```search\none```"
    (call,) = calls_in(line_first, "web_search")
    assert call.arguments["query"].startswith("two")
    (call,) = calls_in(f"{line_first}<search>three</search>", "web_search")
    assert call.arguments == {"query": "three"}


@given(st.text(alphabet="<>/`pythonsql\n {}x", max_size=80))
def test_no_text_raises(text: str) -> None:
    """Whatever is written is calls of tools that are there, or none."""
    parsed = ACTIONS.parse(text)
    assert all(each.tool in TOOLS for each in parsed.calls)
    ACTIONS.answers(text)


@given(st.text(alphabet=st.characters(exclude_characters="<`", exclude_categories=["Cs"])))
def test_what_is_rendered_is_read(code: str) -> None:
    """As JSON, which holds every call."""
    written = call("python", code=code)
    assert ACTIONS.parse(ACTIONS.render(written)).calls == [written]


def test_extra_stdin_does_not_replace_what_the_policy_wrote() -> None:
    """And is for Python alone."""
    assert with_stdin(call("python", code="1"), "x") == call("python", code="1", stdin="x")
    own = call("python", code="1", stdin="own")
    assert with_stdin(own, "x") is own
    assert with_stdin(call("bash", command="1"), "x") == call("bash", command="1")
    assert with_stdin(call("python", code="1"), None) == call("python", code="1")


@pytest.mark.parametrize(
    ("code", "imports"),
    [
        ("print(sqrt(2))", "from math import sqrt"),
        ("print(math.sqrt(2))", "import math"),
        ("d = defaultdict(list)", "from collections import defaultdict"),
        ("x: List[int] = []", "from typing import List"),
        ("print(datetime.datetime.now())", "import datetime"),
        ("print(pi, Counter('ab'))", "from collections import Counter; from math import pi"),
        ("import math\nprint(math.pi)", ""),
        ("from math import pi, sqrt as root\nprint(pi, sqrt)", ""),
        ("for e in [1]:\n  pass\nprint(e)", ""),
        ("log = []\nlog.append(open('x'))", ""),
        ("x.count(1)", ""),
        ("from __future__ import annotations\nprint(pi)", ""),
        ("pi == 3", "from math import pi"),
    ],
)
def test_a_program_has_what_it_takes_for_granted(code: str, imports: str) -> None:
    """The names of VerlTool's star imports, where it binds none itself; an own `stdin` stays."""
    given = prepared(call("python", code=code), {"stdin": "x"})
    expected = f"{imports}\n{code}" if imports else code
    assert given == call("python", code=expected, stdin="x")
    for tool in ("python_session", "bash"):
        other = call(tool, code="print(pi)")
        assert prepared(other, {}) == other


@given(st.text(max_size=60))
def test_what_is_imported_can_be(code: str) -> None:
    """Whatever is mentioned, the line before it runs."""
    names = ["sqrt", "deque", "re", "reduce", "StringIO", "ascii_letters", "itemgetter", "mean"]
    line = with_imports(f"{' '.join(names)}\n# {code}").split("\n")[0]
    exec(line, found := {})
    assert set(names) <= set(found) or "__future__" in code


@pytest.mark.parametrize(
    ("action", "shown"),
    [
        ("<python>1</python>", "\n<result>\nR\n</result>\n"),
        ("```python\n1\n```", "\n```result\nR\n```\n"),
        ("```python\n1\n```\n```output", "\nR\n```\n"),
        ("<python>1</python>\n<result>", "\nR\n</result>\n"),
        ("```python\n1\n```\n```", "result\nR\n```\n"),
        (
            '<tool_call>{"name": "python"}</tool_call>',
            "\n<tool_response>\n```result\nR\n```\n</tool_response>\n",
        ),
    ],
)
def test_python_s_result_is_wrapped_as_the_call_was_written(action: str, shown: str) -> None:
    """As observed of python_code; what the action has opened is only closed."""
    result = Result(trajectory="x-0-0", turn=0, call=0, text="\nR\n")
    assert observation(action, [call("python", code="1")], [result], {}) == shown


@pytest.mark.parametrize(
    ("action", "shown"),
    [
        ("<bash>ls</bash>", "\n<o>\nR\n</o>\n"),
        ("```bash\nls\n```", "\n```output\nR\n```\n"),
        ("<bash>ls</bash><o>", "\nR\n</o>\n"),
    ],
)
def test_bash_s_result_is_wrapped_as_the_call_was_written(action: str, shown: str) -> None:
    """As observed of bash_terminal, without the prompt that it makes up."""
    result = Result(trajectory="x-0-0", turn=0, call=0, text="R\n")
    assert observation(action, [call("bash", command="ls")], [result], {}) == shown


def test_other_results_are_wrapped_as_their_tools_do() -> None:
    """A reminder of turns only where the trainer says how many there are."""
    result = [Result(trajectory="x-0-0", turn=0, call=0, text="R")]
    sql = [call("sql", query="SELECT 1")]
    assert observation("", sql, result, {}) == {
        "obs": "\n\n<observation>R</observation>\n\n",
        "parsed_sql": "SELECT 1",
    }
    told = observation("", sql, result, {"turns_left": 2})
    assert isinstance(told, dict)
    assert "R\n<reminder>You have 2 turns left to complete the task.</reminder></obs" in told["obs"]
    searched = observation("", [call("search", query="a")], result, {})
    assert searched == "\n\n<information>R</information>\n\n"
    other = observation("", [call("image", number=1)], result, {})
    assert other == "\n<tool_response>\nR\n</tool_response>\n"
