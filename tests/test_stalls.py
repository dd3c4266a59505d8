"""Whole runs in which something stands still: who says so, how soon, and that it goes on. Real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.train import INTERRUPTED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]  # half a minute each, and much more when busy

RECIPE = Path(__file__).parent / "stalling" / "recipe.toml"
RUN = "stalling"
ENDLESS = "learner.steps=100000"
"""For a run that must not be over before the test has seen what it looks for; `Machine.stop` ends it."""
NOBODY_HANGS = "deadlines.hang_s=60"
"""For tests that are of something else, on a machine that is busy."""
PATIENCE_S = 200.0
"""For conditions that come within seconds on a machine that is not busy."""


class Command:
    """An `actors` command that runs, and what it has printed so far with the time of each line."""

    def __init__(self, runs: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "actors", *arguments],
            env=os.environ | {"ACTORS_RUNS": str(runs), "COLUMNS": "200", "ACTORS_LOG": "text"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append((time.time(), line.rstrip()))

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def said(self, pattern: str) -> float:
        """When it printed it; waits."""
        found: list[float] = []

        def look() -> bool:
            found.extend(at for at, line in self.lines if re.search(pattern, line))
            return bool(found)

        self.until(look, f"{pattern!r} printed")
        return found[0]

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < end, f"not in {PATIENCE_S:g} s: {what}\n{self.output}"
            assert self.process.poll() is None, f"it ended before: {what}\n{self.output}"
            time.sleep(0.1)

    def ends(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._reader.join()
        return status


class Machine:
    """Runs of the recipe, each in this test's own folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._commands: list[Command] = []

    def start(self, *arguments: str) -> Command:
        self._commands.append(Command(self.runs, *arguments))
        return self._commands[-1]

    def end(self) -> None:
        """Leave nothing behind."""
        for process in self.ours():
            process.kill()
        for command in self._commands:
            command.ends()
            print(command.process.args, command.output, sep="\n")

    def train(self, *settings: str) -> Command:
        sets = [part for setting in settings for part in ("--set", setting)]
        return self.start("train", str(RECIPE), "--run", RUN, *sets)

    def say(self, *arguments: str) -> str:
        command = self.start(*arguments)
        assert command.ends() == 0, command.output
        return command.output

    def stop(self, run: Command) -> None:
        """End an endless run as its operator would, and see that its log balances."""
        self.say("stop", RUN)
        assert run.ends() == INTERRUPTED, run.output
        self.say("verify", "--run", RUN)

    def beating(self, role: str) -> dict[int, str]:
        """The replicas of a role that give signs of life: pid and the rest of their line."""
        lines = self.say("ps", "--run", RUN).splitlines()
        words = [line.split() for line in lines if line.startswith(f"{role} ")]
        return {int(line[2]): " ".join(line[3:]) for line in words}

    def events(self) -> list[dict[str, Any]]:
        """The whole log of a run that is over."""
        output = self.say("tail", "--run", RUN, "--from-start", "--json")
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    def ours(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get("ACTORS_RUNS") == str(self.runs):
                    yield process
            except psutil.Error:
                continue


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.end()


def working(machine: Machine, command: Command, role: str, phase: str = "working") -> int:
    """The pid of a replica at its work; waits for it."""
    pids: list[int] = []

    def look() -> bool:
        pids.extend(pid for pid, line in machine.beating(role).items() if phase in line)
        return bool(pids)

    command.until(lambda: (machine.runs / RUN / "endpoint.json").exists(), "a run to join")
    command.until(look, f"a {role} that is {phase}")
    return pids[0]


def steps_done(machine: Machine) -> int:
    path = machine.runs / RUN / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_stage_without_a_replica_says_so_and_goes_on_when_one_appears(machine: Machine) -> None:
    """Within 5 s of the first trajectory that waits; `ps` says it too; one that joins ends it."""
    run = machine.train("replicas.toolbox=0", "learner.steps=100")
    said = run.said(r"^stall: no toolbox is there; g\S+ .*wait")
    run.until(lambda: "stall: no toolbox is there" in machine.say("ps", "--run", RUN), "ps says it")
    joined = machine.start("run", "toolbox", "--run", RUN)
    run.said(r"^over: no toolbox is there")
    assert run.ends() == 0, run.output
    joined.ends()
    assert steps_done(machine) == 100
    first = next(e for e in machine.events() if e["kind"] == "turn" and e["calls"])
    assert 0 < said - first["time_s"] < 20, "5 s, and much more for a machine that is busy"


@pytest.mark.parametrize("role", ["generator", "scorer"])
def test_a_stopped_replica_is_killed_and_replaced(machine: Machine, role: str) -> None:
    """SIGSTOP: alive, and silent. It counts as a death, with its reason, and the run ends by itself."""
    run = machine.train(ENDLESS)
    pid = working(machine, run, role)
    os.kill(pid, signal.SIGSTOP)
    run.said(rf"replica hangs; killing it.*pid={pid}.*no sign of life")
    run.said(r"replica died; restarting.*it hung: no sign of life for")
    run.until(lambda: bool(machine.beating(role).keys() - {pid}), "another in its place")
    done = steps_done(machine)
    run.until(lambda: steps_done(machine) > done, "a step after it")
    machine.stop(run)


def test_a_hop_held_for_two_deadlines_takes_its_holder_along(machine: Machine) -> None:
    """A handler that waits for ever in a healthy process: named by the watchdog, killed, and the hop is done anew."""
    run = machine.train(
        'scorer.reward="stalling:hangs_once"',
        "deadlines.score_s=8",  # it is told of well before it is killed
        "asynchrony.straggler_wait_s=100",  # and the hop that is done anew is waited for
    )
    said = run.said(r"^stall: g\S+ \(score\) is held by scorer-\S+, for")
    killed = run.said(r"replica hangs; killing it.*\(score\) has been held for")
    assert said < killed
    assert run.ends() == 0, run.output
    kinds = [event["kind"] for event in machine.events()]
    assert kinds.count("failed") == 0
    assert steps_done(machine) == 6


def test_a_standby_takes_over_from_a_dispatcher_that_hangs(machine: Machine) -> None:
    """When the lease has run out; the old holder, killed or woken, does no harm."""
    run = machine.train(ENDLESS)
    holder = working(machine, run, "dispatcher")
    standby = machine.start("run", "dispatcher", "--run", RUN)
    others: set[int] = set()

    def stands_by() -> bool:
        lines = machine.beating("dispatcher").items()
        others.update(pid for pid, line in lines if pid != holder and "standby" in line)
        return bool(others)

    run.until(stands_by, "a standby")
    (other,) = others
    os.kill(holder, signal.SIGSTOP)
    begun = time.monotonic()
    run.until(lambda: "working" in machine.beating("dispatcher").get(other, ""), "the lease taken")
    assert time.monotonic() - begun < 60, "5 s, the time to see it, and a busy machine"
    done = steps_done(machine)
    run.until(lambda: steps_done(machine) > done, "a step after it")
    machine.stop(run)
    standby.ends()
    ids = [event["trajectory"] for event in machine.events() if event["kind"] == "admitted"]
    assert len(set(ids)) == len(ids)


def test_a_server_that_is_away_is_nobody_s_hang(machine: Machine) -> None:
    """SIGSTOP of nats-server for 20 s, more than twice `hang_s`: no replica is killed for it, and the run goes on."""
    run = machine.train(ENDLESS)
    run.until(lambda: steps_done(machine) > 0, "a step")
    server = next(process for process in machine.ours() if process.name() == "nats-server")
    server.suspend()
    time.sleep(20.0)  # what is tested is this time
    server.resume()
    done = steps_done(machine)
    run.until(lambda: steps_done(machine) > done + 20, "steps after it")
    machine.stop(run)
    assert "replica hangs" not in run.output


def test_sigterm_drains_a_replica_that_leaves(machine: Machine) -> None:
    """It hands back what it holds and is not started again; another goes on with it."""
    run = machine.train(ENDLESS, NOBODY_HANGS)
    first = working(machine, run, "generator")
    joined = machine.start("run", "generator", "--run", RUN)
    run.until(lambda: len(machine.beating("generator")) == 2, "two generators")
    os.kill(first, signal.SIGTERM)
    run.until(lambda: first not in machine.beating("generator"), "it has left")
    machine.stop(run)
    joined.ends()
    assert "replica died" not in run.output
    assert not [event for event in machine.events() if event["kind"] == "failed"]


def test_a_crash_loop_says_which_exception(machine: Machine) -> None:
    """Data that breaks its reader each time stops the run, with the last line of the traceback and the log."""
    run = machine.train('data.rows="stalling:broken_rows"', NOBODY_HANGS)
    assert run.ends() == 2
    assert re.search(
        r"dispatcher died 5 times in a row; last: ValueError: row 3 is no row", run.output
    )
    assert run.output.count("replica died; restarting") == 4
    assert not list(machine.ours()), "nothing is left behind"
