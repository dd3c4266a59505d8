"""The `python` and `python_session` tools, in a real sandbox: what the policy reads of what its code did."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from msgspec.structs import replace

from tools.errors import ToolError
from tools.outcome import observe
from tools.registry import load_tools
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Outcome
from tools.tool import Context, Observation

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOOLS = load_tools(["python", "python_session"])
DRAW = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plotting() -> AsyncIterator[NamespaceSandbox]:
    opened = NamespaceSandbox(["matplotlib.pyplot"])
    yield opened
    await opened.close()


@pytest.mark.parametrize(
    ("code", "text", "ok"),
    [
        ("print('a')\n1 + 1", "a\n2\n", True),
        ("x = 1", "(no output)", True),
        ("import sys; sys.exit(3)", "Ended with exit code 3.", False),
        ("print('<image>')", "<image >\n", True),
        ("import time; print('a'); time.sleep(60)", "a\nTimed out after 1 s.", False),
        ("import os; os.kill(os.getpid(), 11)", "Killed by SIGSEGV.", False),
    ],
)
async def test_what_the_policy_reads(context: Context, code: str, text: str, ok: bool) -> None:
    """The output, and why it ended where that does not say so itself."""
    seen = await TOOLS["python"](context, {"code": code})
    assert seen == Observation(text=text, ok=ok)


async def test_stdin(context: Context) -> None:
    """Both kinds are given it."""
    for name in TOOLS:
        seen = await TOOLS[name](context, {"code": "input()", "stdin": "é"})
        assert seen.text == "'é'\n"


async def test_a_call_keeps_nothing_and_a_session_does(context: Context) -> None:
    """The next call does not know the variable; the next cell does."""
    await TOOLS["python"](context, {"code": "x = 1"})
    assert "NameError" in (await TOOLS["python"](context, {"code": "x"})).text
    await TOOLS["python_session"](context, {"code": "x = 1"})
    assert (await TOOLS["python_session"](context, {"code": "x"})).text == "1\n"


async def test_the_end_of_a_session_is_told(context: Context) -> None:
    """And the next cell runs in a new one."""
    await TOOLS["python_session"](context, {"code": "x = 1"})
    seen = await TOOLS["python_session"](context, {"code": "import os; os._exit(4)"})
    assert seen.text.startswith("Ended with exit code 4.\nThe session has ended: ")
    assert not seen.ok
    assert "NameError" in (await TOOLS["python_session"](context, {"code": "x"})).text


async def test_an_interrupted_cell_says_so(context: Context) -> None:
    """The session goes on, so nothing is said of its end."""
    seen = await TOOLS["python_session"](context, {"code": "import time; time.sleep(60)"})
    assert seen.text.endswith("KeyboardInterrupt\nTimed out after 1 s.")
    assert not seen.ok


async def test_figures_are_images(plotting: NamespaceSandbox, context: Context) -> None:
    """A figure is an image; there is no text about it."""
    context = replace(context, run=plotting.run, limits=Limits())
    seen = await TOOLS["python"](context, {"code": DRAW})
    assert seen.text == ""
    assert [image.media_type for image in seen.images] == ["image/png"]
    assert seen.images[0].data.startswith(b"\x89PNG")


async def test_without_a_session_it_is_not_the_policy_s_fault(context: Context) -> None:
    """A toolbox that keeps none is a failure of ours."""
    with pytest.raises(ToolError, match="no_session"):
        await TOOLS["python_session"](replace(context, session=None), {"code": "1"})


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("memory", "Killed: it used more than 512 MB of memory."),
        ("disk", "Killed: its files took more than 64 MB."),
        ("processes", "Killed: it had more than 64 processes."),
        ("output", "Killed: it printed more than 1048576 bytes."),
    ],
)
async def test_each_limit_is_named(reason: str, told: str) -> None:
    """With its size."""
    outcome = Outcome(output=b"", reason=reason, exit_code=-9, wall_ms=1.0)  # type: ignore[arg-type]
    assert observe(outcome, Limits()) == Observation(text=told, ok=False)
