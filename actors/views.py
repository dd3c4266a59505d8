"""Events, trajectories and replicas as text for people, or JSON for programs."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from actors.learner import is_shadow
from actors.watchdog import known_stalls, without_dispatcher
from bus.log import Stored
from schemas.events import (
    Admitted,
    Dropped,
    Evaluated,
    Expired,
    Failed,
    Filtered,
    Joined,
    Result,
    Scored,
    Step,
    Stepped,
    ToolAdded,
    ToolRemoved,
    TrajectoryEvent,
    Turn,
    Warmed,
)
from schemas.images import StoredImage
from schemas.messages import Heartbeat
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory


def _builtins(value: Any) -> Any:
    """Token arrays as lists; the rest as msgspec has it."""
    if isinstance(value, Tokens):
        return {
            "ids": list(value.ids_T),
            "mask": list(value.mask),
            "logprobs": list(value.logprobs_T),
            "versions": list(value.versions_T),
        }
    raise NotImplementedError


def event_json(stored: Stored) -> str:
    """One event as one JSON object, arrays unpacked."""
    event: dict[str, Any] = {
        name: _builtins(value) if isinstance(value, Tokens) else value
        for name, value in msgspec.structs.asdict(stored.event).items()
    }
    head = {"seq": stored.seq, "time_s": stored.time_s, "kind": stored.event.kind}
    if stored.learner:
        head["learner"] = stored.learner
    return msgspec.json.encode(head | event).decode()


def event_line(stored: Stored) -> str:
    """One event as one line."""
    event = stored.event
    time = datetime.fromtimestamp(stored.time_s, UTC).strftime("%H:%M:%S.%f")[:-3]
    shadow = stored.learner if is_shadow(stored.learner) else ""
    subject = event.trajectory if isinstance(event, TrajectoryEvent) else shadow
    return f"{time}  {event.kind:<9} {subject:<14} {_gist(event)}"


def _gist(event: Any) -> str:  # noqa: C901 - one short case for each kind
    if isinstance(event, Admitted):
        prompt = event.public.messages[-1].content if event.public.messages else ""
        return f"task {event.task}: {_short(prompt)}"
    if isinstance(event, Turn):
        versions = sorted({version for version in event.tokens.versions_T if version >= 0})
        end = " (last)" if event.last else f" ({event.finish_reason})"
        count = event.tokens.sampled_count
        return f"{_short(event.text)}{end}, {count} tokens by {_versions(versions)}"
    if isinstance(event, Result):
        return f"{'' if event.ok else 'error: '}{_short(event.text)} ({event.duration_ms:.0f} ms)"
    if isinstance(event, Scored | Evaluated):
        return f"reward {event.reward:g}"
    if isinstance(event, Expired | Dropped):
        return event.reason
    if isinstance(event, Failed):
        return f"{event.cause}: {_short(event.cause.detail)}"
    if isinstance(event, Filtered):
        return f"{event.group}: {event.reason}"
    if isinstance(event, Step):
        return f"{event.step} begins with {len(event.trajectories)} trajectories"
    if isinstance(event, Stepped):
        return f"{event.step} made version {event.policy_version}, loss {event.metrics.get('loss', 0):+.4f}"
    if isinstance(event, Joined):
        return ", ".join(event.overrides)
    if isinstance(event, Warmed):
        return f"{event.step}/{event.steps} loss {event.metrics.get('loss', 0):.3f}"
    if isinstance(event, ToolAdded):
        return event.queue
    if isinstance(event, ToolRemoved):
        return event.tool
    return getattr(event, "reason", "")


def _versions(versions: Sequence[int]) -> str:
    if len(versions) < 2:
        return f"version {versions[0]}" if versions else "no version"
    return f"versions {versions[0]}-{versions[-1]}"


def _short(text: str, limit: int = 72) -> str:
    line = text.replace("\n", "⏎")
    return repr(line if len(line) <= limit else line[: limit - 1] + "…")


def trajectory_text(state: Trajectory) -> str:
    """One trajectory, from its prompt to its reward."""
    admitted = state.admitted
    lines = [
        f"trajectory {state.id}   task {admitted.task}   {admitted.purpose}"
        f"   temperature {admitted.temperature:g}   at least version {admitted.min_policy_version}"
    ]
    for message in admitted.public.messages:
        lines += _block(message.role, message.content)
        lines += [f"   {image_text(image)}" for image in message.images]
    for index, turn in enumerate(state.turns):
        tokens = turn.tokens
        sampled = [v for v in tokens.versions_T if v >= 0]
        logprob = sum(tokens.logprobs_T)
        versions = _versions(sorted(set(sampled)))
        head = (
            f"turn {index}   {len(tokens) - len(sampled)} tokens given, {len(sampled)} sampled by "
            f"{versions}   logprob {logprob:.3f}   {turn.finish_reason}   {turn.replica}"
        )
        lines += _block(head, turn.text)
        for number, call in enumerate(turn.calls):
            lines += _block(f"call {index}.{number}   {call.queue}", str(call.arguments))
            for result in state.results_of(index):
                if result.call == number:
                    status = "ok" if result.ok else "error"
                    cost = f"{result.duration_ms:.1f} ms   {result.tier}   {result.replica}"
                    head = f"result {index}.{number}   {status}   {cost}"
                    lines += _block(head, result.text)
                    lines += [f"   {image_text(image)}" for image in result.images]
                    patch = result.handed_in.decode(errors="replace")
                    lines += _block("handed in", patch) if patch else []
        if turn.feedback:
            lines += _block("feedback", turn.feedback)
    if state.scored:
        lines.append(
            f"reward {state.scored.reward:g}   {state.scored.parts}   {state.scored.replica}"
        )
    if state.end:
        lines.append(f"{state.end.kind}   {_gist(state.end)}")
    if not state.scored and not state.end:
        hop = state.next_hop
        lines.append(
            f"in flight   next: {hop.stage if hop else 'nobody'} {hop.tool if hop else ''}"
        )
    return "\n".join(lines)


def image_text(image: StoredImage) -> str:
    """An image in one line."""
    size = f"   {image.width} x {image.height}" if image.width else ""
    kind = visible(image.media_type)
    return f"image {image.sha256}   {kind}{size}   {image.size_bytes} bytes"


def _block(head: str, text: str) -> list[str]:
    return [f"── {head}", *(f"   {visible(line)}" for line in text.splitlines() or [""])]


def visible(text: str) -> str:
    """Control characters spelled out: what a policy writes must not steer the reader's terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def alive_table(run: str, url: str, beats: Sequence[Heartbeat]) -> str:
    """Who is alive, one replica a line."""
    if not beats:
        return f"run {run} at {url}: nobody gives a sign of life"
    rows = [("ROLE", "REPLICA", "PID", "UP", "VERSION", "HOLDS", "LONGEST", "MEMORY", "PHASE")]
    for beat in sorted(beats, key=lambda beat: (beat.role, beat.replica)):
        longest = max(beat.held, key=lambda held: held.for_s, default=None)
        rows.append(
            (
                beat.role,
                beat.replica,
                str(beat.pid),
                f"{beat.up_s:.0f} s",
                str(beat.policy_version) if beat.policy_version >= 0 else "-",
                str(beat.held_count),
                f"{longest.trajectory} {longest.for_s:.1f} s" if longest else "-",
                f"{beat.rss_bytes / 2**20:.0f} MB",
                beat.phase or "working",
            )
        )
    return columns(rows)


def stall_lines(beats: Sequence[Heartbeat]) -> list[str]:
    """What stands still, one stall a line."""
    lines = [f"stall: {stall}" for stall in known_stalls(beats).values()]
    if beats and (why := without_dispatcher(beats)):
        lines.insert(0, f"stall: {why}")
    return lines


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
