"""Three servers of the project's own configuration hold each stream together; one alone says that it cannot."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.connection import Bus, connect
from bus.embedded import die_with_parent, free_port
from bus.errors import BusError
from bus.logins import Logins, new_logins
from bus.provision import provision
from bus.server_config import Cluster, Server, config_text
from bus.subjects import streams

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.slow,
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Logins, list[subprocess.Popen[bytes]]]]:
    """Its logins, and its servers."""
    hosts = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    routes = [f"127.0.0.1:{free_port()}" for _ in hosts]
    logins = new_logins(",".join(f"nats://{host}" for host in hosts))
    binary = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
    processes = []
    for number, (host, route) in enumerate(zip(hosts, routes, strict=True)):
        store = str(tmp_path / f"store-{number}")
        server = Server(f"n{number}", host, store, logins, cluster=Cluster(route, routes))
        config = tmp_path / f"n{number}.conf"
        config.write_text(config_text(server))
        with (tmp_path / f"n{number}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [binary, "-c", str(config)],
                    stdout=log,
                    stderr=log,
                    preexec_fn=die_with_parent,
                )
            )
    yield logins, processes
    for process in processes:
        process.kill()
        process.wait()


async def replicas(bus: Bus, stream: str) -> int:
    answer = await bus.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout_s=10.0)
    return int(json.loads(answer.data)["config"]["num_replicas"])


async def provisioned(bus: Bus, count: int) -> None:
    """Once the servers have found a leader."""
    for _ in range(60):
        try:
            await provision(bus, "test", ["python"], replicas=count)
        except (TimeoutError, BusError):
            await asyncio.sleep(0.5)
        else:
            return
    raise AssertionError("no leader in 30 s")


async def test_each_stream_is_held_by_three(
    cluster: tuple[Logins, list[subprocess.Popen[bytes]]],
) -> None:
    """Another run that asks for less takes none away; with one server killed they answer on."""
    logins, servers = cluster
    async with connect(logins.of("provision"), "test") as bus:
        await provisioned(bus, 3)
        await provision(bus, "other", ["python"])
        assert {stream: await replicas(bus, stream) for stream in streams()} == dict.fromkeys(
            streams(), 3
        )
        servers[0].kill()
        servers[0].wait()
        await provisioned(bus, 3)
        assert await replicas(bus, "LOG") == 3


async def test_one_server_is_no_cluster(bus: Bus) -> None:
    """It is refused in a line that names the key and says what to do."""
    with pytest.raises(BusError, match=r"nats\.replicas = 3: the server is no cluster"):
        await provision(bus, "test", ["python"], replicas=3)
