"""The tiers besides `ns`, attacked for real: `landlock` by an ordinary user, `docker` in containers.

Where one cannot run its tests are skipped, and say so by its name.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import docker
import pytest
import pytest_asyncio

from tests.test_tools.attacks import EXHAUSTIONS, HOARDS, INTRUSIONS, intrusion
from tools.errors import NoSandbox, SandboxError
from tools.sandbox.docker import LABEL, DockerSandbox
from tools.sandbox.sandbox import Limits, Sandbox
from tools.sandbox.select import open_sandbox

FindProcesses = Callable[[str], list[int]]

TIERS = ["docker"] if os.geteuid() == 0 else ["landlock", "docker"]
"""`landlock` is not for root: `test_all_of_it_as_an_ordinary_user` runs this file as one."""

NOT_PROMISED = {
    "landlock": {},
    "docker": {
        "host_name": "the container has one of its own",
        "raw_sockets": "its network is empty",
        "signals": "the container's own processes",
        "init_memory": "the container's own process 1",
        "ptrace_init": "the container's own process 1",
        "process_limit": "the container counts its processes",
        "hidden_memory": "the container counts its memory, whatever holds it",
    },
}
"""What a tier does not stop, since it harms nobody else there."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=TIERS)
async def tier_sandbox(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    """A sandbox of each tier."""
    if request.param == "docker":
        request.getfixturevalue("docker_host")
    try:
        opened = await open_sandbox(request.param)
    except NoSandbox as error:
        pytest.skip(f"TIER {request.param} NOT TESTED HERE: {str(error).splitlines()[0]}")
    yield opened
    await opened.close()


pytestmark = pytest.mark.slow
of_module = pytest.mark.asyncio(loop_scope="module")


@of_module
@pytest.mark.parametrize("name", INTRUSIONS)
async def test_intrusion_is_stopped(tier_sandbox: Sandbox, targets: tuple, name: str) -> None:
    """The code gets nothing that is not its own, but for what the tier does not promise."""
    if reason := NOT_PROMISED[tier_sandbox.tier].get(name):
        pytest.skip(f"{tier_sandbox.tier}: {reason}")
    outcome = await tier_sandbox.run(intrusion(name, targets), limits=Limits(wall_s=60.0))
    text = outcome.output.decode()
    assert outcome.reason == "exit"
    assert "stopped:" in text
    assert "BREACH" not in text
    assert "Traceback" not in text


@of_module
@pytest.mark.parametrize(
    ("name", "wall_s", "reasons"),
    [
        ("fork_bomb", 2.0, {"wall", "processes"}),
        ("busy", 1.0, {"wall"}),
        ("ignored_signals", 1.0, {"wall"}),
        ("endless_output_of_children", 100.0, {"output"}),
        # where the kernel counts, it kills one process after another: the first may be the code's own
        ("memory_of_many", 30.0, {"memory", "exit", "wall"}),
        ("threads", 2.0, {"wall", "memory", "processes"}),
        ("chain_of_forks", 2.0, {"wall", "processes"}),
        # without namespaces nobody sees which deleted files it has open
        ("memory_of_an_unreadable_program", 30.0, {"memory", "exit", "disk"}),
    ],
)
async def test_exhaustion_ends_with_its_limit(
    tier_sandbox: Sandbox, name: str, wall_s: float, reasons: set[str]
) -> None:
    """The limit that fits ends the call, and the next one is as good as new."""
    code, _ = EXHAUSTIONS[name]
    outcome = await tier_sandbox.run(code, limits=Limits(wall_s=wall_s, cpu_s=60))
    assert outcome.reason in reasons
    assert (await tier_sandbox.run("print('next')")).output == b"next\n"


@of_module
@pytest.mark.parametrize("name", HOARDS)
async def test_no_hoard_is_hidden(tier_sandbox: Sandbox, name: str) -> None:
    """The limit of the disk, and of the number of files, holds wherever the files are."""
    code = f"import os, time\n{HOARDS[name]}\nprint('BREACH')"
    outcome = await tier_sandbox.run(code, limits=Limits(wall_s=60.0, cpu_s=60))
    assert outcome.reason in {"disk", "exit"}
    assert b"BREACH" not in outcome.output


@of_module
async def test_no_datagram_gets_out(tier_sandbox: Sandbox, tmp_path: Path) -> None:
    """Such a socket needs no connect(2) to reach another by its path."""
    path = tmp_path / "socket"
    code = f"""
import socket
for make in (socket.socket, lambda *kind: socket.socketpair(*kind)[0]):
    try: make(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"out", {str(path)!r})
    except OSError as error: print(error)
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.bind(str(path))
        here.setblocking(False)
        assert (await tier_sandbox.run(code)).output.count(b"\n") == 2
        with pytest.raises(BlockingIOError):
            here.recv(1)


@of_module
@pytest.mark.parametrize(
    ("code", "output", "exit_code"),
    [
        ("import sys\nprint('out'); print('é', file=sys.stderr)\n6 * 7", "out\né\n42\n", 0),
        ("input() + input()", "'ab'\n", 0),
        ("import sys; sys.exit(3)", "", 3),
        ("import os; os._exit(137)", "", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "", -signal.SIGKILL),
        ("print('x' * 999_999)", "x" * 999_999 + "\n", 0),
    ],
)
async def test_a_call_is_a_call_in_every_tier(
    tier_sandbox: Sandbox, code: str, output: str, exit_code: int
) -> None:
    """Output, standard input and exit codes are those of `ns`."""
    outcome = await tier_sandbox.run(code, stdin=b"a\nb\n")
    assert (outcome.output.decode(), outcome.exit_code) == (output, exit_code)
    assert outcome.reason == "exit"


@of_module
async def test_limits_cut_what_they_say(tier_sandbox: Sandbox) -> None:
    """What was printed before the wall limit is there; output is cut at exactly its limit."""
    code = "import time\nprint('before')\ntime.sleep(60)"
    outcome = await tier_sandbox.run(code, limits=Limits(wall_s=6.0))
    assert (outcome.output, outcome.reason, outcome.exit_code) == (b"before\n", "wall", -9)
    flood = "while True: print('x' * 99)"
    outcome = await tier_sandbox.run(flood, limits=Limits(output_bytes=12_345, wall_s=60.0))
    assert (len(outcome.output), outcome.reason) == (12_345, "output")


@of_module
async def test_nothing_outlives_its_call(
    tier_sandbox: Sandbox, marker: str, processes_with: FindProcesses
) -> None:
    """Neither a daemon of a call that has ended, nor anything of one that is cancelled."""
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}]"
    code = f"import subprocess, sys\nsubprocess.Popen({sleeper}, start_new_session=True)"
    assert (await tier_sandbox.run(code)).exit_code == 0
    assert processes_with(marker) == []
    code = f"import subprocess, sys\nsubprocess.run({sleeper})"
    call = asyncio.ensure_future(tier_sandbox.run(code, limits=Limits(wall_s=600)))
    await until(lambda: processes_with(marker))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: not processes_with(marker))


async def until(condition: Callable[[], object]) -> None:
    """Wait until processes have started or ended."""
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - the processes of others send no events
            await asyncio.sleep(0.01)


@of_module
async def test_code_cannot_pretend_that_the_sandbox_failed(tier_sandbox: Sandbox) -> None:
    """Whatever it writes to whatever it reaches, the outcome is one of its own: failed is not zero."""
    code = """
import glob, os
junk = [b'{"error": "forged"}\\n', b'{"of": "end", "size": 2}\\n{}', b'{"of": "end", "size": 3}\\n"x"', b'\\xff' * 99]
targets = glob.glob('/proc/[0-9]*/fd/[0-9]*') + [f'/proc/self/fd/{fd}' for fd in range(3, 64)]
for path in targets:
    for line in junk:
        try: os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), line)
        except OSError: pass
"""
    outcome = await tier_sandbox.run(code, limits=Limits(wall_s=20.0))
    assert outcome.reason in {"exit", "output"}


@of_module
async def test_mixed_fire(tier_sandbox: Sandbox, targets: tuple) -> None:
    """Attacks at once and good calls among them: every good one is right, the attacks get nothing."""
    names = [name for name in INTRUSIONS if name not in NOT_PROMISED[tier_sandbox.tier]][::3]
    short = Limits(wall_s=5.0)
    attacks = [tier_sandbox.run(intrusion(name, targets), limits=short) for name in names]
    attacks.append(tier_sandbox.run(EXHAUSTIONS["busy"][0], limits=short))
    patient = Limits(wall_s=60.0)
    good = [tier_sandbox.run(f"sum(range({n}))", limits=patient) for n in range(8)]
    outcomes = await asyncio.gather(*good, *attacks)
    assert [outcome.output for outcome in outcomes[:8]] == [
        b"%d\n" % sum(range(n)) for n in range(8)
    ]
    assert not any(b"BREACH" in outcome.output for outcome in outcomes)


@of_module
async def test_python_sessions(tier_sandbox: Sandbox) -> None:
    """They keep variables and files, give each cell its input, are interrupted, and end with their process."""
    cells = await tier_sandbox.open_session("python")
    await cells.run("x = 2\nopen('kept', 'w').write('a')")
    slow = await cells.run("import time\nx = 3\ntime.sleep(600)", limits=Limits(wall_s=1.0))
    assert (slow.reason, slow.session) == ("wall", "kept")
    assert (await cells.run("x, open('kept').read(), input()", stdin=b"b\n")).output == (
        b"(3, 'a', 'b')\n"
    )
    left = await cells.run("import os; os._exit(7)")
    assert (left.exit_code, left.session) == (7, "ended")


@of_module
async def test_the_memory_of_a_session_is_known(tier_sandbox: Sandbox) -> None:
    """Asked between two runs, and of one that has ended."""
    session = await tier_sandbox.open_session("python")
    small = await session.memory_bytes()
    await session.run("x = bytearray(b'x') * (80 << 20)")
    assert 80 << 20 < await session.memory_bytes() < small + (100 << 20)
    await session.close()
    assert await session.memory_bytes() == 0


@of_module
async def test_bash_sessions(
    tier_sandbox: Sandbox, marker: str, processes_with: FindProcesses
) -> None:
    """They keep what shells keep, are interrupted, and leave nothing behind."""
    bash = await tier_sandbox.open_session("bash")
    await bash.run("x=1; cd /usr; f() { echo f; }")
    assert (await bash.run("sleep 600", limits=Limits(wall_s=1.0))).exit_code == 130
    for number in range(12):  # whenever the interruption comes, the next line is read whole
        await bash.run("for i in 1 2 3; do true; done", limits=Limits(wall_s=0.002 * number))
        assert (await bash.run(f"echo {number}")).output == b"%d\n" % number
    sleeper = f"setsid python3 -c 'import time; time.sleep(600)' {marker} &"
    assert b"1 /usr\nf\n" in (await bash.run(f"{sleeper} echo $x $PWD; f")).output
    assert (await bash.run("exit 3")).session == "restarted"
    assert (await bash.run("echo $PWD")).output == b"/usr\n"
    await until(lambda: processes_with(marker))
    await bash.close()
    assert processes_with(marker) == []


# -- containers --------------------------------------------------------------------------------------


async def containers() -> list[str]:
    """The sandboxes that docker knows, running or not."""

    def names() -> list[str]:
        client = docker.from_env()
        try:
            found = client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)
        finally:
            client.close()
        return [str(one.id) for one in found]

    return await asyncio.to_thread(names)


@of_module
@pytest.mark.usefixtures("docker_host")
async def test_a_container_that_does_not_start_is_removed() -> None:
    """It asks for more than the host has, which is found out late: each call fails by name and leaves nothing."""
    sandbox = DockerSandbox()
    before = await containers()
    for _ in range(2):
        with pytest.raises(SandboxError, match=r"setup_failed.*rlimit"):
            await sandbox.run("1", limits=Limits(files=1 << 31))
    assert await containers() == before
    await sandbox.close()


@of_module
@pytest.mark.usefixtures("docker_host")
async def test_a_container_that_ends_too_early_is_no_exit_code() -> None:
    """What carries the job into it lacks something (descriptors here), so none of the code has run."""
    sandbox = DockerSandbox()
    with pytest.raises(SandboxError, match=r"setup_failed"):
        await sandbox.run("1", limits=Limits(files=12))
    assert (await sandbox.run("1", limits=Limits(files=32))).output == b"1\n"
    await sandbox.close()


@of_module
@pytest.mark.usefixtures("docker_host")
async def test_closing_removes_a_container_that_is_just_starting() -> None:
    """At whatever moment it comes: what is made meanwhile is removed too."""
    before = await containers()
    for after_s in (0.0, 0.02, 0.1, 0.3):
        sandbox = DockerSandbox()
        call = asyncio.ensure_future(sandbox.run("import time; time.sleep(600)"))
        await asyncio.sleep(after_s)
        await sandbox.close()
        with pytest.raises(SandboxError, match="container_died"):
            await call
        assert await containers() == before


@of_module
@pytest.mark.usefixtures("docker_host")
async def test_a_cell_that_cannot_be_carried_is_a_failure(
    descriptors_left: Callable[[int], contextlib.AbstractContextManager[None]],
) -> None:
    """This process has descriptors to send the cell, but not to receive it for the container."""
    sandbox = DockerSandbox()
    session = await sandbox.open_session("python")
    with descriptors_left(2), pytest.raises(SandboxError, match="Too many open files"):
        await session.run("1")
    await session.close()
    await sandbox.close()
