"""Docker without a registry: a daemon of our own, and base images made of what this machine has.

    python -m compose.stand_in COMMAND…     runs the command with DOCKER_HOST set; the daemon ends with it

The images carry the real names, so whatever asks for those runs unmodified. What is shown with them is our side: files,
wiring and code; not what the genuine images contain. The daemon needs root and `dockerd` (Debian: `docker.io`), the
images of NATS and Prometheus a static busybox (Debian: `busybox-static`).
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
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path

import docker
from packaging.requirements import Requirement

from compose.prometheus import CannotInstall, programs

PYTHON_IMAGE = "python:3.11-slim"
NATS_IMAGE = "nats:2.12-alpine"
PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
EXTRAS = ("math", "tools")
"""Of pyproject.toml: those in our image."""
_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_START_S = 60.0
_LOOK_S = 0.02
_STOP_S = 30.0
_BRIDGE = "docker0"
_IMPORT_S = 300.0
_NOBODY = 65534
_PR_SET_PDEATHSIG = 1
_NO_NETWORKS = ("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false")
_PROGRAMS = [
    "bash", "sh", "cat", "chmod", "chown", "cp", "cut", "date", "dirname", "basename", "df", "du", "env",
    "expr", "false", "find", "grep", "head", "hostname", "id", "kill", "ln", "ls", "mkdir",
    "mktemp", "mv", "nproc", "od", "pgrep", "pkill", "printf", "ps", "pwd", "readlink", "rm",
    "rmdir", "sed", "seq", "setsid", "sleep", "sort", "stat", "tail", "tee", "test", "touch", "tr",
    "true", "uname", "uniq", "wc", "which", "xargs", "yes",
]  # fmt: skip
_PIP = (
    "#!/usr/local/bin/python3\nfrom pip._internal.cli.main import main\nraise SystemExit(main())\n"
)
_NOT_IN_PYTHON = re.compile(r"(^|/)(test|tests|idlelib|ensurepip|config-3.*)(/|$)|\.a$")
_NOT_IN_PACKAGES = re.compile(r"^\.\.|^torch/(include|test|share)/|(^|/)tests?/|\.a$")
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
        bridged = Path("/sys/class/net", _BRIDGE).exists()
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
            if networks and not bridged:  # its own networks it has taken away
                subprocess.run(["ip", "link", "delete", _BRIDGE], check=False)


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


def import_python(address: str, image: str = PYTHON_IMAGE, *, packages: bool = False) -> None:
    """Make the image of this interpreter, the programs of a small Debian and their libraries.

    With `packages`, also git and what our own image installs, at the versions that are installed here.
    """
    changes = ["ENV PATH=/usr/local/bin:/usr/bin:/bin", "ENV LANG=C.UTF-8", 'CMD ["python3"]']
    _import(address, image, changes, lambda archive: _fill(archive, packages))


def import_nats(address: str, image: str = NATS_IMAGE) -> None:
    """Make the image of this machine's nats-server. Raises CannotRun."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if (server := shutil.which("nats-server", path=path)) is None:
        raise CannotRun("nats-server is not installed: `make setup` installs it")

    def fill(archive: tarfile.TarFile) -> None:
        _fill_with_busybox(archive)
        archive.add(os.path.realpath(server), "usr/local/bin/nats-server")

    changes = ["ENV PATH=/usr/local/bin:/bin", 'ENTRYPOINT ["nats-server"]']
    _import(address, image, changes, fill)


def import_prometheus(address: str, image: str = PROMETHEUS_IMAGE) -> None:
    """Make the image of Debian's Prometheus. Raises CannotRun."""
    try:
        program = programs()["prometheus"]
    except CannotInstall as error:
        raise CannotRun(str(error)) from error

    def fill(archive: tarfile.TarFile) -> None:
        _fill_with_busybox(archive)
        archive.add(os.path.realpath(program), "bin/prometheus")
        _folder(archive, "prometheus", 0o755, owner=_NOBODY)
        for name in ("lib", "lib64"):
            _folder(archive, f"usr/{name}", 0o755)
            _link(archive, name, f"usr/{name}")
        _add_libraries(archive, [program])

    changes = ["ENV PATH=/bin", f"USER {_NOBODY}", "WORKDIR /prometheus"]
    _import(address, image, [*changes, 'ENTRYPOINT ["/bin/prometheus"]'], fill)


def _import(
    address: str, image: str, changes: list[str], fill: Callable[[tarfile.TarFile], None]
) -> None:
    repository, _, tag = image.partition(":")
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            fill(archive)
        file.flush()
        client = docker.APIClient(base_url=address, timeout=int(_IMPORT_S))
        client.import_image(file.name, repository=repository, tag=tag, changes=changes)
        client.close()


def _fill_with_busybox(archive: tarfile.TarFile) -> None:
    """What the small images have besides their program: a shell, and wget for the health check."""
    if (busybox := shutil.which("busybox")) is None:
        raise CannotRun("busybox is not installed (Debian: apt-get install busybox-static)")
    for name in ("bin", "etc", "dev", "proc", "sys"):
        _folder(archive, name, 0o755)
    _folder(archive, "tmp", 0o1777)
    _text(
        archive,
        "etc/passwd",
        f"root:x:0:0:root:/root:/bin/sh\nnobody:x:{_NOBODY}:{_NOBODY}::/:/bin/sh\n",
    )
    archive.add(os.path.realpath(busybox), "bin/busybox")
    for name in ("sh", "wget", "cat", "ls", "sleep"):
        _link(archive, f"bin/{name}", "busybox")


def _fill(archive: tarfile.TarFile, packages: bool) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        _link(archive, name, f"usr/{name}")
    for name in ("dev", "proc", "sys", "root", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        _folder(archive, name, 0o755)
    _folder(archive, "tmp", 0o1777)
    nobody = f"nobody:x:{_NOBODY}:{_NOBODY}:nobody:/nonexistent:/bin/sh"
    _text(archive, "etc/passwd", f"root:x:0:0:root:/root:/bin/bash\n{nobody}\n")
    _text(archive, "etc/group", f"root:x:0:\nnogroup:x:{_NOBODY}:\n")
    _text(archive, "etc/shadow", "root:*:19000:0:99999:7:::\n", mode=0o600)
    names = [*_PROGRAMS, "git"] if packages else _PROGRAMS
    programs = [path for name in names if (path := shutil.which(name))]
    for path in programs:
        archive.add(os.path.realpath(path), f"usr/bin/{Path(path).name}")
    binaries = [*programs, *_add_python(archive)]
    if packages:
        binaries += _add_packages(archive)
    _add_libraries(archive, binaries)


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


def _add_packages(archive: tarfile.TarFile) -> list[str]:
    """What our image installs, beside pip; the libraries that need some of the system's."""
    project = tomllib.loads(_PROJECT.read_text())["project"]
    extras = [each for name in EXTRAS for each in project["optional-dependencies"][name]]
    folder = f"usr/local/lib/python3.{sys.version_info.minor}/site-packages"
    added: set[str] = set()
    for package in _closure([*project["dependencies"], *extras, "hatchling"]):
        for file in package.files or ():
            path = Path(str(package.locate_file(file)))
            if not _NOT_IN_PACKAGES.search(str(file)) and str(file) not in added and path.exists():
                archive.add(path, f"{folder}/{file}", recursive=False)
                added.add(str(file))
    torch = Path(str(distribution("torch").locate_file("torch/lib")))
    return [str(path) for path in torch.glob("*.so")]


def _closure(wanted: Iterable[str]) -> Iterator[Distribution]:
    """The distributions that the requirements ask for, and those that these ask for."""
    todo = [Requirement(text) for text in wanted]
    done: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        package = distribution(requirement.name)
        for extra in ("", *requirement.extras):
            if (package.name, extra) in done:
                continue
            done.add((package.name, extra))
            if not extra:
                yield package
            for text in package.requires or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)


def _add_libraries(archive: tarfile.TarFile, programs: list[str]) -> None:
    """All in /usr/lib, where the loader looks without being told; the loader itself stays in its place."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    found = {
        f"usr/lib/{name}" if name else f"usr{path}": path
        for name, path in _LIBRARY.findall(listed)
        if "site-packages" not in path
    }
    for name, path in found.items():
        archive.add(os.path.realpath(path), name)


def _folder(archive: tarfile.TarFile, name: str, mode: int, owner: int = 0) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    entry.uid = entry.gid = owner
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
