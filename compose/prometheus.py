"""Prometheus and promtool without installing them: the Debian package, unpacked into a cache folder.

    python -m compose.prometheus      says where the programs are

Programs that are installed already are taken as they are.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = ("prometheus", "promtool")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentic-actors"
_DOWNLOAD_S = 120.0


class CannotInstall(Exception):
    """There can be no Prometheus here; says why."""


def programs() -> dict[str, str]:
    """Where the programs are, by name; unpacks them the first time. Raises CannotInstall."""
    folder = _CACHE / "prometheus"
    path = f"{os.environ['PATH']}:{folder}/usr/bin"
    if any(shutil.which(name, path=path) is None for name in PROGRAMS):
        _unpack(folder)
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if missing := [name for name, place in found.items() if place is None]:
        raise CannotInstall(f"the package prometheus has no {' and no '.join(missing)}")
    return {name: str(place) for name, place in found.items()}


def _unpack(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        download = ["apt-get", "download", "prometheus"]
        try:
            _run(download, name)
        except CannotInstall:
            if os.geteuid() != 0:
                raise
            _run(["apt-get", "update"], name)  # a fresh machine knows of no packages
            _run(download, name)
        packages = [str(path) for path in Path(name).glob("prometheus_*.deb")]
        _run(["dpkg", "-x", *packages, f"{name}/unpacked"], name)
        shutil.rmtree(folder, ignore_errors=True)
        Path(name, "unpacked").rename(folder)


def _run(command: list[str], folder: str) -> None:
    try:
        subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=_DOWNLOAD_S
        )
    except FileNotFoundError as error:
        raise CannotInstall(f"{command[0]} is not there: this is no Debian") from error
    except subprocess.TimeoutExpired as error:
        raise CannotInstall(f"{command[0]} took more than {_DOWNLOAD_S:g} s") from error
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()[-1:] or [f"status {error.returncode}"]
        raise CannotInstall(f"{' '.join(command[:2])}: {why[0]}") from error


def main() -> int:
    """Print where the programs are."""
    try:
        for name, place in programs().items():
            print(f"{name}\t{place}")
    except CannotInstall as error:
        print(f"no prometheus here: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
