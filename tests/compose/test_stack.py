"""The stack in containers for real: from nothing to a trained model, attacked, scaled, killed, gone without a trace.

It runs on a docker of its own. The base images are stand-ins (compose/stand_in.py), the Dockerfile and dev.yml the real
ones. Two stacks, the second with three servers, used in order: each test goes on where the one before has left it.
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest
from msgspec.structs import replace

from bus.connection import connect
from bus.embedded import free_port
from bus.logins import read_login
from bus.subjects import LOG_STREAM
from compose.stand_in import CannotRun, private_daemon
from tests.test_tools.attacks import EXHAUSTIONS, INTRUSIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "compose" / "generated"
RUN = "tested"
ROLES = {"dispatcher", "generator", "toolbox", "scorer", "learner", "recorder"}
STEPS = 70
SCALE = 4
PATIENCE_S = 600.0


class Stack:
    """The stack, by its commands."""

    def __init__(self, docker_host: str) -> None:
        self.nats = free_port()
        self.prometheus = free_port()
        self.environment = os.environ | {
            "DOCKER_HOST": docker_host,
            "RECIPES": str(Path(__file__).parent),
            "RECIPE": "recipes/recipe.toml",
            "RUN": RUN,
            "NATS_PORT": str(self.nats),
            "PROMETHEUS_PORT": str(self.prometheus),
        }

    def docker(self, *arguments: str) -> str:
        """What a docker command prints that must succeed."""
        done = self._run("docker", *arguments)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def compose(self, *arguments: str) -> str:
        """The same for `docker compose`."""
        return self.docker("compose", "--file", str(ROOT / "compose" / "dev.yml"), *arguments)

    def operator(self, *arguments: str) -> str:
        """What a command of an operator prints."""
        return self.compose("run", "--rm", "--no-deps", "-T", "operator", *arguments)

    def make_up(self) -> None:
        """`make up`, without asking a registry that is not there."""
        done = self._run(sys.executable, "-m", "compose.up", "--stand-ins")
        assert done.returncode == 0, done.stderr[-2000:] + self.compose("logs", "--tail", "15")

    def services(self) -> dict[str, str]:
        """Each container of the stack, with how it stands: `running healthy`, `exited 0`."""
        lines = self.compose("ps", "--all", "--format", "json").splitlines()
        found = {}
        for each in map(json.loads, lines):
            detail = each["Health"] if each["State"] == "running" else each["ExitCode"]
            found[each["Name"].removeprefix("agentic-actors-")] = f"{each['State']} {detail}"
        return found

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl so far."""
        path = f"/runs/{self.environment['RUN']}/metrics.jsonl"
        done = self._run("docker", "exec", "agentic-actors-recorder-1", "cat", path)
        return [json.loads(line) for line in done.stdout.splitlines() if line.endswith("}")]

    def foreground(self, *arguments: str) -> "subprocess.Popen[str]":
        """A `docker compose` command in a terminal of its own; its output and errors come together."""
        return subprocess.Popen(
            ["docker", "compose", "--file", str(ROOT / "compose" / "dev.yml"), *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def query(self, query: str) -> float:
        """What Prometheus answers; 0 for nothing, and while it does not."""
        url = f"http://127.0.0.1:{self.prometheus}/api/v1/query?" + urlencode({"query": query})
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
        except OSError:
            return 0.0
        return float(result[0]["value"][1]) if result else 0.0

    def nothing_is_left(self) -> None:
        """`down -v` takes containers, volumes and networks away, and the keeper leaves."""
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "20")
        label = "label=com.docker.compose.project=agentic-actors"
        for what in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
            assert self.docker(*what, "--quiet", "--filter", label) == ""
        self.until(lambda: not keepers(self), "the keeper has left")

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for it."""
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < end, f"not in {PATIENCE_S:g} s: {what}; {self.services()}"
            time.sleep(0.5)

    def _run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack that is up, from nothing."""
    compose = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if compose.returncode:
        pytest.skip("COMPOSE STACK NOT TESTED HERE: no `docker compose`; .ci/docker installs it")
    try:
        with private_daemon(networks=True) as address:
            stack = Stack(address)
            try:
                stack.make_up()
                yield stack
            finally:
                stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")
    except CannotRun as error:
        pytest.skip(f"COMPOSE STACK NOT TESTED HERE: {error}")


def test_every_service_is_healthy_and_trains(stack: Stack) -> None:
    """After `make up`, and steps come. Then admission is paused, so that the tests that follow find a live run."""
    services = {f"{role}-1" for role in (*ROLES, "nats", "run", "prometheus")}
    assert stack.services() == dict.fromkeys(services, "running healthy")
    stack.until(lambda: len(stack.rows()) >= 1, "a step")
    stack.operator("pause", RUN)


def test_the_toolbox_holds_and_reaches_nats_only(stack: Stack) -> None:
    """No attack of the suite gets anything, in its sandbox or in the container, with the settings of the service."""
    networks = ("outside", "tools")
    listener = socket.create_server(("0.0.0.0", 0))
    threading.Thread(target=listener.listen, daemon=True).start()
    port = listener.getsockname()[1]
    gateways = [
        stack.docker(
            "network",
            "inspect",
            f"agentic-actors_{name}",
            "-f",
            "{{(index .IPAM.Config 0).Gateway}}",
        ).strip()
        for name in networks
    ]
    with listener:
        said = stack.compose(
            *("run", "--rm", "--no-deps", "-T", "--volume", f"{ROOT}/tests:/srv/actors/tests:ro"),
            *("--entrypoint", "python3", "toolbox", "-m", "tests.compose.inside"),
            *(f"{address}:{port}" for address in gateways),
        )
    found = json.loads(said.splitlines()[-1])
    assert found["escapes"] == []
    calls = found["calls"]
    assert set(calls) == {*INTRUSIONS, *EXHAUSTIONS}
    for name in INTRUSIONS:
        assert calls[name].startswith("exit "), (name, calls[name])
        assert "stopped:" in calls[name], (name, calls[name])
        assert "BREACH" not in calls[name], (name, calls[name])
        assert "Traceback" not in calls[name], (name, calls[name])
    for name, (_, reasons) in EXHAUSTIONS.items():
        # the container counts memory too, and the process that it kills first may be the code's own
        assert calls[name] in reasons | {"memory", "exit"}, name
    print(f"a call in the container: p50 {found['p50_ms']:.1f} ms")


def test_more_generators_join(stack: Stack) -> None:
    """`--scale generator=4` takes effect: four give signs of life, Prometheus finds them all, and all take work."""
    stack.compose("up", "--detach", "--no-recreate", "--scale", f"generator={SCALE}")

    def with_weights() -> int:
        lines = (line.split() for line in stack.operator("ps", "--run", RUN).splitlines())
        return sum(words[:1] == ["generator"] and words[5] != "-" for words in lines)

    stack.until(lambda: with_weights() == SCALE, "four generators with weights")
    stack.until(lambda: stack.query("sum(up)") == len(ROLES) + SCALE - 1, "every replica is up")
    stack.operator("resume", RUN)
    stack.operator("pause", RUN)
    busy = 'count(actors_hop_seconds_count{role="generator"} > 0)'
    stack.until(lambda: stack.query(busy) == SCALE, "each generator has sampled")


def test_whatever_is_killed_heals(stack: Stack) -> None:
    """`docker kill` of everything, NATS too: all are healthy again by themselves."""
    names = sorted(name for name, how in stack.services().items() if how.startswith("running"))
    assert len(names) == len(ROLES) + 3 + SCALE - 1
    stack.operator("resume", RUN)
    stack.docker("kill", *(f"agentic-actors-{name}" for name in names))
    # the run may be over before the last of them is back: then they have ended well
    well = {"running healthy", "exited 0"}
    stack.until(lambda: set(stack.services().values()) <= well, "all are well again")


def test_the_run_ends_and_nothing_is_lost(stack: Stack, tmp_path: Path) -> None:
    """All steps, every trajectory accounted for, the run's folder whole; and roles that have done their work rest."""
    generators = [f"generator-{number}" for number in range(2, SCALE + 1)]
    over = dict.fromkeys([*(f"{role}-1" for role in (*ROLES, "run")), *generators], "exited 0")
    stack.until(lambda: over.items() <= stack.services().items(), "the end of the run")
    said = stack.operator("verify", "--run", RUN)
    assert "balanced: each has one fate" in said
    stack.compose("cp", f"run:/runs/{RUN}", str(tmp_path))
    folder = tmp_path / RUN
    steps = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, STEPS + 1))
    for name in ("reward.png", "checkpoint/config.json", "recipe.toml"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "archive").glob("trajectories-*.parquet"))


def test_a_repository_is_mended_and_tried(stack: Stack, tmp_path: Path) -> None:
    """git and pytest are in the image, in the sandboxes of toolbox and scorer too: examples/calculator.toml."""
    stack.environment |= {"RECIPE": "examples/calculator.toml", "RUN": "mended"}
    stack.compose("up", "--detach")  # not until all are well: its one step may be over before that
    stack.until(lambda: stack.services()["run-1"] == "exited 0", "the end of the run")
    stack.compose("cp", "run:/runs/mended/metrics.jsonl", str(tmp_path))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert 0 < row["reward_mean"] < 1
    assert row["failed_by_cause"] == {}


def test_no_login_is_in_the_image_or_the_logs(stack: Stack) -> None:
    """What `make up` has made for the containers is nowhere else."""
    logins = GENERATED.glob("*.json")
    seeds = [json.loads(login.read_text())["seed"] for login in logins]
    assert len(seeds) > len(ROLES)

    def files_with(*texts: str) -> list[str]:
        search = 'grep -rlF "$@" /app /venv /srv /etc /runs; true'
        patterns = [part for text in texts for part in ("-e", text)]
        image = ("run", "--rm", "--network", "none", "--entrypoint", "sh", "agentic-actors:cpu")
        return stack.docker(*image, "-c", search, "sh", *patterns).splitlines()

    assert files_with("THE TABLE"), "it finds what is there"
    assert files_with(*seeds) == []
    logs = stack.compose("logs")
    assert logs
    assert not [seed for seed in seeds if seed in logs]


def test_nothing_is_left(stack: Stack) -> None:
    """Of a run that is over."""
    stack.nothing_is_left()


# -- three servers ---------------------------------------------------------------------------------

HELD = "held-by-three"


def test_the_leader_of_three_servers_is_killed(stack: Stack, tmp_path: Path) -> None:
    """In the middle of a run whose streams each server holds: steps go on, and the server comes back by itself."""
    shutil.copytree(ROOT / "tests" / "stalling", tmp_path, dirs_exist_ok=True)
    tmp_path.chmod(0o755)  # whoever is in the containers is nobody here
    recipe = tmp_path / "recipe.toml"
    endless = recipe.read_text().replace("steps = 6", "steps = 100000")
    recipe.write_text(f"{endless}\n[nats]\nreplicas = 3\n")
    stack.environment |= {
        "RECIPES": str(tmp_path),
        "RECIPE": "recipes/recipe.toml",
        "RUN": HELD,
        "COMPOSE_PROFILES": "cpu,cluster",
    }
    stack.make_up()
    stack.until(lambda: len(stack.rows()) >= 3, "3 steps")
    found = asyncio.run(log_info(stack))
    assert found["config"]["num_replicas"] == len(found["cluster"]["replicas"]) + 1 == 3
    stack.docker("kill", f"agentic-actors-{found['cluster']['leader']}-1")
    done = len(stack.rows())
    stack.until(lambda: len(stack.rows()) >= done + 3, "3 steps after it")
    well = {"running healthy"}
    stack.until(lambda: set(stack.services().values()) == well, "all are well again")


async def log_info(stack: Stack) -> Any:
    """What the servers say of the log, to a client on this machine that knows the authority of their certificate."""
    login = read_login(GENERATED / "provision.json")
    async with connect(replace(login, url=f"nats://127.0.0.1:{stack.nats}"), "test") as bus:
        return await bus.ask(f"STREAM.INFO.{LOG_STREAM}")


def test_ctrl_c_drains(stack: Stack) -> None:
    """In the middle of work: each container ends by itself, well before it would be killed, and nothing is lost."""
    up = stack.foreground("up", "--no-recreate")
    assert up.stdout is not None
    # at first it sees to it that all run: a signal then makes it stop them and start them at the same time
    steps = (line for line in up.stdout if "step" in line)
    assert len(list(itertools.islice(steps, 20))) == 20
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=PATIENCE_S)
    assert set(stack.services().values()) == {"exited 0"}
    stack.compose("up", "--detach", "--wait", "nats", "nats-2", "nats-3")
    assert "balanced: each has one fate" in stack.operator("verify", "--run", HELD)


def test_nothing_is_left_of_three(stack: Stack) -> None:
    """Of a run that is not over."""
    stack.nothing_is_left()


def keepers(stack: Stack) -> list[int]:
    """Keepers of this stack's daemon."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("DOCKER_HOST") == stack.environment["DOCKER_HOST"]
            if ours and "compose.keeper" in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            pass
    return found
