"""Tools that come and go while a run goes on: what the policy may call, and the two commands."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.adding import add_tool, load_added, remove_tool
from actors.calling import Toolset, run_events
from actors.errors import UserError
from actors.place import Place
from actors.recipe import load_recipe
from bus import subjects
from bus.connection import Bus
from bus.log import Log
from bus.provision import provision
from bus.work import backlog
from schemas.events import AnyRunEvent, Call, Ended, ShownFunction, ToolAdded, ToolRemoved, Turn
from schemas.recipe import RemoteTool, Tools
from schemas.tokens import Tokens
from tools.formats import Parsed, open_format
from tools.remote import all_tools

RUN = "test"
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
RECIPE = Tools(remote={"look": RemoteTool(description="Look.", parameters=json.dumps(TEXT))})


def toolset(style: str = "tagged") -> Toolset:
    return Toolset(all_tools(RECIPE), lambda tools: open_format(style, tools, {}))


def added(tool: str, version: str) -> ToolAdded:
    shown = ShownFunction(name=tool, description=version, parameters=TEXT)
    return ToolAdded(tool=tool, version=version, functions=[shown])


def calls(tools: Toolset, text: str, granted: list[str] | None = None) -> list[str]:
    """Where the calls of a turn go."""
    return [call.queue for call in tools.calling.parse(text, granted).calls]


# -- what the policy may call ----------------------------------------------------------------------


def test_calls_carry_the_version_that_is_there() -> None:
    """None for the recipe's own; then the newest."""
    tools = toolset()
    assert calls(tools, "<look>a</look>") == ["look"]
    assert calls(tools, "<shout>a</shout>") == []
    tools.observe(added("shout", "1"))
    assert calls(tools, "<shout>a</shout><look>a</look>") == ["shout@1", "look"]
    tools.observe(added("shout", "2"))
    tools.observe(added("look", "3"))
    assert calls(tools, "<shout>a</shout><look>a</look>") == ["shout@2", "look@3"]


@pytest.mark.parametrize("style", ["tagged", "fenced", "hermes", "llama", "json"])
def test_a_call_of_a_tool_that_was_removed_is_refused_in_words(style: str) -> None:
    """The policy is told so and goes on. Added again, it can be called."""
    tools = toolset(style)
    tools.observe(added("shout", "1"))
    known = tools.calling.granting(None)
    text = known.render(Call(tool="shout", arguments={"text": "a"}))
    tools.observe(ToolRemoved(tool="shout"))
    parsed = tools.calling.parse(text, None)
    assert parsed == Parsed(feedback="shout was removed: it can no longer be called.")
    tools.observe(added("shout", "1"))
    assert calls(tools, text) == ["shout@1"]


def test_other_calls_of_the_turn_are_made() -> None:
    """And other complaints are kept."""
    tools = toolset()
    tools.observe(added("shout", "1"))
    tools.observe(ToolRemoved(tool="shout"))
    parsed = tools.calling.parse("</look><shout>a</shout><look>a</look>", None)
    assert [call.tool for call in parsed.calls] == ["look"]
    assert parsed.feedback.startswith("</look> without <look> before it. shout was removed")


def test_what_is_shown_is_what_is_there() -> None:
    """Newest descriptions, nothing that was removed, and of that what the task grants."""

    def shown(granted: list[str] | None = None) -> list[tuple[str, str]]:
        functions = [schema["function"] for schema in tools.calling.shown(granted).schemas]
        return [(function["name"], function["description"]) for function in functions]

    tools = toolset()
    tools.observe(added("shout", "1"))
    tools.observe(added("shout", "2"))
    assert shown() == [("look", "Look."), ("shout", "2")]
    assert shown(["look"]) == [("look", "Look.")]
    tools.observe(ToolRemoved(tool="look"))
    assert shown() == [("shout", "2")]
    assert shown(["look"]) == []
    assert tools.present == {"shout": "2"}


def test_junk_is_left_out() -> None:
    """A tool that cannot be shown, or whose tag another has, changes nothing, and kills nobody."""
    tools = toolset()
    bad = ShownFunction(name="no name", description="", parameters={})
    tools.take(ToolAdded(tool="bad", version="1", functions=[bad]))
    same = ShownFunction(name="look", description="", parameters=TEXT)
    tools.take(ToolAdded(tool="other", version="1", functions=[same]))
    assert tools.present == {"look": ""}
    assert calls(tools, "<look>a</look>") == ["look"]


EVENTS = st.lists(
    st.builds(added, st.sampled_from(["look", "shout"]), st.sampled_from("123"))
    | st.builds(ToolRemoved, tool=st.sampled_from(["look", "shout", "nothing"]))
)


@given(EVENTS)
@settings(max_examples=40)
def test_any_history_leaves_one_version_of_each(events: list[AnyRunEvent]) -> None:
    """The last word on a tool counts, however often it came and went."""
    tools = toolset()
    expected: dict[str, str] = {"look": ""}
    for event in events:
        tools.take(event)
        if isinstance(event, ToolAdded):
            expected[event.tool] = event.version
        elif isinstance(event, ToolRemoved):
            expected.pop(event.tool, None)
    assert tools.present == expected
    for name in ("look", "shout"):
        where = [f"{name}@{expected[name]}" if expected[name] else name] if name in expected else []
        assert calls(tools, f"<{name}>a</{name}>") == where


async def test_changes_are_heard_as_they_come(log: Log) -> None:
    """What was before, then, at once, what is added."""
    await log.append_run(added("shout", "1"))
    tools, events = toolset(), run_events(log)
    await tools.catch_up(events)
    assert tools.present == {"look": "", "shout": "1"}
    await log.append_run(ToolRemoved(tool="shout"))
    async with asyncio.timeout(30):
        async for event in events:
            tools.take(event)
            if isinstance(event, ToolRemoved):
                break
    assert tools.present == {"look": ""}


async def test_the_dispatcher_finds_the_queue_of_a_version(bus: Bus) -> None:
    """Where a call waits is told alike by its place and by the server, so that waiting is told from loss."""
    await provision(bus, RUN, ["shout@1"])
    call = Call(tool="shout", arguments={}, version="1")
    turn = Turn(trajectory="g0-0-0", tokens=Tokens(), text="", calls=[call])
    assert Place().after(turn).queue in await backlog(bus, RUN, [call.queue])


# -- the commands ----------------------------------------------------------------------------------

SOURCE = '''
from tools.tool import Context


async def shout(context: Context, text: str) -> str:
    """Say it louder."""
    return text.upper()
'''


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def shout_py(tmp_path: Path) -> Path:
    path = tmp_path / "shout.py"
    write(path, SOURCE)
    return path


async def run_log(log: Log) -> list[ToolAdded | ToolRemoved]:
    subject = subjects.run_event(RUN)
    found = [stored.event async for stored in log.read(subject)]
    return [event for event in found if isinstance(event, ToolAdded | ToolRemoved)]


async def has_consumer(bus: Bus, queue: str) -> bool:
    name = subjects.durable(RUN, queue)
    answer = await bus.request(f"$JS.API.CONSUMER.INFO.TOOL.{name}", b"")
    return "error" not in json.loads(answer.data)


async def test_a_tool_is_added_replaced_and_removed(
    at_home: Any, shout_py: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each version has a queue before the log names it; the same again is no new version; the source travels along."""
    what = f"{shout_py}:shout"
    async with at_home() as (bus, log):
        await add_tool(what, (), RUN, "")
        await add_tool(what, (), RUN, "")
        write(shout_py, SOURCE.replace("upper", "title"))
        await add_tool(what, (), RUN, "")
        await add_tool(what, ("tools.options.shout.timeout_s=2.0",), RUN, "")
        await remove_tool("shout", RUN, "")
        one, two, three, gone = await run_log(log)
        assert isinstance(one, ToolAdded)
        assert isinstance(two, ToolAdded)
        assert isinstance(three, ToolAdded)
        assert len({one.version, two.version, three.version}) == 3
        assert isinstance(gone, ToolRemoved)
        for event in (one, two, three):
            assert await has_consumer(bus, event.queue)
            assert event.functions[0].name == event.tool == event.use == "shout"
        write(shout_py, "")
        assert load_added(three).options.timeout_s == 2.0
    said = capsys.readouterr().out
    assert f"run test has {one.queue} already" in said
    assert f"run test may call {two.queue} now instead of the former one" in said
    assert "run test calls shout no more" in said


async def test_a_tool_that_is_served_elsewhere_is_added(
    at_home: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what `actors tools schema` prints; the command says where its worker takes calls from."""
    function = {"name": "count", "description": "Count.", "parameters": TEXT}
    path = tmp_path / "count.json"
    write(path, json.dumps({"type": "function", "function": function}))
    async with at_home() as (_, log):
        await add_tool(str(path), (), RUN, "")
        (event,) = await run_log(log)
    assert isinstance(event, ToolAdded)
    assert (event.tool, event.use, event.source) == ("count", "", "")
    assert f"from the consumer test=count@{event.version}" in capsys.readouterr().out


async def test_a_tool_that_has_a_name_is_added(at_home: Any) -> None:
    """A toolbox makes it by this name, with these options."""
    async with at_home() as (_, log):
        await add_tool("python", ("tools.options.python.timeout_s=3.0",), RUN, "")
        (event,) = await run_log(log)
    assert isinstance(event, ToolAdded)
    assert (event.use, event.source, event.options) == ("python", "", {"timeout_s": 3.0})
    assert load_added(event).options.timeout_s == 3.0


@pytest.mark.parametrize(
    ("what", "sets", "says"),
    [
        ("nowhere.py:shout", (), "nowhere.py: No such file"),
        ("broken.py:shout", (), "broken.py: line 1: "),
        ("shout.py:whisper", (), "no attribute 'whisper'"),
        ("my_module:shout", (), "give the file, so that its source can travel: FILE.py:shout"),
        ("pyton", (), "did you mean python?"),
        ("finish", (), "finish ends trajectories"),
        ("odd.json", (), "odd.json: it is not "),
        (
            "shout.py:shout",
            ("tools.options.python.timeout_s=1.0",),
            "give the tool's own, tools.options.shout.KEY=VALUE",
        ),
        ("shout.py:shout", ("tools.tier=unsafe",), "--set tools.tier=unsafe: give the tool's own"),
        ("odd.json", ("tools.options.odd.loud=1",), "the options of odd.json are its worker's"),
        ("shout.py:shout", ("tools.options.shout.loud=1",), "loud"),
    ],
)
async def test_a_mistake_is_named(
    at_home: Any,
    shout_py: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    sets: tuple[str, ...],
    says: str,
) -> None:
    """In one line, and nothing is appended."""
    monkeypatch.chdir(shout_py.parent)
    write(shout_py.with_name("broken.py"), "def shout(:\n")
    write(shout_py.with_name("odd.json"), '{"name": "odd"}')
    async with at_home() as (_, log):
        with pytest.raises(UserError, match=says.replace(".", r"\.").replace("?", r"\?")) as error:
            await add_tool(what, sets, RUN, "")
        assert "\n" not in str(error.value)
        assert not await run_log(log)


async def test_what_is_not_there_cannot_be_removed(at_home: Any) -> None:
    async with at_home() as (_, log):
        with pytest.raises(UserError, match="run test has no tool 'shout'"):
            await remove_tool("shout", RUN, "")
        await log.append_run(Ended(reason="done"))
        with pytest.raises(UserError, match="run 'test' has ended"):
            await add_tool("python", (), RUN, "")


# -- the recipe ------------------------------------------------------------------------------------


def test_a_remote_tool_in_a_recipe(tmp_path: Path) -> None:
    """Its name is among the run's queues; a misspelt key of it is named."""
    path = tmp_path / "recipe.toml"
    text = '[policy]\nmodel = "m"\n[data]\nrows = "a:b"\n[tools.remote.count]\ndescription = "Count."\n'
    path.write_text(f"{text}parameters = '{json.dumps(TEXT)}'\n")
    assert load_recipe(path).tools.names == ["count"]
    path.write_text(f"{text}parameter = '{{}}'\nparameters = '{{}}'\n")
    with pytest.raises(UserError, match="no such key; did you mean 'parameters'"):
        load_recipe(path)
