"""Runs in the toolbox's container: attacks its sandbox, and tries what whoever has taken the process itself over would.

    python -m tests.compose.inside HOST:PORT…     addresses of the host where something listens

Prints one JSON object: `calls`, what each attack in the sandbox printed; `escapes`, what it got outside of it;
`p50_ms`, of a call.
"""

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from tests.test_tools.attacks import EXHAUSTIONS, INTRUSIONS, intrusion
from tools.sandbox.sandbox import Limits, Sandbox
from tools.sandbox.select import open_sandbox

CALLS = 100
SECRET = "0123456789abcdef"
STRANGERS = ("dispatcher", "generator", "learner", "recorder", "run", "scorer", "prometheus")
KNOWN = {"toolbox.json", "tls"}
"""Its login, and the authority of the servers' certificates."""
PORTS = (4222, 8222, 9090, 9100)
KEYCTL = {"x86_64": 250, "aarch64": 219}[os.uname().machine]


async def attack(sandbox: Sandbox) -> dict[str, str]:
    """What each attack ends with and prints."""
    with (
        tempfile.TemporaryDirectory() as name,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0{SECRET}")
        abstract.listen()
        os.environ["TARGET_SECRET"] = SECRET
        private, public = Path(name, "private"), Path(name, "public")
        for path in (private, public):
            path.write_text(SECRET)
        targets = (private, public, tcp.getsockname()[1], SECRET, SECRET)
        calls = {}
        for attempt in INTRUSIONS:
            outcome = await sandbox.run(intrusion(attempt, targets), limits=Limits(wall_s=60.0))
            calls[attempt] = f"{outcome.reason} {outcome.output.decode()}"
    for attempt, (code, reasons) in EXHAUSTIONS.items():
        wall_s = 1.0 if "wall" in reasons else 60.0
        outcome = await sandbox.run(code, limits=Limits(wall_s=wall_s, cpu_s=60))
        calls[attempt] = f"{outcome.reason}"
        after = await sandbox.run("print('next')")
        assert after.output == b"next\n", (attempt, after)
    return calls


def strangers(host: list[str]) -> Iterator[tuple[str, int]]:
    """Whom a toolbox need not know: all that it can find of the stack but NATS itself, and the host."""
    with ThreadPoolExecutor(len(STRANGERS)) as threads:  # a name that nobody has takes seconds
        for address in filter(None, threads.map(address_of, STRANGERS)):
            yield from ((address, port) for port in PORTS)
    yield from (("nats", port) for port in PORTS if port != 4222)
    for each in host:
        name, _, port = each.rpartition(":")
        yield name, int(port)


def address_of(name: str) -> str:
    """Empty where there is no such name."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(name)
    return ""


def reaches(name: str, port: int) -> bool:
    """Whether something answers there."""
    with contextlib.suppress(OSError), socket.create_connection((name, port), timeout=1.0):
        return True
    return False


def escapes(host: list[str]) -> list[str]:
    """What the container should not let its own process do, and lets it do."""
    found = [f"reaches {name}:{port}" for name, port in strangers(host) if reaches(name, port)]
    for path in (
        "/new",
        "/app/new",
        "/venv/new",
        "/runs/new",
        "/srv/actors/recipes/new",
        "/etc/passwd",
    ):
        try:
            with open(path, "a"):
                found.append(f"writes {path}")
        except OSError:
            pass
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    for field, wanted in {"CapEff": 0, "CapBnd": 0, "NoNewPrivs": 1, "Seccomp": 2}.items():
        if int(status[field], 16) != wanted:
            found.append(f"{field} is {status[field]}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(KEYCTL, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != errno.EPERM:
        found.append("the seccomp profile is not in force")
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0:
        found.append("mounts")
    found += [
        f"sees {path}"
        for path in ("/var/run/docker.sock", "/run/docker.sock")
        if os.path.exists(path)
    ]
    found += [f"is user {os.getuid()}"] if os.getuid() != 65534 else []
    found += [f"has the login {name}" for name in os.listdir("/nats") if name not in KNOWN]
    return found


async def main() -> None:
    """Try everything and print it."""
    assert reaches("nats", 4222)
    found = escapes(sys.argv[1:])
    sandbox = await open_sandbox("ns")
    times_s = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        await sandbox.run("print(sum(range(1000)))")
        times_s.append(time.perf_counter() - begun)
    calls = await attack(sandbox)
    await sandbox.close()
    print(json.dumps({"calls": calls, "escapes": found, "p50_ms": median(times_s) * 1e3}))


if __name__ == "__main__":
    asyncio.run(main())
