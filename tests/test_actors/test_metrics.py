"""What a replica tells Prometheus, where it tells it, and what is told of alerts."""

import asyncio
import json
import platform
import re
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actors import metrics
from actors.errors import UserError
from actors.heartbeat import Vitals
from actors.process import Hops, Process
from bus.connection import Bus
from bus.dead import dead_letters
from bus.embedded import free_port
from bus.log import Log
from bus.work import open_queue, publish_work
from schemas.events import Admitted, Call, Cause, Event, Failed, Result, Turn
from schemas.messages import Heartbeat, Stall, StallKind
from schemas.recipe import Deadlines, Policy, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory

COMPOSE = Path(__file__).parents[2] / "compose"
RUN = "test"
WAIT_S = 30.0
Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def vitals(role: str = "generator") -> Vitals:
    return Vitals(run=RUN, role=role, replica=f"{role}-h-1", policy_version=3)  # type: ignore[arg-type]


def scrape(address: str) -> Figures:
    """Each series with its labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples}


def scraped(of: Vitals, *, connected: bool = True) -> Figures:
    with metrics.serving(of, lambda: connected):
        return scrape(of.metrics)


def value(figures: Figures, name: str, **labels: str) -> float:
    """Of one series; 0 when it is not there."""
    return figures.get((f"actors_{name}", tuple(sorted({"run": RUN, **labels}.items()))), 0.0)


# -- where -----------------------------------------------------------------------------------------


def test_every_series_says_of_which_run_and_role() -> None:
    """The process's own too; whatever found the target."""
    figures = scraped(vitals())
    assert all(dict(labels)["run"] == RUN for _, labels in figures)
    assert all(dict(labels)["role"] == "generator" for _, labels in figures)
    assert figures["process_resident_memory_bytes", (("role", "generator"), ("run", RUN))] > 1e6
    assert value(figures, "replica_info", role="generator", replica="generator-h-1") == 1
    assert value(figures, "policy_version", role="generator") == 3
    assert value(figures, "bus_connected", role="generator") == 1


def test_by_default_it_listens_on_loopback_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many on one machine as there are; each tells its address in its heartbeat."""
    monkeypatch.delenv(metrics.VARIABLE, raising=False)
    first, second = vitals(), vitals()
    with metrics.serving(first, lambda: True), metrics.serving(second, lambda: False):
        assert first.metrics.startswith("127.0.0.1:")
        assert first.beat().metrics == first.metrics != second.metrics
        assert value(scrape(second.metrics), "bus_connected", role="generator") == 0


def test_a_port_that_is_taken_leaves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several replicas in one container do not quarrel."""
    port = free_port()
    monkeypatch.setenv(metrics.VARIABLE, f"127.0.0.1:{port}")
    first, second = vitals(), vitals()
    with metrics.serving(first, lambda: True), metrics.serving(second, lambda: True):
        assert first.metrics == f"127.0.0.1:{port}"
        assert second.metrics != first.metrics
        assert scrape(second.metrics)


def test_it_may_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no port is opened."""
    monkeypatch.setenv(metrics.VARIABLE, "off")
    silent = vitals()
    with metrics.serving(silent, lambda: True):
        assert silent.metrics == ""


@pytest.mark.parametrize("wrong", ["9100", "0.0.0.0:", "here:99999", "203.0.113.7:9100"])
def test_a_place_that_is_none_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable's name, in one line."""
    monkeypatch.setenv(metrics.VARIABLE, wrong)
    with (
        pytest.raises(UserError, match=f"ACTORS_METRICS={wrong}"),
        metrics.serving(vitals(), lambda: True),
    ):
        pass


def test_prometheus_is_told_of_replicas_that_answer(tmp_path: Path) -> None:
    """The same again is not written again; with the last the file goes."""
    answering = [beat(metrics=f"127.0.0.1:{port}") for port in (9, 8)]
    path = tmp_path / "r.targets.json"
    metrics.write_targets(path, [*answering, beat()])
    assert json.loads(path.read_text()) == [{"targets": ["127.0.0.1:8", "127.0.0.1:9"]}]
    written = path.stat()
    metrics.write_targets(path, answering)
    assert path.stat() == written
    metrics.write_targets(path, [beat()])
    assert not path.exists()


def beat(**more: Any) -> Heartbeat:
    more = {"role": "generator", "host": platform.node(), **more}
    return Heartbeat(run="r", replica="generator-h-1", pid=1, up_s=1.0, **more)


# -- what ------------------------------------------------------------------------------------------


class Says:
    """A stage whose event is what a function makes of the trajectory."""

    produces: tuple[type[Event], ...] = (Turn, Result)

    def __init__(self, stage: str, handle: Callable[[Trajectory], Awaitable[Any]]) -> None:
        self.stage = stage
        self.handle = handle

    async def drain(self) -> None: ...

    async def close(self) -> None: ...


async def hops(bus: Bus, log: Log, actor: Says, after: Event | None = None) -> Figures:
    """One trajectory through one stage, taken and lost once before; what the replica's figures grew by."""
    of = vitals({"gen": "generator", "tool": "toolbox"}[actor.stage])
    admitted = Admitted(
        trajectory="g0-0-0", task="t", public=PublicPart(messages=[]), private_key=""
    )
    state = Trajectory(admitted=admitted, seq=await log.append(admitted, 0))
    if isinstance(after, Turn):
        await log.append(after, state.seq)
        asked = await log.trajectory(state.id)
        assert asked is not None
        state = asked
    await publish_work(bus, log.run, state)
    tool = "python" if actor.stage == "tool" else ""
    async with open_queue(bus, actor.stage, log.run, tool, slots=1) as queue:  # type: ignore[arg-type]
        lost = await queue.take()
        queue.drain()  # it must not be given to this queue again, which is about to close
        await lost.give_back()
    recipe = Recipe(policy=Policy(model="m"), deadlines=Deadlines(handler_failures=2, drain_s=1))
    process = Process(bus, log, recipe, "", of, asyncio.Event())
    before = scraped(of)
    served = asyncio.create_task(Hops(process, actor).serve([tool], 1))  # type: ignore[arg-type]
    async with asyncio.timeout(WAIT_S):
        async for found in log.follow(poll_s=0.02):
            if any(stored.seq > state.seq for stored in found) or await dead_letters(bus, log.run):
                break
    process.stopping.set()
    await served
    return grown(before, scraped(of))


def grown(before: Figures, after: Figures) -> Figures:
    return {key: number - before.get(key, 0.0) for key, number in after.items()}


async def test_a_turn_is_counted_with_its_tokens(bus: Bus, log: Log) -> None:
    """Once, when it is in the log: what was sampled, what was given, and that its message came again."""

    async def turn(state: Trajectory) -> Turn:
        tokens = Tokens.given([1, 2, 3]) + Tokens.sampled([4, 5], [0.0, 0.0], [3, 3])
        return Turn(trajectory=state.id, tokens=tokens, text="", last=True)

    figures = await hops(bus, log, Says("gen", turn))
    assert value(figures, "tokens_total", role="generator", kind="sampled") == 2
    assert value(figures, "tokens_total", role="generator", kind="given") == 3
    assert value(figures, "hop_seconds_count", role="generator", stage="gen") == 1
    assert value(figures, "redelivered_messages_total", role="generator", stage="gen") == 1
    assert value(figures, "dead_letters_total", role="generator", stage="gen") == 0


async def test_a_call_is_counted_by_its_tool(bus: Bus, log: Log) -> None:
    """What it took by itself, and whether it is the tool's own error."""
    call = Call(tool="python", arguments={"code": "1/0"})
    asked = Turn(trajectory="g0-0-0", tokens=Tokens.sampled([1], [0.0], [0]), text="", calls=[call])

    async def result(state: Trajectory) -> Result:
        return Result(trajectory=state.id, turn=0, call=0, text="", ok=False, duration_ms=250.0)

    figures = await hops(bus, log, Says("tool", result), asked)
    assert value(figures, "tool_call_seconds_sum", role="toolbox", tool="python") == 0.25
    assert value(figures, "tool_errors_total", role="toolbox", tool="python") == 1


async def test_a_failure_is_counted_by_its_cause(bus: Bus, log: Log) -> None:
    """Each try; the letter that it leaves in the end too."""

    async def crash(_: Trajectory) -> Turn:
        raise RuntimeError

    figures = await hops(bus, log, Says("gen", crash))
    failed = {"role": "generator", "stage": "gen", "cause": "engine.crashed"}
    assert value(figures, "hop_failures_total", **failed) == 2
    assert value(figures, "dead_letters_total", role="generator", stage="gen") == 1


def test_a_cause_that_is_no_name_makes_no_series() -> None:
    """Workers in other languages choose the code of their failures."""
    of = vitals("dispatcher")
    before = scraped(of)
    for code in ("gone", "secret 🔑 " * 9):
        cause = Cause(boundary="tool", code=code)
        metrics.appended(Failed(trajectory="g0-0-0", cause=cause))
    figures = grown(before, scraped(of))
    told = {"role": "dispatcher", "end": "failed"}
    assert value(figures, "closed_trajectories_total", cause="tool.gone", **told) == 1
    assert value(figures, "closed_trajectories_total", cause="other", **told) == 1
    assert not any("secret" in str(key) for key in figures)


def test_the_dispatcher_tells_of_the_fleet() -> None:
    """Each kind of stall with its longest, also of those that a supervisor sees; 0 where none is. Then no more."""
    of = vitals("dispatcher")
    stalls = [
        Stall(kind="held", subject=name, detail="", for_s=s) for name, s in (("a", 7), ("b", 9))
    ]
    beats = [beat(policy_version=5), beat(policy_version=2), beat(policy_version=-1)]
    metrics.show_fleet([*beats, beat(role="supervisor", stalls=stalls)], 6)
    figures = scraped(of)
    longest = {
        kind: value(figures, "stall_seconds", role="dispatcher", stall=kind) for kind in KINDS
    }
    assert longest == dict.fromkeys(KINDS, 0.0) | {"held": 9.0}
    assert value(figures, "policy_version_lag", role="dispatcher") == 4
    assert value(figures, "replicas_heard", role="dispatcher", of="generator") == 3
    metrics.stop_acting()
    assert not any(name == "actors_stall_seconds" for name, _ in scraped(of))


# -- alerts ----------------------------------------------------------------------------------------

KINDS = get_args(StallKind)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((COMPOSE / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_each_kind_of_stall_has_its_rule() -> None:
    """What the watchdog can name, an operator is told of; a kind that is added needs a rule."""
    assert sorted(
        rule["labels"].get("stall", "") for rule in rules() if "stall" in rule["labels"]
    ) == (sorted(KINDS))
    for rule in rules():
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_rules_ask_for_what_there_is() -> None:
    """A metric that is renamed takes its alert along."""
    there = {family.name for family in metrics.REGISTRY.collect()}
    there |= {family.name for family in metrics.Replica(vitals(), lambda: True).collect()}
    for rule in rules():
        for name in re.findall(r"actors_\w+", rule["expr"]):
            assert name.removesuffix("_total") in there, rule["alert"]
