"""Starts again what `docker kill` has ended: docker takes that for a stop by hand, which no restart policy undoes.

    python -m compose.keeper PROJECT     until the project has no containers any more

It runs beside the stack, since nothing in the stack may speak to docker. What was stopped or ended by itself stays so.
"""

import fcntl
import sys
import tempfile
from pathlib import Path
from threading import Timer

import docker

_SETTLE_S = 1.0
"""After an end: in this time docker tells of a stop, or starts the container again itself."""


def keep(client: docker.DockerClient, project: str) -> None:
    """Watch the project's containers until there are none."""
    of_project = {"label": f"com.docker.compose.project={project}"}
    looks: dict[str, Timer] = {}
    for event in client.events(decode=True, filters={**of_project, "type": "container"}):
        name, action = event["id"], event["Action"]
        if action == "die":
            looks[name] = Timer(_SETTLE_S, _revive, [client, name])
            looks[name].start()
        elif action in ("start", "stop", "destroy") and name in looks:
            looks.pop(name).cancel()
        if action == "destroy" and not client.api.containers(all=True, filters=of_project):
            break
    for timer in looks.values():
        timer.cancel()


def _revive(client: docker.DockerClient, name: str) -> None:
    try:
        container = client.containers.get(name)
        of_service = container.labels.get("com.docker.compose.oneoff") == "False"
        failed = container.status == "exited" and container.attrs["State"]["ExitCode"] != 0
        if of_service and failed:
            print(f"{container.name} was killed; starting it again", flush=True)
            container.start()
    except docker.errors.APIError as error:  # it was removed meanwhile
        print(f"{name} is left alone: {error}", flush=True)


def main() -> int:
    """Keep the project given; one keeper is enough."""
    client = docker.from_env()
    daemon = client.info()["ID"].replace(":", "")
    path = Path(tempfile.gettempdir(), f"{sys.argv[1]}-keeper-{daemon}")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        try:
            keep(client, sys.argv[1])
        finally:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
