"""Tools of a run that goes on: served by workers in another language, added, replaced, removed. Real processes."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import run_folder
from actors.fleet import Fleet
from actors.run_folder import RunFolder
from actors.train import INTERRUPTED
from bus.connection import Bus, connect
from bus.log import Log, open_log
from schemas.events import AnyEvent, Result, ToolAdded, ToolRemoved, Turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = Path(__file__).parent / "tool_workers" / "recipe.toml"
RUN = "live"
PATIENCE_S = 200.0
"""For conditions that come within seconds on a machine that is not busy."""


class LiveRun:
    """A run of the recipe, and all that its log has had so far."""

    def __init__(self, runs: Path, bus: Bus, log: Log, train: asyncio.subprocess.Process) -> None:
        self.runs = runs
        self.bus = bus
        self.events: list[AnyEvent] = []
        self._log = log
        self._train = train
        self._more = log.follow(poll_s=0.1)

    async def until(self, is_so: Callable[[], object]) -> None:
        """Read the log until it is so."""
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                assert self._train.returncode is None, "the run has ended before"
                self.events += [stored.event for stored in await anext(self._more)]

    def results(self, replica: int = 0) -> list[Result]:
        """Of all tools, or those that a process gave."""
        found = [event for event in self.events if isinstance(event, Result)]
        return [each for each in found if not replica or each.replica.endswith(f"-{replica}")]

    def called(self) -> dict[tuple[str, int, int], str]:
        """The tool and version of each call: trajectory, turn and call → queue."""
        turns: dict[str, int] = {}
        found = {}
        for event in self.events:
            if isinstance(event, Turn):
                turn = turns[event.trajectory] = turns.get(event.trajectory, -1) + 1
                for index, call in enumerate(event.calls):
                    found[event.trajectory, turn, index] = call.queue
        return found

    async def say(self, *arguments: str, status: int = 0) -> str:
        """What an `actors` command prints."""
        process = await started(self.runs, *arguments)
        output, _ = await process.communicate()
        assert process.returncode == status, output.decode()
        return output.decode()

    async def stop(self) -> dict[str, Any]:
        """End the run as its operator would; what `actors verify` says of it."""
        await self.say("stop", RUN)
        assert await self._train.wait() == INTERRUPTED
        found: dict[str, Any] = json.loads(await self.say("verify", "--run", RUN, "--json"))
        return found


async def started(runs: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "actors",
        *arguments,
        env=os.environ | {"ACTORS_RUNS": str(runs), "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


@asynccontextmanager
async def live_run(runs: Path, *settings: str) -> AsyncIterator[LiveRun]:
    """The run, from its first event on; nothing of it is left behind."""
    sets = [part for setting in settings for part in ("--set", setting)]
    train = await started(runs, "train", str(RECIPE), "--run", RUN, *sets)
    said = asyncio.create_task(train.stdout.read())  # type: ignore[union-attr]
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (home := RunFolder(RUN).live()) is None:
                assert train.returncode is None, (await said).decode()
                await asyncio.sleep(0.1)
        async with connect(home.logins.of("operator"), "test") as bus, open_log(bus, RUN) as log:
            yield LiveRun(runs, bus, log, train)
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("ACTORS_RUNS") == str(runs):
                    process.kill()
            except psutil.Error:
                continue
        await train.wait()
        print((await said).decode())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    return tmp_path


# -- a worker in another language ------------------------------------------------------------------


async def worker(folder: Path, runs: Path, **environment: str) -> asyncio.subprocess.Process:
    """One that takes calls of word_count."""
    process = await asyncio.create_subprocess_exec(
        "node",
        "worker.mjs",
        str(runs / RUN),
        "./odd_word_count.mjs",
        cwd=folder,
        env=os.environ | {"ACTORS_RUNS": str(runs), "NATS_URL": ""} | environment,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        assert b"serves word_count" in await process.stdout.readline()  # type: ignore[union-attr]
    return process


async def test_a_run_goes_through_a_worker_in_javascript(runs: Path, worker_folder: Path) -> None:
    """It shows up in `ps`; killed with calls in its hands, another has their results; drained, a third goes on.

    Every observation is right, nothing has failed, and no toolbox of ours took a call.
    """
    async with live_run(runs) as run:
        fleet = Fleet()
        await fleet.hear(run.bus, RUN)
        first = await worker(worker_folder, runs, HANGS_AFTER="8")
        await run.until(lambda: len(run.results(first.pid)) == 8)

        def held() -> list[str]:
            beats = [beat for beat in fleet.alive() if beat.pid == first.pid]
            return [each.trajectory for beat in beats for each in beat.held if each.for_s > 0.5]

        await run.until(lambda: len(held()) == 4)
        taken = held()
        seen = re.compile(rf"^toolbox +\S+-{first.pid} ", re.MULTILINE)
        async with asyncio.timeout(PATIENCE_S):
            while not seen.search(await run.say("ps", "--run", RUN)):
                pass  # a sign of life may be late
        os.kill(first.pid, signal.SIGKILL)
        second = await worker(worker_folder, runs)
        await run.until(
            lambda: {each.trajectory for each in run.results(second.pid)}.issuperset(taken)
        )
        third = await worker(worker_folder, runs)
        second.terminate()
        assert await second.wait() == 0
        done = len(run.results(third.pid))
        await run.until(lambda: len(run.results(third.pid)) > done)
        found = await run.stop()
        assert await third.wait() == 0
    assert found["balanced"]
    assert not found["failed_by_cause"]
    assert found["dead_letters"] == 0
    workers = {str(each.pid) for each in (first, second, third)}
    called = run.called()
    for result in run.results():
        remote = called[result.trajectory, result.turn, result.call] == "word_count"
        assert remote == (result.replica.rpartition("-")[2] in workers)
        assert result.text == ("5" if remote else "a rose is a rose")


# -- added, replaced, removed ----------------------------------------------------------------------


def shout(folder: Path, word: str) -> str:
    """A version of the tool, as a user writes it."""
    (folder / "shout.py").write_text(
        f'''
import asyncio
from pathlib import Path

from tools.tool import Context

HELD = Path("{folder}", "{word} is held")


async def shout(context: Context, text: str) -> str:
    """Say it louder."""
    await asyncio.sleep(1.0)
    while HELD.exists():
        await asyncio.sleep(0.05)
    return text.upper() + " {word}"
'''
    )
    return f"{folder / 'shout.py'}:shout"


async def test_a_tool_comes_is_replaced_and_goes(runs: Path, tmp_path: Path) -> None:
    """Each call is run by the version that it was written for, also after that was replaced; then the policy is told.

    Nothing has failed, and no call is left without its result.
    """
    settings = ('generator.script="tool_workers:shouting"', 'scorer.reward="tool_workers:nothing"')
    async with live_run(runs, *settings) as run:

        def shouted(word: str) -> int:
            return sum(result.text == f"A ROSE {word}" for result in run.results())

        await run.until(lambda: sum(isinstance(event, Turn) for event in run.events) > 4)
        assert not run.called(), "no tool is there to be called"
        assert "may call shout@" in await run.say("tools", "add", RUN, shout(tmp_path, "one"))
        assert "already" in await run.say("tools", "add", RUN, shout(tmp_path, "one"))
        await run.until(lambda: shouted("one") > 4)
        held = tmp_path / "one is held"
        held.touch()
        await asyncio.sleep(0.5)  # what had passed it has come
        await run.until(lambda: len(run.called()) > len(run.results()))
        assert "instead of" in await run.say("tools", "add", RUN, shout(tmp_path, "two"))
        held.unlink()
        await run.until(lambda: shouted("two") > 4)
        await run.say("tools", "remove", RUN, "shout")

        def told() -> int:
            turns = [event for event in run.events if isinstance(event, Turn)]
            return sum("shout was removed" in turn.feedback for turn in turns)

        await run.until(lambda: told() > 4)
        await run.until(lambda: len(run.called()) == len(run.results()))
        found = await run.stop()

    one, two = [event.queue for event in run.events if isinstance(event, ToolAdded)]
    word_of = {one: "A ROSE one", two: "A ROSE two"}
    called = run.called()
    assert set(called.values()) == {one, two}
    for result in run.results():
        assert result.text == word_of[called[result.trajectory, result.turn, result.call]]
    replaced = next(
        at
        for at, event in enumerate(run.events)
        if isinstance(event, ToolAdded) and event.queue == two
    )
    late = [event.text for event in run.events[replaced:] if isinstance(event, Result)]
    assert "A ROSE one" in late, (
        "a call of the first version was finished by it after the second came"
    )
    assert sum(isinstance(event, ToolRemoved) for event in run.events) == 1
    assert found["balanced"]
    assert not found["failed_by_cause"]
    assert found["dead_letters"] == 0
