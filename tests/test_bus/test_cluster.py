"""Three servers of the project's own configuration hold each stream together; one alone says that it cannot."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus import store
from bus.connection import Bus, connect
from bus.dead import dead_letters
from bus.embedded import die_with_parent, free_port
from bus.errors import BusError, Unreachable
from bus.log import open_log
from bus.logins import new_logins
from bus.provision import provision
from bus.room import shortage
from bus.server_config import Cluster, Server, config_text
from bus.subjects import streams
from bus.work import backlog

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.slow,
]


class Servers:
    """Those of one cluster."""

    def __init__(self, folder: Path) -> None:
        hosts = [f"127.0.0.1:{free_port()}" for _ in range(3)]
        routes = [f"127.0.0.1:{free_port()}" for _ in hosts]
        self.logins = new_logins(",".join(f"nats://{host}" for host in hosts))
        self._configs = [folder / f"n{number}.conf" for number in range(3)]
        self._processes: list[subprocess.Popen[bytes]] = []
        for number, (host, route) in enumerate(zip(hosts, routes, strict=True)):
            store = str(folder / f"store-{number}")
            server = Server(f"n{number}", host, store, self.logins, cluster=Cluster(route, routes))
            self._configs[number].write_text(config_text(server))
        self.start()

    def start(self) -> None:
        """All."""
        python = Path(sys.executable)
        binary = shutil.which("nats-server", path=str(python.parent)) or "nats-server"
        for config in self._configs:
            with config.with_suffix(".log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [binary, "-c", str(config)],
                        stdout=log,
                        stderr=log,
                        preexec_fn=die_with_parent,
                    )
                )

    def kill(self, count: int = 3) -> None:
        """So many."""
        for _ in range(min(count, len(self._processes))):
            process = self._processes.pop()
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Servers]:
    """Three servers that run."""
    servers = Servers(tmp_path)
    yield servers
    servers.kill()


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


async def test_each_stream_is_held_by_three(cluster: Servers) -> None:
    """Another run that asks for less takes none away; with one server killed they answer on."""
    async with connect(cluster.logins.of("provision"), "test") as bus:
        await provisioned(bus, 3)
        await provision(bus, "other", ["python"])
        assert {stream: await replicas(bus, stream) for stream in streams()} == dict.fromkeys(
            streams(), 3
        )
        cluster.kill(1)
        await provisioned(bus, 3)
        assert await replicas(bus, "LOG") == 3


async def test_all_three_start_again(cluster: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks before they have chosen who leads waits for it: "not confirmed" would be an operator's first sight."""
    monkeypatch.setattr("bus.connection._ELECTION_S", 120.0)  # the processors may be busy
    async with connect(cluster.logins.of("provision"), "test") as bus:
        await provisioned(bus, 3)
    async with connect(cluster.logins.of("learner"), "test") as bus:
        await store.put(bus, "policy", "key", b"value")
        cluster.kill()
    cluster.start()
    while True:
        try:
            async with (
                connect(cluster.logins.of("dispatcher"), "test") as bus,
                open_log(bus, "test") as log,
            ):
                asked = (
                    dead_letters(bus, "test"),
                    store.get(bus, "policy", "key"),
                    log.last_seq(),
                    shortage(bus),
                    backlog(bus, "test", ["python"]),
                )
                letters, value, last_seq, short, queues = await asyncio.gather(*asked)
            break
        except Unreachable:
            await asyncio.sleep(0.05)
    assert value is not None
    assert (letters, value.data, last_seq, short) == ([], b"value", 0, "")
    assert set(queues) == {"gen", "score", "tool.python"}


async def test_one_server_is_no_cluster(bus: Bus) -> None:
    """It is refused in a line that names the key and says what to do."""
    with pytest.raises(BusError, match=r"nats\.replicas = 3: the server is no cluster"):
        await provision(bus, "test", ["python"], replicas=3)
