"""A whole run on a server whose store is full: it says so, loses nothing, and goes on when there is room again."""

import asyncio
import json
from pathlib import Path

import pytest

from bus.connection import Endpoint, connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

RECIPE = Path(__file__).parent / "stalling" / "recipe.toml"


async def for_one_and_a_half(url: str) -> int:
    """Bytes for all that the server's one run has stored, and for another that gets half way through its log."""
    async with connect(Endpoint(url=url), "test") as bus:
        all_bytes = json.loads((await bus.request("$JS.API.INFO", b"")).data)["storage"]
        log = json.loads((await bus.request("$JS.API.STREAM.INFO.LOG", b"")).data)
    return int(2 * all_bytes - log["state"]["bytes"] // 2)


def test_a_run_waits_for_room_and_goes_on(plain_servers, tmp_path: Path, machine_at) -> None:
    """Nothing more goes in, not even what clears old weights; an operator archives a closed run, and it ends."""
    store = f'store_dir: "{tmp_path / "store"}"'
    server = plain_servers("roomy", f"jetstream {{ {store} }}")
    runs = tmp_path / "runs"
    machine_at(runs, NATS_URL=server.url).say("train", str(RECIPE), "--run", "closed", *STEPS)
    limit_bytes = asyncio.run(for_one_and_a_half(server.url))
    server.kill()
    server = plain_servers("full", f"jetstream {{ {store}, max_file_store: {limit_bytes} }}")
    machine = machine_at(runs, NATS_URL=server.url)
    training = machine.start("train", str(RECIPE), "--run", "waiting", *STEPS)
    machine.until(lambda: machine.rows("waiting") or training.poll() is not None, "a step")
    machine.until(
        lambda: FULL in machine.say("ps", "--run", "waiting") or training.poll() is not None,
        "a full store",
    )
    assert training.poll() is None, training.communicate()
    machine.say("archive", "closed", "--drop")
    output, _ = training.communicate(timeout=300)
    assert training.returncode == 0, output
    found = json.loads(machine.say("verify", "--run", "waiting", "--json"))
    assert (found["broken"], found["ended"], found["fates"]["failed"]) == ({}, True, 0)


STEPS = ("--set", "learner.steps=14", "--set", "deadlines.hang_s=60")
FULL = "admission stops: the server's store is full; it holds"
