"""Attacks on the `ns` sandbox: each one got out of some sandbox, or would have out of an earlier one of ours."""

import asyncio
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tools.errors import NoSandbox
from tools.sandbox import root, seccomp
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Sandbox
from tools.sandbox.select import find_breaches, open_sandbox
from tools.sandbox.unsafe import UnsafeSandbox

FindProcesses = Callable[[str], list[int]]
VISIBLE_IN_TMP = sorted(
    {Path(path).parts[2] for path in root.visible_paths() if path.startswith("/tmp/")}
)
"""What leads to an interpreter that is installed below /tmp; nothing elsewhere."""

PRELUDE = r'''
import ctypes, errno, glob, mmap, os, resource, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def read(path):
    with open(path, "rb") as file:
        return file.read(4096) or b"empty"

def connect(family, address):
    with socket.socket(family) as client:
        client.connect(address)
    return "connected"

def call(function, *arguments):
    """The result of a libc call; raises OSError like Python's own."""
    result = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def syscall(*arguments):
    return call(libc.syscall, *map(ctypes.c_long, arguments))

def nothing(*_):
    raise OSError("nothing there")

PTRACE = {"x86_64": 101, "aarch64": 117}[os.uname().machine]

def attack(step):
    """Prints BREACH where it got something."""
    try:
        got = step()
    except (OSError, ValueError, MemoryError) as error:
        print("stopped:", error)
        return
    print("BREACH:", got)
'''

# each runs against a new call; nothing may print BREACH
INTRUSIONS = {
    "host_files": """
for path in ("/etc/shadow", "/etc/hostname", "/root/.bashrc", PRIVATE, PUBLIC, PROJECT + "/pyproject.toml", TOOLS):
    attack(lambda: read(path))
attack(lambda: set(os.listdir(PROJECT)) - {".venv"} or nothing())
""",
    "loopback": "attack(lambda: connect(socket.AF_INET, ('127.0.0.1', PORT)))",
    "loopback_v6": "attack(lambda: connect(socket.AF_INET6, ('::1', PORT)))",
    "raw_sockets": """
for family in (socket.AF_PACKET, socket.AF_NETLINK, 38, 40):  # 38 AF_ALG, 40 AF_VSOCK
    attack(lambda: socket.socket(family, socket.SOCK_RAW))
""",
    "abstract_socket": "attack(lambda: connect(socket.AF_UNIX, chr(0) + ABSTRACT))",
    "environment": """
attack(lambda: any(SECRET in value for value in os.environ.values()) or nothing())
for path in glob.glob("/proc/[0-9]*/environ"):
    attack(lambda: SECRET in read(path).decode() or nothing())
""",
    "signals": """
for pid in (EXECUTOR, *range(3, 300)):
    if pid != os.getpid():
        attack(lambda: os.kill(pid, 0) or pid)
""",
    "ptrace_executor": "attack(lambda: syscall(PTRACE, 16, EXECUTOR, 0, 0))",
    "ptrace_init": "attack(lambda: syscall(PTRACE, 16, 1, 0, 0))",
    "init_memory": """
attack(lambda: open("/proc/1/mem", "r+b"))
attack(lambda: os.listdir("/proc/1/fd"))
attack(lambda: read("/proc/1/environ"))
attack(lambda: os.readlink("/proc/1/exe"))
attack(lambda: [os.kill(1, n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)] and nothing())
""",
    "descriptors": """
attack(lambda: [fd for fd in map(int, os.listdir('/proc/self/fd')) if fd > 2 and os.fstat(fd)] or nothing())
""",
    "writes": """
for directory in ("/", "/usr/lib", "/etc", "/dev", "/proc/sys/kernel", sys.prefix + "/lib", sys.base_prefix + "/lib"):
    attack(lambda: open(directory + "/written", "w"))
for path in ("/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", sys.executable, os.__file__):
    attack(lambda: os.open(path, os.O_WRONLY))
""",
    "remount": """
attack(lambda: call(libc.mount, None, b"/", None, 32 | 4096, None))
attack(lambda: call(libc.mount, b"tmpfs", b"/tmp", b"tmpfs", 0, None))
attack(lambda: call(libc.umount2, b"/proc", 2))
attack(lambda: call(libc.umount2, b"/tmp", 2))
attack(lambda: os.chroot("/tmp"))
""",
    "namespaces": """
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000):
    attack(lambda: call(libc.unshare, flag))
    attack(lambda: syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], flag | 17, 0, 0, 0, 0))
attack(lambda: syscall(435, 0, 0))
for name in ("ipc", "mnt", "net", "pid", "user", "uts"):
    attack(lambda: call(libc.setns, os.open("/proc/1/ns/" + name, 0), 0))
""",
    "privileges": """
attack(lambda: os.setuid(0))
attack(lambda: os.setgroups([0]))
attack(lambda: os.nice(-5))
attack(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)))
attack(lambda: os.chown("/tmp", 0, 0))
attack(lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0)))
""",
    "hidden_memory": """
attack(lambda: os.memfd_create("hidden"))
attack(lambda: syscall({'x86_64': 29, 'aarch64': 194}[os.uname().machine], 0, 1 << 26, 0o1600))
attack(lambda: call(libc.prctl, 4, 0, 0, 0, 0))  # a process that is not dumpable cannot be measured
attack(lambda: syscall(425, 8, 0))
""",
    "disk": """
def fill(directory):
    written = 0
    try:
        for number in range(99):
            with open(f"{directory}/{number}", "wb") as file:
                written += file.write(bytes(16 << 20))
    except OSError as error:
        if written > 64 << 20:
            return written
        raise
    return written
attack(lambda: fill("/tmp"))
attack(lambda: fill("/dev/shm"))
""",
    "inodes": """
def many():
    for number in range(100_000):
        os.mknod(f"/tmp/{number}")
    return number
attack(many)
""",
    "one_large_file": "attack(lambda: os.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 30))",
    "ten_gigabytes": "attack(lambda: len(bytearray(10 << 30)))",
    "many_files": "attack(lambda: len([os.open('/dev/null', 0) for _ in range(5000)]))",
}


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


def intrusion(name: str, targets: tuple) -> str:
    private, public, port, abstract, secret = targets
    given = {
        "PRIVATE": str(private),
        "PUBLIC": str(public),
        "PORT": port,
        "ABSTRACT": abstract,
        "SECRET": secret,
        "EXECUTOR": os.getpid(),
        "PROJECT": str(Path(seccomp.__file__).parents[2]),
        "TOOLS": seccomp.__file__,
    }
    constants = "".join(f"{key} = {value!r}\n" for key, value in given.items())
    return PRELUDE + constants + INTRUSIONS[name]


NOT_PROMISED = {
    "landlock": {},
    "docker": {
        "raw_sockets": "its network is empty",
        "signals": "the container's own processes",
        "init_memory": "the container's own process 1",
        "ptrace_init": "the container's own process 1",
        "hidden_memory": "the container's memory is counted, whatever holds it",
        "disk": "of its own; /dev/shm has a limit too",
    },
}
"""What a tier does not stop, since it harms nobody else there."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["landlock", "docker"])
async def tier_sandbox(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    """A sandbox of each other tier that this machine can run; one that it cannot is skipped by name."""
    try:
        opened = await open_sandbox(request.param)
    except NoSandbox as error:
        pytest.skip(f"TIER {request.param} NOT TESTED HERE: {str(error).splitlines()[0]}")
    yield opened
    await opened.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", INTRUSIONS)
@pytest.mark.slow
async def test_intrusion_is_stopped_by_other_tiers(
    tier_sandbox: Sandbox, targets: tuple, name: str
) -> None:
    """As above, but for what a tier does not promise."""
    if reason := NOT_PROMISED[tier_sandbox.tier].get(name):
        pytest.skip(f"{tier_sandbox.tier}: {reason}")
    code = intrusion(name, targets)
    if tier_sandbox.tier == "docker":
        code = code.replace('"/etc/hostname", ', "")  # the container has one
        code = code.replace(
            "resource.setrlimit(resource.RLIMIT_NPROC", "nothing(0"
        )  # a container counts them itself
    outcome = await tier_sandbox.run(code, limits=Limits(wall_s=60.0))
    text = outcome.output.decode()
    assert outcome.reason == "exit"
    assert "stopped:" in text
    assert "BREACH" not in text
    assert "Traceback" not in text


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("fork_bomb", {"wall", "processes"}),
        ("busy", {"wall"}),
        ("ignored_signals", {"wall"}),
        ("endless_output_of_children", {"output"}),
        ("memory_of_many", {"memory", "exit"}),  # the kernel kills single processes of a container
    ],
)
@pytest.mark.slow
async def test_exhaustion_of_other_tiers(
    tier_sandbox: Sandbox, name: str, reasons: set[str]
) -> None:
    """The call ends, and the next one is as good as new."""
    code, _ = EXHAUSTIONS[name]
    outcome = await tier_sandbox.run(code, limits=Limits(wall_s=8.0, cpu_s=60))
    assert outcome.reason in reasons
    assert (await tier_sandbox.run("print('next')")).output == b"next\n"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.slow
async def test_sessions_of_other_tiers(
    tier_sandbox: Sandbox, marker: str, processes_with: FindProcesses
) -> None:
    """They keep what sessions keep, are interrupted, and leave nothing behind."""
    cells = await tier_sandbox.open_session("python")
    await cells.run("x = 2")
    assert (
        await cells.run("import time\nx = 3\ntime.sleep(600)", limits=Limits(wall_s=1.0))
    ).session == "kept"
    assert (await cells.run("x")).output == b"3\n"
    await cells.close()
    bash = await tier_sandbox.open_session("bash")
    await bash.run("x=1; cd /usr; f() { echo f; }")
    assert (await bash.run("sleep 600", limits=Limits(wall_s=1.0))).exit_code == 130
    sleeper = f"setsid python3 -c 'import time; time.sleep(600)' {marker} &"
    assert b"1 /usr\nf\n" in (await bash.run(f"{sleeper} echo $x $PWD; f")).output
    await bash.close()
    assert processes_with(marker) == []


# -- resources: the call ends, the next one and the neighbours do not notice ------------------------

EXHAUSTIONS = {
    "fork_bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", {"wall"}),
    "sleep": ("import time\ntime.sleep(600)", {"wall"}),
    "busy": ("while True: pass", {"wall"}),
    "ignored_signals": (
        "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(99)",
        {"wall"},
    ),
    "endless_output": ("while True: print('x' * 1000)", {"output"}),
    "endless_output_of_children": (
        "import os\nfor _ in range(5): os.fork()\nwhile True: os.write(1, b'x' * 9999)",
        {"output"},
    ),
    "memory_of_many": (
        "import os, time\n"
        "for _ in range(19):\n"
        "    if os.fork() == 0: break\n"
        "block = bytearray(b'x') * (200 << 20)\n"
        "time.sleep(60)",
        {"memory"},
    ),
    "threads": (
        "import threading, time\n"
        "while True:\n"
        " try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        " except RuntimeError: pass",
        {"wall", "memory"},
    ),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", EXHAUSTIONS)
async def test_exhaustion_ends_with_its_limit(sandbox: NamespaceSandbox, name: str) -> None:
    """The limit that fits ends the call, and the call after it is as good as new."""
    code, reasons = EXHAUSTIONS[name]
    wall_s = 20.0 if "memory" in reasons and len(reasons) == 1 else 1.0
    outcome = await sandbox.run(code, limits=Limits(wall_s=wall_s, cpu_s=60))
    assert outcome.reason in reasons
    assert outcome.wall_ms < 15_000
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
    inits = [process for process in family if process.name() == "init"]
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


# -- the filter, for architectures that are not here --------------------------------------------------


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_denies_what_it_lists(machine: str, arch: int) -> None:
    """Run as the kernel would: denied calls, new namespaces, network sockets and foreign architectures."""
    program = seccomp.program(machine)
    clone, socket_call, prctl = {"x86_64": (56, 41, 157), "aarch64": (220, 198, 167)}[machine]

    def verdict(number: int, *arguments: int, arch: int = arch) -> int:
        return interpret(program, number, arch, arguments)

    for name, number in seccomp.denied(machine).items():
        assert verdict(number) == seccomp.EPERM, name
    assert verdict(63 if machine == "aarch64" else 0, 0) == seccomp.ALLOW  # read
    assert verdict(0, arch=0x40000003) == seccomp.KILL  # i386
    assert verdict(435) == seccomp.ENOSYS
    assert verdict(clone, 0x01200011) == seccomp.ALLOW  # fork
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(clone, flag | 17) == seccomp.EPERM
    assert verdict(socket_call, 1) == seccomp.ALLOW
    for family in (0, 2, 10, 16, 17, 38, 40):
        assert verdict(socket_call, family) == seccomp.EPERM
    assert verdict(prctl, 4, 0) == seccomp.EPERM
    assert verdict(prctl, 4, 1) == verdict(prctl, 15, 0) == seccomp.ALLOW


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_without_namespaces_more_is_denied(machine: str) -> None:
    """Sockets with names, other processes' limits, and what is said about files; the rest is as it was."""
    program = seccomp.program(machine, namespaces=False)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    prlimit = {"x86_64": 302, "aarch64": 261}[machine]
    denied = seccomp.denied(machine, namespaces=False)
    assert denied.items() >= seccomp.denied(machine).items()
    for number in denied.values():
        assert interpret(program, number, arch, ()) == seccomp.EPERM
    for number in seccomp.ignored(machine).values():
        assert interpret(program, number, arch, ()) == seccomp.NOTHING
    assert interpret(program, prlimit, arch, (0,)) == seccomp.ALLOW
    assert interpret(program, prlimit, arch, (4711,)) == seccomp.EPERM
    assert not set(denied.values()) & set(seccomp.ignored(machine).values())


def interpret(program: bytes, number: int, arch: int, arguments: tuple[int, ...]) -> int:
    """The few BPF instructions that the filter is made of."""
    data = struct.pack("IIQ6Q", number, arch, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    accumulator = at = 0
    while True:
        operation, if_true, if_false, operand = struct.unpack_from("HBBI", program, at * 8)
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("I", data, operand)
        elif operation == 0x06:
            return operand
        else:
            holds = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }[operation]
            at += if_true if holds else if_false


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


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become nobody; these tests just ran as a user"
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_it_as_an_ordinary_user() -> None:
    """The same tests pass when nobody, without any privilege, runs client and server."""
    script = Path(__file__).with_name("as_nobody.py")
    names = ("test_attacks.py", "test_sandbox.py", "test_sessions.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    ran = subprocess.run(
        [sys.executable, str(script), *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
