"""`actors dead`: the messages that no handler could take, seen, sent again or deleted."""

from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from actors.errors import UserError
from actors.joining import reach, reach_all
from actors.views import columns, visible
from bus.codec import decode
from bus.connection import Bus
from bus.dead import Dead, dead_letters, drop_dead
from bus.errors import BadMessage
from bus.work import publish_work
from schemas.messages import DeadLetter, Work
from schemas.trajectory import Trajectory

_SHOWN_CHARS = 60
_SHOWN_BYTES = 4096
"""Of a payload that no message can be read from."""


async def list_dead(run: str | None, nats_url: str) -> None:
    """Print one line for each."""
    async with reach(run, nats_url) as (bus, log):
        found = await dead_letters(bus, log.run)
    click.echo(dead_table(found) if found else f"run {log.run} has no dead letters")


async def show_dead(seq: int, run: str | None, nats_url: str) -> None:
    """Print all that one says. Raises UserError when there is none."""
    async with reach(run, nats_url) as (bus, log):
        click.echo(dead_text(await _find(bus, log.run, seq)))


async def replay_dead(seq: int, run: str | None, nats_url: str) -> int:
    """Send the work message again if its trajectory still waits for that hop; 1 when nothing was to be done."""
    async with reach(run, nats_url) as (bus, log):
        dead = await _find(bus, log.run, seq)
        work, why = _work_of(dead)
        state = await log.trajectory(work.trajectory) if work else None
        if work and dead.letter:
            why = _why_not(dead.letter, work, state)
        if why or state is None:
            click.echo(f"nothing done: {why}")
            return 1
        await publish_work(bus, log.run, state, again=True)
        click.echo(f"sent again: {state.id} waits for {_place(state)}; the dead letter stays")
        return 0


async def drop(seq: int | None, run: str | None, nats_url: str) -> None:
    """Delete one, or all when none is named. Raises UserError when there is none."""
    async with reach_all(run, nats_url) as reached:
        if seq is None:
            found = await dead_letters(reached.bus, reached.log.run)
        else:
            found = [await _find(reached.bus, reached.log.run, seq)]
        dropped = 0
        async with reached.provisioning() as bus:
            for dead in found:
                dropped += await drop_dead(bus, dead.raw.seq)
        click.echo(f"{dropped} dropped")


async def _find(bus: Bus, run: str, seq: int) -> Dead:
    for dead in await dead_letters(bus, run):
        if dead.raw.seq == seq:
            return dead
    raise UserError(f"run {run} has no dead letter {seq}; `actors dead list` shows them")


def _work_of(dead: Dead) -> tuple[Work | None, str]:
    """The work message that was put aside, or why there is none."""
    if dead.letter is None:
        return None, f"it is junk: {dead.junk}"
    try:
        return decode(dead.letter.payload, Work), ""
    except BadMessage as error:
        return None, f"what was put aside is no work message: {error.why}"


def _why_not(letter: DeadLetter, work: Work, state: Trajectory | None) -> str:
    """Why a work message would wake nobody; empty when the trajectory still waits for that hop."""
    if state is None:
        return f"{work.trajectory} was never admitted"
    if state.end is not None:
        return f"{state.id} has ended: {state.end.kind}"
    if state.seq != work.seq:
        return f"{state.id} has moved on, to {_place(state)}"
    hop = state.next_hop
    if hop is None or hop.stage != letter.stage:
        return f"{state.id} does not wait for {letter.stage} but for {_place(state)}"
    return ""


def _place(state: Trajectory) -> str:
    hop = state.next_hop
    return " ".join(filter(None, hop)) if hop else "nobody"


# -- as text ---------------------------------------------------------------------------------------


def dead_table(found: list[Dead]) -> str:
    """One a line."""
    rows = [("SEQ", "STAGE", "TRAJECTORY", "CAUSE", "WHEN", "REPLICA", "ERROR")]
    for dead in found:
        raw, letter = dead.raw, dead.letter
        if letter is None:
            rows.append((str(raw.seq), "-", "-", "junk", _when(raw.time_s), "-", _line(dead.junk)))
            continue
        cause = f"{letter.boundary}.{letter.code}"
        cells = (letter.stage, letter.trajectory or "-", cause, _when(raw.time_s), letter.replica)
        rows.append((str(raw.seq), *map(visible, cells), _line(letter.error)))  # type: ignore[arg-type]
    return columns(rows)


def _when(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%m-%d %H:%M:%S")


def _line(text: str) -> str:
    first = visible(next(iter(text.splitlines()), ""))
    return first if len(first) <= _SHOWN_CHARS else first[: _SHOWN_CHARS - 1] + "…"


def dead_text(dead: Dead) -> str:
    """All that is known of one, control characters spelled out."""
    raw, letter = dead.raw, dead.letter
    lines = [f"dead letter {raw.seq}   {visible(raw.subject)}   {_when(raw.time_s)} UTC"]
    if letter is None:
        return "\n".join([*lines, f"junk: {visible(dead.junk)}", _hex(raw.data)])
    for name, value in (
        ("stage", letter.stage),
        ("trajectory", f"{letter.trajectory}   log sequence {letter.seq}"),
        ("cause", f"{letter.boundary}.{letter.code}"),
        ("replica", letter.replica),
    ):
        lines.append(f"{name:<12}{visible(value)}")
    lines += ["error", *(f"   {visible(line)}" for line in letter.error.splitlines())]
    return "\n".join([*lines, f"payload, {len(letter.payload)} bytes", *_payload(letter.payload)])


def _payload(payload: bytes) -> list[str]:
    """As indented JSON where it is msgpack, else as it is."""
    try:
        message: Any = decode(payload, Any)
        text = msgspec.json.format(msgspec.json.encode(message, enc_hook=str), indent=2).decode()
    except (BadMessage, TypeError, ValueError, RecursionError):
        return [_hex(payload)]
    return [f"   {visible(line)}" for line in text.splitlines()]


def _hex(data: bytes) -> str:
    more = f" and {len(data) - _SHOWN_BYTES} bytes more" if len(data) > _SHOWN_BYTES else ""
    return f"   {data[:_SHOWN_BYTES]!r}{more}"
