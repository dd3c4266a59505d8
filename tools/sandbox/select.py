"""Chooses a sandbox tier, and attacks it before anything hostile does; refuses rather than weakens."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from tools.errors import NoSandbox, SandboxError
from tools.sandbox import linux
from tools.sandbox.docker import DockerSandbox
from tools.sandbox.keeper import LEAST_LANDLOCK_ABI
from tools.sandbox.landlock import LandlockSandbox
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits, Sandbox
from tools.sandbox.unsafe import UnsafeSandbox

Tier = Literal["auto", "ns", "landlock", "docker", "unsafe"]
AUTOMATIC: tuple[Tier, ...] = ("ns", "landlock", "docker")
"""Strongest and fastest first."""

_SECRET_VARIABLE = "SANDBOX_SELF_TEST_SECRET"
_NAMESPACES = ("ipc", "mnt", "net", "pid", "user", "uts")

_NOT_OF_TIER = {
    "landlock": {
        *(f"shares the namespace {name}" for name in _NAMESPACES),
        "has a large /tmp",  # it may not write there
        "has a large /dev/shm",
    },
    # the container's own: an empty network, a host name, and the daemon's choice of user namespace
    "docker": {
        "opens an internet socket",
        "reads /etc/hostname",
        "shares the namespace user",
        "sees other processes",
    },
}
"""What a tier does not promise, since it holds by other means."""

_ADVICE = """\
What to do:
- in a container: run it as an ordinary user, with a seccomp profile that allows unshare, mount and pivot_root, and with
  `systempaths=unconfined`; adding capabilities does not help
- on Ubuntu 24.04 and later: `sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or an AppArmor profile that allows
  user namespaces
- where `sysctl user.max_user_namespaces` is 0: raise it
- tier `landlock`: Linux 6.12 or later, and an ordinary user
- tier `docker`: the docker SDK (`make setup` installs it), a docker daemon that this user may speak to, and its image:
  `docker pull python:3.11-slim`
- for code that you trust as you trust yourself: `tools.tier = "unsafe"`, which isolates nothing"""


async def open_sandbox(tier: Tier, imports: Sequence[str] = ()) -> Sandbox:
    """A sandbox of the tier with the modules already imported (by `ns` only), proven by a self-test.

    `auto` takes the first of AUTOMATIC that passes, never `unsafe`. Raises NoSandbox, which says what failed and what
    to do.
    """
    if tier == "unsafe":
        return UnsafeSandbox()
    refusals = []
    for candidate in AUTOMATIC if tier == "auto" else (tier,):
        try:
            return await _prove(candidate, imports)
        except SandboxError as error:
            refusals.append(error)
    told = "\n".join(f"{error.code}: {error.detail}" for error in refusals)
    raise NoSandbox(refusals[0].code, f"{told}\n{_ADVICE}") from refusals[0]


async def _prove(tier: Tier, imports: Sequence[str]) -> Sandbox:
    """Raises SandboxError when it does not run here or does not hold."""
    sandbox = await asyncio.to_thread(_make, tier, imports)
    try:
        breaches = await find_breaches(sandbox)
        if breaches:
            raise SandboxError("breached", f"{tier}: the self-test got out: {'; '.join(breaches)}")
    except BaseException:
        await sandbox.close()
        raise
    return sandbox


def _make(tier: Tier, imports: Sequence[str]) -> Sandbox:
    if tier == "docker":
        return DockerSandbox()
    if sys.platform != "linux":
        raise SandboxError("not_linux", f"{tier} needs Linux, this is {sys.platform}")
    if tier == "ns":
        return NamespaceSandbox(imports)
    abi = linux.landlock_abi()
    if abi < LEAST_LANDLOCK_ABI:
        raise SandboxError("no_landlock", f"Landlock ABI {abi} here, {LEAST_LANDLOCK_ABI} needed")
    if os.geteuid() == 0:
        raise SandboxError("no_landlock", "root's processes cannot be counted: run as another user")
    return LandlockSandbox()


async def find_breaches(sandbox: Sandbox) -> list[str]:
    """What code in the sandbox can do that it must not; empty when it holds."""
    with _targets() as targets:
        code = _ATTACK.replace("TARGETS", repr(json.dumps(targets)))
        outcome = await sandbox.run(code, limits=Limits(wall_s=20.0))
        if outcome.exit_code != 0:
            return [f"the self-test failed: {outcome.output.decode(errors='replace').strip()}"]
        found = msgspec.json.decode(outcome.output, type=list[str])
        given = _NOT_OF_TIER.get(sandbox.tier, set())
        breaches = [breach for breach in found if breach not in given]
        for pid in _find_processes(str(targets["marker"])):
            breaches.append("a daemon outlived its call")
            os.kill(pid, signal.SIGKILL)
    return breaches


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, object]]:
    """Things of this process that the attack goes for."""
    secret = secrets.token_hex(8)
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-self-test-") as directory,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        private = Path(directory, "private")
        private.touch(mode=0o600)
        public = Path(directory, "public")
        public.touch(mode=0o644)
        abstract.bind(f"\0{secret}")
        abstract.listen()
        os.environ[_SECRET_VARIABLE] = secret
        try:
            yield {
                "directory": directory,
                "files": [str(private), str(public), __file__, "/etc/shadow", "/etc/hostname"],
                "tcp_port": tcp.getsockname()[1],
                "abstract": secret,
                "secret": secret,
                "pid": os.getpid(),
                "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES},
                "marker": secret,
            }
        finally:
            del os.environ[_SECRET_VARIABLE]


def _find_processes(marker: str) -> Iterator[int]:
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if marker.encode() in (directory / "cmdline").read_bytes():
                yield int(directory.name)


# every step is harmless where it succeeds
_ATTACK = r'''
import ctypes, glob, json, os, signal, socket, subprocess, sys

targets = json.loads(TARGETS)
breaches = []

def attack(name, step):
    """A breach unless it raises or returns something false."""
    try:
        got = step()
    except Exception:
        return
    if got:
        breaches.append(name)

def read(path):
    with open(path, "rb") as file:
        return file.read() or True

def connect(family, address):
    with socket.socket(family) as client:
        client.settimeout(2)
        client.connect(address)
    return True

def secret_seen():
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            if targets["secret"].encode() in read(path):
                return True
        except (OSError, TypeError):
            continue
    return any(targets["secret"] in value for value in os.environ.values())

def strangers():
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1, os.getpid()}

def signal_parent():
    if targets["pid"] in (1, os.getpid()):
        return False  # here this number is a process of our own
    os.kill(targets["pid"], 0)
    return True

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field + ":"))

def creates_in(directory):
    path = directory + "/" + targets["secret"]
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(path)
    return True

def opens_for_writing(path):
    os.close(os.open(path, os.O_WRONLY))
    return True

def fits(directory, bytes_):
    usage = os.statvfs(directory)
    return usage.f_blocks * usage.f_frsize > bytes_

for path in targets["files"]:
    attack("reads " + path, lambda: read(path))
attack("reaches a loopback port", lambda: connect(socket.AF_INET, ("127.0.0.1", targets["tcp_port"])))
attack("opens an internet socket", lambda: socket.socket(socket.AF_INET))
attack("reaches an abstract socket", lambda: connect(socket.AF_UNIX, "\0" + targets["abstract"]))
attack("sees the environment of the executor", secret_seen)
attack("sees other processes", strangers)
attack("signals the executor", signal_parent)
for name, inode in targets["namespaces"].items():
    attack("shares the namespace " + name, lambda: os.readlink("/proc/self/ns/" + name) == inode)
attack("has capabilities", lambda: int(status("CapEff"), 16) | int(status("CapBnd"), 16))
attack("can gain privileges", lambda: status("NoNewPrivs") != "1")
attack("is not filtered", lambda: status("Seccomp") != "2")
attack("makes namespaces", lambda: ctypes.CDLL(None).unshare(0x10000000) == 0)
for directory in ("/", "/usr/lib", "/etc", "/dev", targets["directory"], sys.prefix + "/lib", sys.base_prefix + "/lib"):
    attack("writes to " + directory, lambda: creates_in(directory))
attack("sets kernel parameters", lambda: opens_for_writing("/proc/sys/kernel/core_pattern"))
attack("has a large /tmp", lambda: fits("/tmp", 1 << 30))
attack("has a large /dev/shm", lambda: fits("/dev/shm", 1 << 30))
attack("takes 10 GB", lambda: bytearray(10 << 30))
attack("inherits descriptors", lambda: len(os.listdir("/proc/self/fd")) > 4)

daemon = "import sys, time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", daemon, targets["marker"]], start_new_session=True,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(json.dumps(breaches))
'''
