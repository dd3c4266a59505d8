"""The `bash` tool, in a real session: what the policy reads of what its commands did."""

import pytest

from tools.registry import load_tools
from tools.tool import Context, Tool

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def bash() -> Tool:
    return load_tools(["bash"])["bash"]


async def test_one_shell_for_all_calls(bash: Tool, context: Context) -> None:
    """Files, directory and variables are there in the next call; a failing command names its exit code."""
    assert bash.session
    await bash(context, {"command": "cd /tmp; x=5\ncat > f.py <<'END'\nprint('from a file')\nEND"})
    seen = await bash(context, {"command": "python3 f.py; echo $x; ls nowhere"})
    assert seen.text.startswith("from a file\n5\n")
    assert seen.text.endswith("(exit code 2)")
    assert not seen.ok
    assert (await bash(context, {"command": "true"})).text == "(no output)"


async def test_limits_and_ends_are_told(bash: Tool, context: Context) -> None:
    """A time-out keeps the shell; its exit starts another; its replacement by a program ends the session."""
    await bash(context, {"command": "x=1"})
    assert (await bash(context, {"command": "sleep 60"})).text.endswith("Timed out after 1 s.")
    assert (await bash(context, {"command": "echo $x"})).text == "1\n"
    assert "a new one was started" in (await bash(context, {"command": "exit 2"})).text
    assert "The session has ended" in (await bash(context, {"command": "exec true"})).text
    assert (await bash(context, {"command": "echo new$x"})).text == "new\n"
