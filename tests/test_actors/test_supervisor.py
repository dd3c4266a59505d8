"""What a supervisor makes of a death; that it kills and replaces is tested with whole runs (tests/test_stalls.py)."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from actors.supervisor import Death, Supervisor, last_error
from bus.connection import Endpoint
from bus.embedded import free_port
from bus.logins import Logins
from schemas.recipe import Policy, Recipe


async def _group() -> None:
    async def fail() -> None:
        raise ValueError("slots must be positive")

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())


def _traceback_of_a_group(capsys: pytest.CaptureFixture[str]) -> str:
    try:
        asyncio.run(_group())
    except ExceptionGroup:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    return capsys.readouterr().err


def entry(level: str, event: str, **more: str) -> str:
    return json.dumps({"level": level, "event": event, **more})


def test_the_reason_is_the_last_error_of_this_life(tmp_path: Path) -> None:
    """Of what the log's own lines say; not what an earlier replica wrote, and not a warning."""
    log = tmp_path / "log"
    log.write_text(entry("error", "cannot run", error="policy.model: no folder 'x'") + "\n")
    assert last_error(log) == "policy.model: no folder 'x'"
    earlier = log.stat().st_size
    with log.open("a") as file:
        file.write(entry("warning", "slow") + "\n")
    assert last_error(log, earlier) == "no reason in its log"
    assert last_error(tmp_path / "none").startswith("it was never started")


def test_the_reason_is_the_exception_that_ended_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('Traceback (most recent call last):\n  File "x"\nKeyError: 3\n')
    assert last_error(log) == "KeyError: 3"


def test_the_reason_is_the_exception_within_a_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task group wraps it in a frame of its own."""
    log = tmp_path / "log"
    text = _traceback_of_a_group(capsys)
    assert "ExceptionGroup" in text
    log.write_text(text)
    assert last_error(log) == "ValueError: slots must be positive"


def test_who_killed_it_matters() -> None:
    """A kill from outside of a replica that had served says nothing of the next one; a hang of its own does."""
    killed = Death(-signal.SIGKILL, served=True)
    assert (killed.from_outside, killed.served_and_killed, killed.why) == (
        *(True, True),
        "killed by SIGKILL",
    )
    assert not Death(-signal.SIGKILL).served_and_killed, "it never started"
    hung = Death(-signal.SIGKILL, served=True, hung="it hung: no sign of life for 31 s")
    assert (hung.from_outside, hung.served_and_killed) == (False, False)
    assert hung.why == "it hung: no sign of life for 31 s"
    assert Death(1, served=True).why == "", "its log tells"


@pytest.mark.slow
async def test_a_server_that_is_away_is_no_crash_loop(tmp_path: Path) -> None:
    """Replicas that come back meanwhile end after 5 s each; five such deaths of another kind stop a run."""
    logins = Logins({}, Endpoint(url=f"nats://127.0.0.1:{free_port()}"))
    supervisor = Supervisor("r", logins, tmp_path / "r" / "logs", Recipe(policy=Policy(model="m")))
    keeping = asyncio.create_task(supervisor.keep("scorer", 1))
    done, _ = await asyncio.wait({keeping}, timeout=45)
    assert not done
    await supervisor.stop()
    await keeping
