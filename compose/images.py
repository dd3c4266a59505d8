"""The images of the stack: the genuine ones where they can be pulled, and stand-ins where they cannot.

    python -m compose.images [--stand-ins]     `--stand-ins`: without trying to pull

Images that are there are taken as they are.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import docker

from compose.stand_in import (
    NATS_IMAGE,
    PROMETHEUS_IMAGE,
    PYTHON_IMAGE,
    CannotRun,
    import_nats,
    import_prometheus,
    import_python,
)

FILE = Path(__file__).with_name("dev.yml")
BASES: dict[str, tuple[str, Callable[[str, str], None]]] = {
    "PYTHON_IMAGE": (PYTHON_IMAGE, partial(import_python, packages=True)),
    "NATS_IMAGE": (NATS_IMAGE, import_nats),
    "PROMETHEUS_IMAGE": (PROMETHEUS_IMAGE, import_prometheus),
}
"""Variable of dev.yml → its default, and what makes a stand-in."""
_LOUD = """\
*** STAND-IN: {image} cannot be pulled here. It is made of this machine's own programs instead, under the same name.
*** It shows that the stack fits together, and nothing about the genuine image. To be rid of it: docker rmi {image}"""


def make(*, pull: bool = True) -> None:
    """Get or make what is missing, and build our own image. Raises CannotRun."""
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise CannotRun(f"docker does not answer: {error}") from error
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    for variable, (default, make_stand_in) in BASES.items():
        image = os.environ.get(variable) or default
        if client.images.list(image) or (pull and _pulled(image)):
            continue
        print(_LOUD.format(image=image), file=sys.stderr, flush=True)
        make_stand_in(address, image)
    subprocess.run(["docker", "compose", "--file", str(FILE), "build", "run"], check=True)


def _pulled(image: str) -> bool:
    return subprocess.run(["docker", "pull", image], check=False).returncode == 0


def main() -> int:
    """Make the images; returns the exit status."""
    try:
        make(pull="--stand-ins" not in sys.argv)
    except CannotRun as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
