"""The `bash` tool, in a real session: what the policy reads of what its commands did."""

import asyncio
import time

import pytest
from msgspec.structs import replace

from tools.registry import load_tools
from tools.sandbox.sandbox import Limits
from tools.tool import Context, Observation, Tool

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def bash() -> Tool:
    return load_tools(["bash"])["bash"]


async def test_one_shell_for_all_calls(bash: Tool, context: Context) -> None:
    """Files, directory and variables are there in the next call; a failing command names its exit code."""
    assert bash.session
    context = replace(context, limits=Limits())
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


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("set -x", "++ echo next\nnext\n"),
        ("set -v", "next\n"),
        ("PS1='prompt> '; PS2='more> '; PS0=zero; PROMPT_COMMAND='echo prompting'", "next\n"),
        ("set -e; ! true", "next\n"),
        ("set -e; false && true", "next\n"),
        ("trap 'echo wrong' ERR; ! true", "next\n"),
        ("set -u", "next\n"),
    ],
)
async def test_what_is_ours_is_not_heard(
    bash: Tool, context: Context, script: str, printed: str
) -> None:
    """Neither traces nor prompts nor traps tell of the lines around a script, and no option makes them fail."""
    context = replace(context, limits=Limits())
    await bash(context, {"command": script})
    assert await bash(context, {"command": "echo next"}) == Observation(text=printed)


async def test_who_prints_between_two_runs_waits(context: Context) -> None:
    """Once there is as much as may be printed, nobody reads on until the next run: a flood costs its reader nothing."""
    assert context.session
    bash = await context.session("bash")
    await bash.run("(sleep 0.3; exec yes) & sleep 0")
    await asyncio.sleep(1.0)
    begun_s = time.process_time()
    await asyncio.sleep(1.0)
    assert time.process_time() - begun_s < 0.3
    while (await bash.run("kill -9 %1; sleep 0.1")).reason == "output":
        pass  # interrupted at once: the flood went on
    assert (await bash.run("echo next")).output.endswith(b"next\n")


async def test_what_was_printed_between_two_runs_ends_neither(context: Context) -> None:
    """It is more than may be printed, but the second run prints little."""
    assert context.session
    bash = await context.session("bash")
    printed = Limits().output_bytes + 30_000
    await bash.run(f"(sleep 0.3; yes | head -c {printed}; touch printed) & sleep 0")
    await asyncio.sleep(1.0)
    outcome = await bash.run("until [ -e printed ]; do sleep 0.05; done; ls printed; echo next")
    assert outcome.reason == "exit"
    assert outcome.output.endswith(b"printed\nnext\n")


async def test_an_interrupted_shell_reads_the_next_line_whole(context: Context) -> None:
    """Whenever the signal comes: before the script begins, in it, as it ends, between two of its programs."""
    assert context.session
    bash = await context.session("bash")
    scripts = ["echo 'quoted; }'", "for i in 1 2 3; do sleep 0.0001; done", "cat <<'END'\nfi\nEND"]
    for number in range(60):
        limits = Limits(wall_s=0.0002 * (number % 20))
        outcome = await bash.run(scripts[number % 3], limits=limits)
        assert outcome.session == "kept"
        outcome = await bash.run(f"echo {number}")
        assert outcome.output.endswith(f"{number}\n".encode())
        assert (outcome.reason, outcome.exit_code) == ("exit", 0)
