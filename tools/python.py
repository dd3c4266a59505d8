"""The `python` tool: runs code in a fresh sandbox. Stateless; tools that keep state come later."""

import signal

from tools.sandbox.sandbox import Limits, Outcome
from tools.tool import Context, Observation


async def python(context: Context, code: str) -> Observation:
    """Run Python code and return what it prints; a last expression is printed too."""
    outcome = await context.run(code, limits=context.limits)
    text = outcome.output.decode(errors="replace")
    end = _explain(outcome, context.limits)
    if end and text and not text.endswith("\n"):
        text += "\n"
    ok = outcome.reason == "exit" and outcome.exit_code == 0
    return Observation(text=text + end or "(no output)", ok=ok)


def _explain(outcome: Outcome, limits: Limits) -> str:
    """Why it ended, where what it printed does not say so itself."""
    match outcome.reason:
        case "wall":
            return f"Timed out after {limits.wall_s:g} s."
        case "memory":
            return f"Killed: it used more than {limits.memory_bytes >> 20} MB of memory."
        case "output":
            return f"Killed: it printed more than {limits.output_bytes} bytes."
    if outcome.exit_code == -signal.SIGXCPU:
        return f"Killed: it used more than {limits.cpu_s} s of processor time."
    if outcome.exit_code < 0:
        return f"Killed by {_signal_name(-outcome.exit_code)}."
    if outcome.exit_code > 0 and not outcome.output:
        return f"Ended with exit code {outcome.exit_code}."
    return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
