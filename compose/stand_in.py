"""Docker without a registry: a daemon of our own, and base images made of what this machine has.

    python -m compose.stand_in COMMAND…     runs the command with DOCKER_HOST set; the daemon ends with it

The images carry the real names, so whatever asks for those runs unmodified. What is shown with them is our side: files,
wiring and code; not what the genuine images contain. Needs root and `dockerd` (Debian: `docker.io`).
"""

import ctypes
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker

PYTHON_IMAGE = "python:3.11-slim"
_START_S = 60.0
_LOOK_S = 0.02
_STOP_S = 30.0
_PR_SET_PDEATHSIG = 1
_NO_NETWORKS = ("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false")
_PROGRAMS = [
    "bash", "sh", "cat", "chmod", "cp", "cut", "date", "dirname", "basename", "df", "du", "env",
    "expr", "false", "find", "grep", "head", "hostname", "id", "kill", "ln", "ls", "mkdir",
    "mktemp", "mv", "nproc", "od", "pgrep", "pkill", "printf", "ps", "pwd", "readlink", "rm",
    "rmdir", "sed", "seq", "setsid", "sleep", "sort", "stat", "tail", "tee", "test", "touch", "tr",
    "true", "uname", "uniq", "wc", "which", "xargs", "yes",
]  # fmt: skip
_PIP = (
    "#!/usr/local/bin/python3\nfrom pip._internal.cli.main import main\nraise SystemExit(main())\n"
)
_NOT_IN_PYTHON = re.compile(r"(^|/)(test|tests|__pycache__|idlelib|ensurepip|config-3.*)(/|$)|\.a$")
_LIBRARY = re.compile(r"^\s*(?:(\S+) => )?(/\S+) \(0x", re.MULTILINE)


class CannotRun(Exception):
    """There can be no daemon of our own here; says why."""


@contextmanager
def private_daemon(*, networks: bool = False) -> Iterator[str]:
    """A dockerd with its own data and socket for as long as the block runs; its address, for DOCKER_HOST.

    With `networks` it sets up bridges and the firewall, which is put back afterwards; without, containers can have no
    network but `none`. Raises CannotRun.
    """
    if os.geteuid() != 0:
        raise CannotRun("dockerd needs root")
    if (program := shutil.which("dockerd")) is None:
        raise CannotRun("dockerd is not installed (Debian: apt-get install docker.io)")
    with tempfile.TemporaryDirectory(prefix="dockerd-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        address = f"unix://{folder}/socket"
        command = [program, "--data-root", f"{name}/data", "--exec-root", f"{name}/exec"]
        command += ["--host", address, "--pidfile", f"{name}/pid"]
        command += [] if networks else _NO_NETWORKS
        rules = _firewall() if networks else b""
        with (folder / "log").open("wb") as log:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            _wait_until_it_serves(daemon, folder)
            yield address
        finally:
            daemon.terminate()  # it ends its containers first
            try:
                daemon.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            if rules:
                subprocess.run(["iptables-restore"], input=rules, check=True)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _firewall() -> bytes:
    return subprocess.run(["iptables-save"], capture_output=True, check=True).stdout


def _wait_until_it_serves(daemon: subprocess.Popen[bytes], folder: Path) -> None:
    end_s = time.monotonic() + _START_S
    while not (folder / "socket").exists():
        if daemon.poll() is not None or time.monotonic() > end_s:
            raise CannotRun(f"dockerd does not start: {_last_words(folder)}")
        time.sleep(_LOOK_S)
    try:
        client = docker.DockerClient(base_url=f"unix://{folder}/socket", timeout=int(_START_S))
        client.ping()
        client.close()
    except (docker.errors.DockerException, OSError) as error:
        raise CannotRun(f"dockerd does not answer: {error}: {_last_words(folder)}") from error


def _last_words(folder: Path) -> str:
    lines = (folder / "log").read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])


def import_python(address: str, image: str = PYTHON_IMAGE) -> None:
    """Make the image of this interpreter, the programs of a small Debian and their libraries."""
    repository, _, tag = image.partition(":")
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            _fill(archive)
        file.flush()
        client = docker.APIClient(base_url=address, timeout=int(_START_S))
        changes = ["ENV PATH=/usr/local/bin:/usr/bin:/bin", "ENV LANG=C.UTF-8", 'CMD ["python3"]']
        client.import_image(file.name, repository=repository, tag=tag, changes=changes)
        client.close()


def _fill(archive: tarfile.TarFile) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        _link(archive, name, f"usr/{name}")
    for name in ("dev", "proc", "sys", "root", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        _folder(archive, name, 0o755)
    _folder(archive, "tmp", 0o1777)
    nobody = "nobody:x:65534:65534:nobody:/nonexistent:/bin/sh"
    _text(archive, "etc/passwd", f"root:x:0:0:root:/root:/bin/bash\n{nobody}\n")
    _text(archive, "etc/group", "root:x:0:\nnogroup:x:65534:\n")
    _text(archive, "etc/shadow", "root:*:19000:0:99999:7:::\n", mode=0o600)
    programs = [path for name in _PROGRAMS if (path := shutil.which(name))]
    for path in programs:
        archive.add(os.path.realpath(path), f"usr/bin/{Path(path).name}")
    _add_libraries(archive, [*programs, *_add_python(archive)])


def _add_python(archive: tarfile.TarFile) -> list[str]:
    """This interpreter as /usr/local, with pip and no other package; its binaries."""
    version = f"python3.{sys.version_info.minor}"
    packages = Path(sysconfig.get_path("purelib", vars={"base": sys.base_prefix}))
    stdlib = Path(sysconfig.get_path("stdlib"))

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        inside = entry.name.removeprefix(f"usr/local/lib/{version}/")
        return None if _NOT_IN_PYTHON.search(inside) or inside == "site-packages" else entry

    archive.add(stdlib, f"usr/local/lib/{version}", filter=wanted)
    for package in packages.glob("pip*"):
        archive.add(package, f"usr/local/lib/{version}/site-packages/{package.name}")
    program = os.path.realpath(sys.executable)
    archive.add(program, f"usr/local/bin/{version}")
    for name in ("python3", "python"):
        _link(archive, f"usr/local/bin/{name}", version)
    _text(archive, "usr/local/bin/pip", _PIP, mode=0o755)
    return [program, *map(str, stdlib.glob("lib-dynload/*.so"))]


def _add_libraries(archive: tarfile.TarFile, programs: list[str]) -> None:
    """All in /usr/lib, where the loader looks without being told; the loader itself stays in its place."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    found = {
        f"usr/lib/{name}" if name else f"usr{path}": path for name, path in _LIBRARY.findall(listed)
    }
    for name, path in found.items():
        archive.add(os.path.realpath(path), name)


def _folder(archive: tarfile.TarFile, name: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    archive.addfile(entry)


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)


def _text(archive: tarfile.TarFile, name: str, text: str, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(text), mode
    archive.addfile(entry, io.BytesIO(text.encode()))


def main() -> int:
    """Run a command with a docker of its own."""
    try:
        with private_daemon(networks=True) as address:
            import_python(address)
            environment = os.environ | {"DOCKER_HOST": address}
            return subprocess.run(sys.argv[1:], env=environment, check=False).returncode
    except CannotRun as error:
        print(f"no docker here: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
