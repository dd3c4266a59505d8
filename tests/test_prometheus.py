"""A real Prometheus and a real run; promtool on the files of compose/ and on what every role says."""

import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from actors.train import INTERRUPTED
from bus.embedded import free_port
from compose.prometheus import CannotInstall, programs
from schemas.messages import RoleName

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "compose"
PATIENCE_S = 200.0
"""For conditions that come within seconds on a machine that is not busy."""


@pytest.fixture(scope="module")
def program() -> dict[str, str]:
    try:
        return programs()
    except CannotInstall as error:
        pytest.skip(f"no Prometheus here, its rules and figures are not tested: {error}")


def promtool(program: dict[str, str], *arguments: str, stdin: bytes = b"") -> str:
    command = [program["promtool"], *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-local.yml"])
def test_the_configuration_is_accepted(program: dict[str, str], name: str) -> None:
    """With its rules."""
    assert "SUCCESS" in promtool(program, "check", "config", str(COMPOSE / name))
    assert "SUCCESS" in promtool(program, "check", "rules", str(COMPOSE / "alerts.yml"))


FIRING = {
    "StageWithoutReplica": ('actors_stall_seconds{stall="no_replica"}', "0 3+1x20"),
    "ReplicaSilent": ('actors_stall_seconds{stall="silent"}', "0 3+1x20"),
    "EventLoopBlocked": ('actors_stall_seconds{stall="blocked"}', "0 3+1x20"),
    "HopPastItsDeadline": ('actors_stall_seconds{stall="held"}', "0 3+1x20"),
    "TrajectoryLost": ('actors_stall_seconds{stall="lost"}', "0 3+1x20"),
    "QueueStandsStill": ('actors_stall_seconds{stall="queue"}', "0 3+1x20"),
    "LearnerWaits": ('actors_stall_seconds{stall="learner"}', "0 3+1x20"),
    "NoDispatcher": ('actors_replica_info{role="scorer"}', "1x40"),
    "AdmissionBacksOff": ('actors_admission_stopped{reason="failing"}', "0 1x40"),
    "LogNearItsLimit": ('actors_admission_stopped{reason="no_room"}', "0 1x40"),
    "DeadLetters": ('actors_dead_letters_total{stage="gen"}', "0 1x40"),
    "HoldersDie": ('actors_redelivered_messages_total{stage="gen"}', "0+100x40"),
    "ServerAway": ('actors_bus_connected{role="scorer"}', "1 0x40"),
    "ReplicaNotScraped": ('up{job="actors"}', "1 0x40"),
}
"""Alert → a series and what it does, a value every 30 s, that makes it fire."""
ACTING = {"series": 'actors_dispatcher_acting{run="r",role="dispatcher"}', "values": "1x40"}


def test_each_alert_fires_when_it_should_and_only_then(
    program: dict[str, str], tmp_path: Path
) -> None:
    """By promtool: on its own series it fires, and no other rule does."""
    groups = yaml.safe_load((COMPOSE / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    assert alerts.keys() == FIRING.keys()
    tests = []
    for alert, (series, values) in FIRING.items():
        series = series.replace("{", '{run="r",')
        well = [] if alert == "NoDispatcher" else [ACTING]
        firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
        expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
        tests.append(
            {
                "name": alert,
                "interval": "30s",
                "input_series": [*well, {"series": series, "values": values}],
                "promql_expr_test": [{"expr": firing, "eval_time": "9m", "exp_samples": expected}],
            }
        )
    path = tmp_path / "test.yml"
    rules = str(COMPOSE / "alerts.yml")
    path.write_text(
        yaml.safe_dump({"rule_files": [rules], "evaluation_interval": "15s", "tests": tests})
    )
    assert "SUCCESS" in promtool(program, "test", "rules", str(path))


# -- a run -----------------------------------------------------------------------------------------


class Prometheus:
    """The real one, asked over HTTP."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=10) as answer:
            return json.load(answer)["data"]

    def ask(self, query: str) -> dict[str, float]:
        """The value of each series, by the values of its labels."""
        path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
        found = self.get(path)["result"]
        return {",".join(each["metric"].values()): float(each["value"][1]) for each in found}

    def firing(self) -> set[str]:
        alerts = self.get("/api/v1/alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}


@contextmanager
def prometheus(program: dict[str, str], runs: Path) -> Iterator[Prometheus]:
    """With the configuration for one machine, on this test's runs, at a pace for tests."""
    folder = runs / "prometheus"
    folder.mkdir()
    (folder / "alerts.yml").symlink_to(COMPOSE / "alerts.yml")
    text = (COMPOSE / "prometheus-local.yml").read_text()
    assert "../runs/*." in text
    quick = text.replace("../runs/*.", "../*.").replace(": 5s", ": 1s")
    (folder / "prometheus.yml").write_text(quick)
    port = free_port()
    command = [program["prometheus"], "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"],
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(30)


def until(is_so: Callable[[], Any], what: str) -> Any:
    """The first answer that is one; nobody may be there at first."""
    end = time.monotonic() + PATIENCE_S
    found: Any = None
    while time.monotonic() < end:
        try:
            if found := is_so():
                return found
        except OSError as error:
            found = error
        time.sleep(0.25)
    raise AssertionError(f"not in {PATIENCE_S:g} s: {what}; last: {found}")


def test_prometheus_sees_a_run(program: dict[str, str], tmp_path: Path, machine_at: Any) -> None:
    """Every role is found and well-formed; a missing toolbox is told of until one joins; sums are the log's."""
    machine = machine_at(tmp_path)
    recipe = str(ROOT / "tests" / "stalling" / "recipe.toml")
    settings = (
        *("learner.steps=100000", "replicas.toolbox=0", "replicas.gateway=1"),
        *("deadlines.hang_s=120", "deadlines.gen_s=120", "deadlines.tool_s=120"),
    )
    sets = [part for each in (*settings, "gateway.port=0") for part in ("--set", each)]
    run = machine.start("train", recipe, "--run", "seen", *sets)
    said = reading(run)
    with prometheus(program, tmp_path) as server:
        until(lambda: server.ask('actors_trajectories_in_flight{stage="tool"} > 0'), "calls to run")
        until(lambda: "StageWithoutReplica" in server.firing(), "the alert of a missing toolbox")
        toolbox = machine.start("run", "toolbox", "--run", "seen")
        until(lambda: server.ask("sum(actors_steps_total) > 2"), "steps")
        until(lambda: "StageWithoutReplica" not in server.firing(), "the end of the alert")
        roles = set(get_args(RoleName)) - {"shadow", "supervisor"}
        until(
            lambda: set(server.ask("count by (role) (actors_replica_info)")) == roles, "all roles"
        )
        assert server.ask('actors_sandbox_info{role="toolbox"}')
        for file in tmp_path.glob("seen.*.targets.json"):  # one of each supervisor
            for address in json.loads(file.read_text())[0]["targets"]:
                url = f"http://{address}/metrics"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    assert promtool(program, "check", "metrics", stdin=answer.read()) == ""

        machine.say("pause", "seen")
        until(lambda: server.ask('sum(actors_admission_stopped{reason="paused"}) == 1'), "a pause")
        moving = 'actors_trajectories_in_flight{stage!="scored"} > 0'
        until(lambda: not server.ask(moving), "all at rest")
        until(
            lambda: server.ask(f"sum(actors_trajectories_in_flight or vector(0)) < {A_STEP}"),
            "no step left",
        )
        until(
            lambda: "waiting for groups" in machine.say("ps", "--run", "seen"),
            "the last step is done",
        )
        later = f"min(timestamp(up)) > {time.time()}"
        until(lambda: server.ask(later), "a scrape after it")
        machine.say("stop", "seen")
        assert run.wait(PATIENCE_S) == INTERRUPTED, said
        toolbox.communicate(timeout=PATIENCE_S)
        assert toolbox.returncode == 0
        assert not list(tmp_path.glob("*.targets.json"))
        assert not machine.processes(), "its supervisor leaves nobody behind"
        lines = machine.say("tail", "--run", "seen", "--from-start", "--json").splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        kinds = Counter(event["kind"] for event in events)
        masks = [event["tokens"]["mask"] for event in events if event["kind"] == "turn"]
        assert {
            series: server.ask(f"sum(max_over_time({series}[10m]))")[""] for series in SUMS
        } == {series: kinds[kind] for series, kind in SUMS.items()}
        tokens = server.ask('sum(max_over_time(actors_tokens_total{kind="sampled"}[10m]))')[""]
        assert tokens == sum(map(sum, masks))


def reading(process: "subprocess.Popen[str]") -> list[str]:
    """The lines that it prints, as they come: who has a line for each step does not wait for a reader."""
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            lines.extend(output)

    threading.Thread(target=read, daemon=True).start()
    return lines


A_STEP = 4
"""Trajectories of one."""
SUMS = {
    'actors_hop_seconds_count{stage="gen"}': "turn",
    'actors_tool_call_seconds_count{tool="echo"}': "result",
    'actors_hop_seconds_count{stage="score"}': "scored",
    "actors_admitted_trajectories_total": "admitted",
    "actors_steps_total": "stepped",
}
"""Series → the kind of event that it counts."""
