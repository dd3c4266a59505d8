"""What must stay true of compose/, without docker: limits, health checks, walls and no secrets, for every service."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors import metrics
from bus.subjects import ROLES
from compose import healthy, up
from compose.stand_in import EXTRAS, NATS_IMAGE, PROMETHEUS_IMAGE, PYTHON_IMAGE
from tools.sandbox import seccomp

ROOT = Path(__file__).parents[1]
STACK = yaml.safe_load((ROOT / "compose" / "dev.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
ROLE_SERVICES = set(SERVICES) - {*up.SERVERS, "prometheus"}
ONE_SHOT = {"operator"}
HOSTILE = {"toolbox", "scorer"}

of_each_service = pytest.mark.parametrize("name", SERVICES)


@of_each_service
def test_a_service_is_watched_and_bounded(name: str) -> None:
    """Its health, its restart, its memory, processes and processors, its logs, and the time to drain."""
    service = SERVICES[name]
    if name not in ONE_SHOT:
        assert service["healthcheck"]["test"]
        assert service["restart"] in ("on-failure", "unless-stopped")
    for limit in ("mem_limit", "pids_limit", "cpus"):
        assert service[limit]
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert service["stop_grace_period"] == "60s"


@of_each_service
def test_a_service_is_confined(name: str) -> None:
    """Nothing to write to but volumes and memory, no capability, no docker; ports on loopback only."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    assert "docker.sock" not in json.dumps(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if name in ROLE_SERVICES:
        assert service["user"] == "65534:65534"


@of_each_service
def test_what_a_service_waits_for_is_healthy(name: str) -> None:
    """Started is not enough."""
    waits = SERVICES[name].get("depends_on", {})
    assert all(wait["condition"] == "service_healthy" for wait in waits.values())
    assert waits or name in (*up.SERVERS, "prometheus")


@pytest.mark.parametrize("name", sorted(ROLE_SERVICES))
def test_a_role_has_its_own_login_only(name: str) -> None:
    """Of what opens the run: those of `provision` and `supervisor`; of the operator: those of who reads and steers."""
    role = name.removesuffix("-gpu")
    several = {"run": {"provision", "supervisor"}, "operator": {"operator", "analytics"}}
    secrets = {secret["source"] for secret in SERVICES[name]["secrets"]}
    assert secrets == several.get(role, {role})
    assert secrets <= set(ROLES) & set(STACK["secrets"])


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_who_runs_the_models_code_reaches_nats_only(name: str) -> None:
    """A network of its own without a way out, where nobody else is but NATS and Prometheus, which listens elsewhere."""
    (network,) = SERVICES[name]["networks"]
    assert STACK["networks"][network]["internal"] is True
    there = {other for other, service in SERVICES.items() if network in service["networks"]}
    assert there == {name, *up.SERVERS, "prometheus"}
    assert "--web.listen-address=metrics.outside:9090" in SERVICES["prometheus"]["command"]
    assert SERVICES["prometheus"]["networks"]["outside"] == {"aliases": ["metrics.outside"]}
    assert "seccomp=seccomp-toolbox.json" in SERVICES[name]["security_opt"]


@pytest.mark.parametrize("profiles", ["cpu", "cpu,cluster"])
def test_what_make_up_writes_is_what_the_stack_mounts(
    profiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers' configurations, certificates where these name them, logins; the authority's key is for nobody."""
    monkeypatch.setattr(up, "GENERATED", tmp_path)
    monkeypatch.setenv("COMPOSE_PROFILES", profiles)
    up.make_logins()
    servers = up.SERVERS if "cluster" in profiles else up.SERVERS[:1]
    mounted = [*STACK["configs"].values(), *STACK["secrets"].values()]
    files = {each["file"].removeprefix("generated/") for each in mounted}
    absent = {f"{name}.conf" for name in set(up.SERVERS) - set(servers)}
    missing = {file for file in files if not (tmp_path / file).exists()}
    assert missing == absent | {"prometheus.yml", "alerts.yml"}
    assert {(tmp_path / file).stat().st_mode & 0o777 for file in files - missing} == {0o644}
    assert (tmp_path / "tls" / "ca.key").stat().st_mode & 0o777 == 0o600
    for name in servers:
        text = (tmp_path / f"{name}.conf").read_text()
        mounts = [*SERVICES[name]["configs"], *SERVICES[name]["secrets"]]
        assert all(mount["target"] in text or mount["source"] == name for mount in mounts)
        assert text.count("tls {") == len(servers[:2]), "for clients, and for one another"
    login = json.loads((tmp_path / "generator.json").read_text())
    assert login["url"] == ",".join(f"nats://{name}:4222" for name in servers)
    (authority,) = SERVICES["generator"]["configs"]
    assert authority["target"] == f"/nats/{login['ca']}"


def test_the_seccomp_profile_refuses_what_the_sandbox_does_not_need() -> None:
    """All that code in the sandbox may not call, but what the sandbox is made with or holds by other means."""
    profile = json.loads((ROOT / "compose" / "seccomp-toolbox.json").read_text())
    (rule,) = profile["syscalls"]
    assert (profile["defaultAction"], rule["action"]) == ("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO")
    needed = {"unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "mount_setattr"}
    harmless = {
        *("open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
        *("memfd_create", "memfd_secret", "shmget", "msgget", "semget", "mq_open"),
    }
    refused = set(rule["names"])
    assert not refused & needed
    assert set(seccomp.denied("x86_64")) - needed - harmless <= refused


def test_stand_ins_have_the_names_that_are_asked_for() -> None:
    """Whatever says `docker compose up` finds them."""
    text = (ROOT / "compose" / "dev.yml").read_text()
    dockerfile = (ROOT / "compose" / "Dockerfile").read_text()
    for image in (NATS_IMAGE, PROMETHEUS_IMAGE, PYTHON_IMAGE):
        assert f":-{image}}}" in text
    assert f"ARG BASE_IMAGE={PYTHON_IMAGE}\n" in dockerfile
    assert f'ARG EXTRAS="{" ".join(EXTRAS)}"' in dockerfile


def test_the_image_is_pinned_and_belongs_to_nobody() -> None:
    """Every version is that of the lock file, and no process in it is root's."""
    dockerfile = (ROOT / "compose" / "Dockerfile").read_text()
    installs = [line for line in dockerfile.splitlines() if "pip install" in line]
    assert all(
        "-c requirements.lock" in line or "--no-deps --no-build" in line for line in installs
    )
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["65534:65534"]
    assert "# syntax=" not in dockerfile  # it would pull a frontend


def test_only_what_is_named_gets_into_the_image() -> None:
    """The build sees the packages and nothing else of the tree: no runs, no logins."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = set(wheel["targets"]["wheel"]["packages"])
    files = {"pyproject.toml", "requirements.lock", "README.md"}
    assert "*" in lines
    assert kept == packages | files | {"compose/healthy.py", "compose/wheels"}


def test_no_secret_is_committed() -> None:
    """No seed and no private key in any file that git knows of or would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    secret = re.compile(rb"\bS[UAOXCN][A-Z2-7]{56}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----")
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".bundle"):
            assert not secret.search(path.read_bytes()), name
    ignored = ["git", "check-ignore", "--quiet", str(up.GENERATED / "generator.json")]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0


def test_a_health_check_asks_the_replica_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Well is who answers with an event loop that runs; nobody there, or a loop that stands still, is not."""
    from actors.heartbeat import Vitals

    vitals = Vitals(run="r", role="toolbox", replica="toolbox-here-1")
    monkeypatch.setenv(metrics.VARIABLE, "127.0.0.1:0")
    with metrics.serving(vitals, lambda: True):
        monkeypatch.setattr(healthy, "PORT", int(vitals.metrics.rpartition(":")[2]))
        assert healthy.is_well()
        vitals.loop_ran_s -= 2 * healthy.LAG_S
        assert not healthy.is_well()
    assert not healthy.is_well()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["train", "recipes/arithmetic.toml", "--no-replicas"], "--no-replicas needs --nats"),
        (["run", "toolbox", "--unsupervised"], "--unsupervised needs --run NAME and --nats"),
        (["run", "toolbox", "--unsupervised", "--replicas", "2"], "--unsupervised is one replica"),
    ],
)
def test_what_containers_run_is_told_where(arguments: list[str], why: str) -> None:
    """No server of its own is started and none is looked for: one line says what is missing."""
    command = [sys.executable, "-m", "actors", *arguments]
    environment = os.environ | {"NATS_URL": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert why in done.stderr
