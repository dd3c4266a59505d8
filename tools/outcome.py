"""What the policy reads of code that ran in a sandbox."""

import signal

from msgspec.structs import replace

from schemas.images import PLACEHOLDER
from tools.errors import ToolError
from tools.observation import decode_output
from tools.sandbox.sandbox import Limits, Outcome, Session, SessionKind
from tools.tool import Context, Image, Observation

_FIGURES_BYTES = 8 << 20
_NOT_A_PLACEHOLDER = "<image >"


def with_figures(limits: Limits) -> Limits:
    """The limits of code that may draw."""
    return replace(limits, image_bytes=_FIGURES_BYTES)


async def session_of(context: Context, kind: SessionKind, *limits: Limits) -> Session:
    """The session of this call. Raises ToolError where the tool is run without any."""
    if context.session is None:
        raise ToolError(
            "no_session", f"this keeps a {kind} session, which only a trajectory of a run has"
        )
    return await context.session(kind, *limits)


def observe(outcome: Outcome, limits: Limits) -> Observation:
    """The output, why it ended where that does not say so itself, what became of the session, and the figures."""
    text = decode_output(outcome.output, cut=outcome.reason == "output")
    text = text.replace(PLACEHOLDER, _NOT_A_PLACEHOLDER)  # what is printed is no picture
    notes = [note for note in (_ending(outcome, limits), _session_note(outcome)) if note]
    if notes and text and not text.endswith("\n"):
        text += "\n"
    images = [Image(data=data, media_type="image/png") for data in outcome.images]
    return Observation(
        text=text + "\n".join(notes) or ("" if images else "(no output)"),
        ok=outcome.reason == "exit" and outcome.exit_code == 0,
        images=images,
    )


def _ending(outcome: Outcome, limits: Limits) -> str:
    verb = "Killed" if outcome.session in ("none", "ended") else "Interrupted"
    match outcome.reason:
        case "wall":
            return f"Timed out after {limits.wall_s:g} s."
        case "memory":
            return f"Killed: it used more than {limits.memory_bytes >> 20} MB of memory."
        case "disk":
            return f"Killed: its files took more than {limits.disk_bytes >> 20} MB."
        case "processes":
            return f"Killed: it had more than {limits.processes} processes."
        case "output":
            return f"{verb}: it printed more than {limits.output_bytes} bytes."
    if outcome.exit_code == -signal.SIGXCPU:
        return f"Killed: it used more than {limits.cpu_s} s of processor time."
    if outcome.exit_code < 0:
        return f"Killed by {_signal_name(-outcome.exit_code)}."
    if outcome.exit_code > 0 and not outcome.output:
        return f"Ended with exit code {outcome.exit_code}."
    return ""


def _session_note(outcome: Outcome) -> str:
    match outcome.session:
        case "restarted":
            return (
                f"The shell exited with code {outcome.exit_code}; a new one was started in the same directory: files "
                "and environment are kept, functions and other variables are not."
            )
        case "ended":
            return "The session has ended: variables, files and processes are gone. The next call starts a new one."
    return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
