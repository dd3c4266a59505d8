"""`make up`: logins and images, the stack until it is healthy, and a keeper beside it.

python -m compose.up [--stand-ins]     RECIPE, RUN and the rest of dev.yml's variables come from the environment
"""

import os
import subprocess
import sys
from pathlib import Path

from compose import images
from compose.stand_in import CannotRun

FILE = Path(__file__).with_name("dev.yml")
GENERATED = Path(__file__).with_name("generated")
PROJECT = "agentic-actors"
COMPOSE = ("docker", "compose", "--file", str(FILE))
SERVERS = ("nats", "nats-2", "nats-3")
"""Their names in the stack; the first is there in any case."""
_TLS = "/etc/nats/tls"
_WAIT_S = 600
_PATIENCE = 2
"""How often the stack may fail to come up before that is an error."""


def make_logins() -> None:
    """The servers' configuration, of this day's table, their certificate, and a login for each role; keys stay."""
    GENERATED.mkdir(mode=0o700, exist_ok=True)
    GENERATED.chmod(0o700)  # nobody else on this machine gets in
    tls = GENERATED / "tls"
    names = [part for host in (*SERVERS, "localhost", "127.0.0.1") for part in ("--host", host)]
    _actors("nats-certs", str(tls), *names)
    where = ["--host", SERVERS[0], "--listen", "0.0.0.0", "--store", "/data"]
    if "cluster" in os.environ.get("COMPOSE_PROFILES", "").split(","):
        where += [part for host in SERVERS[1:] for part in ("--cluster", host)]
    if limit := os.environ.get("NATS_STORE"):
        where += ["--store-limit", limit]
    _actors("nats-conf", str(GENERATED), *where, "--tls", str(tls), "--tls-seen-as", _TLS)
    for path in (*GENERATED.glob("*.conf"), *GENERATED.glob("*.json"), tls / "server.key"):
        path.chmod(0o644)  # in its container a file is read by a user who is nobody here


def _actors(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "actors", *arguments], check=True)


def start_keeper() -> None:
    """Beside the stack, until it is taken down; see keeper.py."""
    environment = os.environ | {"PYTHONPATH": str(FILE.parents[1])}
    with (GENERATED / "keeper.log").open("ab") as output:
        subprocess.Popen(
            [sys.executable, "-m", "compose.keeper", PROJECT],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def main() -> int:
    """Bring the stack up; returns the exit status."""
    try:
        make_logins()
        images.make(pull="--stand-ins" not in sys.argv)
        up = [*COMPOSE, "up", "--detach", "--wait", "--wait-timeout", str(_WAIT_S)]
        # a replica that does not reach the server in time is started again, which compose takes for the end of it
        if all(subprocess.run(up, check=False).returncode for _ in range(_PATIENCE)):
            subprocess.run(up, check=True)
        start_keeper()
    except CannotRun as error:
        print(f"up: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"up: {' '.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return error.returncode
    run = os.environ.get("RUN") or "dev"
    print(
        "\nthe stack is healthy\n"
        f"  docker compose -f compose/dev.yml logs -f run                  how run {run} goes\n"
        f"  docker compose -f compose/dev.yml cp run:/runs/{run} runs/       what it leaves\n"
        "  make down                                                      drains and stops it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
