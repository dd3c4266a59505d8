"""Whole runs on three nats-servers, of which the leader dies. Real servers on loopback, real processes."""

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from bus.connection import Endpoint, connect
from bus.embedded import free_port
from bus.errors import Unavailable
from bus.subjects import LOG_STREAM, streams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

RECIPE = Path(__file__).parent / "stalling" / "recipe.toml"
RUN = "servers"
STEPS = 14
AWAY_S = 5.0
"""Longer than a ping may take to be missed."""


@pytest.fixture
def servers(plain_servers, tmp_path: Path):
    """Start one with a store of its own."""

    def start(name: str, blocks: str = ""):
        return plain_servers(name, f'jetstream {{ store_dir: "{tmp_path / name}" }}\n{blocks}')

    return start


@pytest.fixture
async def cluster(servers):
    """Three servers that know one another, and would hold a stream three times."""
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    started = [
        servers(
            f"n{number}",
            f'cluster {{ name: test, listen: "127.0.0.1:{port}", routes: [{routes}] }}',
        )
        for number, port in enumerate(ports)
    ]
    trial = {"name": "TRIAL", "subjects": ["trial"], "num_replicas": 3, "storage": "file"}
    async with connect(Endpoint(url=started[0].url), "test") as bus, asyncio.timeout(60):
        while True:
            with contextlib.suppress(Unavailable):  # they have no leader yet
                created = await bus.request(
                    "$JS.API.STREAM.CREATE.TRIAL", json.dumps(trial).encode()
                )
                if "error" not in json.loads(created.data):
                    break
            await asyncio.sleep(0.2)
        await bus.request("$JS.API.STREAM.DELETE.TRIAL", b"")
    return started


async def stream_info(url: str, stream: str) -> dict[str, Any]:
    """Waits while the stream has no leader."""
    async with connect(Endpoint(url=url), "test") as bus:
        return await bus.ask(f"STREAM.INFO.{stream}")


def report(machine: Any, url: str) -> dict[str, Any]:
    """What `actors verify` says; it must be clean."""
    found: dict[str, Any] = json.loads(machine.say("verify", "--run", RUN, "--nats", url, "--json"))
    assert found["broken"] == {}
    return found


async def test_the_leader_of_the_log_dies(cluster, tmp_path: Path, machine_at) -> None:
    """Killed in the middle of a run, and back later: the run goes on without it, and nothing is lost."""
    url = ",".join(server.url for server in cluster)
    machine = machine_at(tmp_path / "runs", NATS_URL=url)
    settings = [f"learner.steps={STEPS}", "nats.replicas=3", "deadlines.hang_s=30"]
    sets = [part for key in settings for part in ("--set", key)]
    training = machine.start("train", str(RECIPE), "--run", RUN, *sets)
    machine.until(lambda: len(machine.rows(RUN)) >= 3 or training.poll() is not None, "3 steps")
    info = await stream_info(url, LOG_STREAM)
    assert info["config"]["num_replicas"] == 3
    (leader,) = [server for server in cluster if server.name == info["cluster"]["leader"]]
    leader.kill()
    killed_at = len(machine.rows(RUN))
    machine.until(
        lambda: len(machine.rows(RUN)) >= killed_at + 3 or training.poll() is not None,
        "3 steps without the leader",
    )
    leader.start()
    output, _ = training.communicate(timeout=400)
    assert training.returncode == 0, output
    found = report(machine, url)
    assert (found["ended"], found["steps"], found["fates"]["failed"]) == (True, STEPS, 0)
    for stream in streams():
        assert (await stream_info(url, stream))["config"]["num_replicas"] == 3, stream


def test_the_hub_of_a_far_toolbox_is_lost(hub_and_leaf, tmp_path: Path, machine_at) -> None:
    """The only toolbox knows a leaf node alone. The hub dies in the middle and is back later: nothing is lost."""
    hub, leaf = hub_and_leaf
    machine = machine_at(tmp_path / "runs", NATS_URL=hub.url)
    far = machine_at(tmp_path / "far", NATS_URL=leaf.url)
    settings = [f"learner.steps={STEPS}", "replicas.toolbox=0", "deadlines.hang_s=30"]
    sets = [part for key in settings for part in ("--set", key)]
    training = machine.start("train", str(RECIPE), "--run", RUN, *sets)
    (tmp_path / "far").mkdir()
    machine.until((machine.runs / RUN / "recipe.toml").exists, "a run to join")
    toolbox = far.start("run", "toolbox", "--run", RUN)
    machine.until(lambda: len(machine.rows(RUN)) >= 3 or training.poll() is not None, "3 steps")
    assert training.poll() is None
    hub.kill()
    time.sleep(AWAY_S)  # what is tested is this time
    hub.start()
    output, _ = training.communicate(timeout=400)
    assert training.returncode == 0, output
    found = report(machine, hub.url)
    assert (found["ended"], found["steps"], found["fates"]["failed"]) == (True, STEPS, 0)
    said, _ = toolbox.communicate(timeout=100)
    assert toolbox.returncode == 0, said
    assert not far.processes()


async def test_one_server_is_no_cluster(servers, tmp_path: Path, machine_at) -> None:
    """Replicas that it cannot keep are refused in one line, with the key and what to do."""
    server = servers("alone")
    machine = machine_at(tmp_path / "runs", NATS_URL=server.url)
    training = machine.start("train", str(RECIPE), "--run", RUN, "--set", "nats.replicas=3")
    output, _ = training.communicate(timeout=100)
    assert training.returncode != 0
    assert "nats.replicas = 3: the server is no cluster" in output
    assert "Traceback" not in output
