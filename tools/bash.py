"""The `bash` tool: one shell for the whole trajectory."""

from msgspec.structs import replace

from tools.function import tool
from tools.outcome import observe, session_of
from tools.sandbox.sandbox import Outcome
from tools.tool import Context, Observation


@tool(session=True, keep="tail")
async def bash(context: Context, command: str) -> Observation:
    """Run a command, or a whole script, in a bash shell and return what it prints.

    The shell stays: its directory, variables, functions, files and background jobs are there for later calls. There
    is no terminal, and standard input is empty: use a here-document for programs that read it.

    Args:
        command: The command; it may have many lines.
    """
    session = await session_of(context, "bash")
    outcome = await session.run(command, limits=context.limits)
    return with_exit_code(observe(outcome, context.limits), outcome)


def with_exit_code(observation: Observation, outcome: Outcome) -> Observation:
    """What a command printed, and its exit code where that is an error and not told already."""
    if outcome.reason == "exit" and outcome.exit_code > 0 and outcome.output:
        text = observation.text
        newline = "" if text.endswith("\n") else "\n"
        return replace(observation, text=f"{text}{newline}(exit code {outcome.exit_code})")
    return observation
