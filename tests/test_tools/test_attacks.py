"""Attacks on the `ns` sandbox: each one got out of some sandbox, or would have out of an earlier one of ours."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.test_tools.attacks import EXHAUSTIONS, INTRUSIONS, intrusion
from tools.errors import NoSandbox
from tools.sandbox import root
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits
from tools.sandbox.select import find_breaches, open_sandbox
from tools.sandbox.unsafe import UnsafeSandbox

FindProcesses = Callable[[str], list[int]]
VISIBLE_IN_TMP = sorted(
    {Path(path).parts[2] for path in root.visible_paths() if path.startswith("/tmp/")}
)
"""What leads to an interpreter that is installed below /tmp; nothing elsewhere."""


async def test_a_sandbox_that_holds_has_no_breaches_and_another_has() -> None:
    """The self-test finds nothing in `ns` and the leaks of a plain subprocess, so it can tell them apart."""
    sandbox = await open_sandbox("auto")
    await sandbox.close()
    assert sandbox.tier == "ns"
    unsafe = UnsafeSandbox()
    breaches = await find_breaches(unsafe)
    await unsafe.close()
    for expected in (
        "reads ",
        "reaches a loopback port",
        "sees other processes",
    ):
        assert any(expected in breach for breach in breaches), expected


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", INTRUSIONS)
async def test_intrusion_is_stopped(sandbox: NamespaceSandbox, targets: tuple, name: str) -> None:
    """The code gets nothing that is not its own, and the attempt itself ran."""
    outcome = await sandbox.run(intrusion(name, targets))
    text = outcome.output.decode()
    assert outcome.reason == "exit"
    assert "stopped:" in text
    assert "BREACH" not in text
    assert "Traceback" not in text


# -- resources: the call ends, the next one and the neighbours do not notice ------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", EXHAUSTIONS)
async def test_exhaustion_ends_with_its_limit(sandbox: NamespaceSandbox, name: str) -> None:
    """The limit that fits ends the call, and the call after it is as good as new."""
    code, reasons = EXHAUSTIONS[name]
    wall_s = 100.0 if "wall" not in reasons else 1.0  # a busy machine may take long to fill memory
    outcome = await sandbox.run(code, limits=Limits(wall_s=wall_s, cpu_s=60))
    assert outcome.reason in reasons
    assert (await sandbox.run("print('next')")).output == b"next\n"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_daemon_dies_with_its_call(
    sandbox: NamespaceSandbox, marker: str, processes_with: FindProcesses
) -> None:
    """Double fork, new session, streams closed: it is gone when the outcome is there."""
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        null = os.open('/dev/null', os.O_RDWR)\n"
        "        for fd in range(3): os.dup2(null, fd)\n"
        "        os.open('/tmp/started', os.O_CREAT)\n"
        f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}])\n"
        "    os._exit(0)\n"
        "while not os.path.exists('/tmp/started'): time.sleep(0.01)\n"
    )
    outcome = await sandbox.run(code)
    assert (outcome.reason, outcome.exit_code) == ("exit", 0)
    assert processes_with(marker) == []


@pytest.mark.asyncio(loop_scope="module")
async def test_a_call_cannot_pretend_that_the_sandbox_failed(sandbox: NamespaceSandbox) -> None:
    """What looks like the server's own messages and exit codes is only the code's."""
    code = """
import os, signal
for fd in range(3, 64):
    try: os.write(fd, b'{"error": "forged"}')
    except OSError: pass
os.write(1, b'{"error": "forged"}')
os._exit(97)
"""
    outcome = await sandbox.run(code)
    assert (outcome.output, outcome.exit_code) == (b'{"error": "forged"}', 97)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_network_that_is_used_again_is_empty(sandbox: NamespaceSandbox) -> None:
    """A socket with an abstract name that is on its way to itself outlives its processes; no later call meets it."""
    leave = """
import array, socket
named = socket.socket(socket.AF_UNIX); named.bind(chr(0) + "left behind"); named.listen()
one, other = socket.socketpair()
fds = array.array("i", [named.fileno(), one.fileno(), other.fileno()])
one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
"""
    look = """
import socket
print([line for line in open("/proc/net/unix") if "left" in line])
try: socket.socket(socket.AF_UNIX).connect(chr(0) + "left behind")
except ConnectionRefusedError: print("refused")
"""
    for _ in range(10):
        assert (await sandbox.run(leave)).exit_code == 0
        assert (await sandbox.run(look)).output == b"[]\nrefused\n"


@pytest.mark.asyncio(loop_scope="module")
async def test_process_one_holds_nothing(sandbox: NamespaceSandbox) -> None:
    """It inherits no descriptor of any call, and is not to be looked into."""
    sessions = [await sandbox.open_session("bash") for _ in range(3)]
    family = psutil.Process().children(recursive=True)
    inits = [process for process in family if process.is_running() and process.name() == "init"]
    assert len(inits) >= 3
    if os.geteuid() == 0:  # nobody else may look
        for init in inits:
            assert {int(fd) for fd in os.listdir(f"/proc/{init.pid}/fd")} <= {0, 1, 2}
    for session in sessions:
        await session.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_calls_at_the_same_time_cannot_meet(sandbox: NamespaceSandbox) -> None:
    """Neither files nor abstract sockets nor shared memory nor processes of one are there for the other."""
    leave = """
import socket, sys, time
open("/tmp/left", "w"); open("/dev/shm/left", "w")
server = socket.socket(socket.AF_UNIX); server.bind(chr(0) + "left"); server.listen()
time.sleep(1.5)
"""
    look = """
import os, socket, time
time.sleep(0.5)
print(os.listdir("/tmp"), os.listdir("/dev/shm"), sorted(int(p) for p in os.listdir("/proc") if p.isdigit()))
try: socket.socket(socket.AF_UNIX).connect(chr(0) + "left")
except ConnectionRefusedError: print("refused")
"""
    _, seen = await asyncio.gather(sandbox.run(leave), sandbox.run(look))
    assert seen.output.decode() == f"{VISIBLE_IN_TMP} [] [1, 2]\nrefused\n"


@pytest.mark.asyncio(loop_scope="module")
async def test_mixed_fire(sandbox: NamespaceSandbox, targets: tuple) -> None:
    """All attacks at once, and 200 good calls among them: every good one is right, the attacks get nothing."""
    short = Limits(wall_s=3.0)
    intrusions = [sandbox.run(intrusion(name, targets), limits=short) for name in INTRUSIONS]
    exhaustions = [sandbox.run(code, limits=short) for code, _ in EXHAUSTIONS.values()]
    slots = asyncio.Semaphore(8)

    async def good(number: int) -> bytes:
        async with slots:
            limits = Limits(wall_s=60.0)
            return (await sandbox.run(f"sum(range({number}))", limits=limits)).output

    attacks = asyncio.gather(*intrusions, *exhaustions)
    answers = await asyncio.gather(*[good(number) for number in range(200)])
    assert answers == [b"%d\n" % sum(range(number)) for number in range(200)]
    for outcome in await attacks:
        assert b"BREACH" not in outcome.output


# -- where it runs -----------------------------------------------------------------------------------


def test_where_namespaces_are_refused_nothing_runs() -> None:
    """Fails closed, and says what to do."""
    program = (
        "import asyncio\n"
        "from tools.sandbox.select import open_sandbox\n"
        "asyncio.run(open_sandbox('ns'))"
    )
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    ran = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", shell, sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert NoSandbox.__name__ in ran.stderr
    assert "What to do:" in ran.stderr
