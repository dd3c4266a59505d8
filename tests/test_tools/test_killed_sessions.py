"""A session of which something is killed at each point of its life: it ends by name, and nothing stays behind."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable
from pathlib import Path

import psutil
import pytest

from tools.errors import SandboxError
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Outcome, Session, SessionKind

pytestmark = pytest.mark.slow

VICTIMS = {"payload": (3, 2), "init": (3, 1), "template": (2, 2), "server": (2, 1)}
"""How deep in process namespaces they are, and their number in the innermost; see template.py."""
MOMENTS = [
    "before its first run",
    "in a run",
    "between two runs",
    "in an interruption",
    "in its end",
]
SCRIPTS: dict[SessionKind, tuple[str, str, str]] = {
    "bash": ("echo kept", "sleep 60", "trap '' INT; while :; do sleep 60; done"),
    "python": (
        "print('kept')",
        "import time; time.sleep(60)",
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)",
    ),
}
"""One that prints, one that waits, and one that cannot be interrupted."""


def kill(victim: str) -> int:
    """All of this kind, and how many: one session is open, and another world stands by."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            numbers = next(line for line in lines if line.startswith("NSpid")).split()[1:]
            if (len(numbers), int(numbers[-1])) == VICTIMS[victim]:
                os.kill(process.pid, signal.SIGKILL)
                found += 1
    return found


async def end_of(work: Awaitable[Outcome | None]) -> Outcome | SandboxError | None:
    try:
        return await work
    except SandboxError as error:
        return error


async def lived_through(
    moment: str, victim: str, session: Session
) -> Outcome | SandboxError | None:
    """The run at that moment or after it; none is the end of a session that was closed."""
    prints, waits, stays = SCRIPTS[session.kind]
    limits = Limits(wall_s=1.0)
    if moment in ("in a run", "in an interruption"):
        script = waits if moment == "in a run" else stays
        running = asyncio.ensure_future(end_of(session.run(script, limits=limits)))
        await asyncio.sleep(0.5 if moment == "in a run" else 1.5)
        assert kill(victim)
        return await running
    if moment == "in its end":
        closing = asyncio.ensure_future(end_of(session.close()))
        await asyncio.sleep(0)
        kill(victim)
        return await closing
    if moment == "between two runs":
        assert (await session.run(prints)).output == b"kept\n"
    assert kill(victim)
    return await end_of(session.run(prints))


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_kill_has_a_name_and_leaves_nothing(
    moment: str, victim: str, kind: SessionKind
) -> None:
    """The run at that point tells the truth or fails; the next session is whole; at the end there is no process."""
    others = set(psutil.Process().children(recursive=True))
    sandbox = NamespaceSandbox()
    async with asyncio.timeout(60):
        session = await sandbox.open_session(kind)
        end = await lived_through(moment, victim, session)
        if isinstance(end, Outcome) and end.session == "kept" and end.reason == "exit":
            assert end.output == b"kept\n"
        elif isinstance(end, Outcome):
            assert (end.reason, end.session) != ("exit", "kept")
        await session.close()
        again = await sandbox.open_session(kind)
        assert (await again.run(SCRIPTS[kind][0])).output == b"kept\n"
        await again.close()
        await sandbox.close()
        while set(psutil.Process().children(recursive=True)) - others:  # noqa: ASYNC110 - processes send no events
            await asyncio.sleep(0.01)
