"""What Prometheus is told: `/metrics` of every replica, answered by a thread of its own.

What a hop changes is counted where hops are committed (process.py); what a replica is, is asked when somebody scrapes;
what only the acting dispatcher sees (queues, stalls, the fleet) it writes down on its rounds. Every sample carries
`run` and `role`, so that it does not matter how a target was found. No label holds anything that the policy wrote, or
a trajectory's name: there would be one series for each.

    ACTORS_METRICS=HOST:PORT   where to listen, or at the next free port; by default on loopback, at any free port
    ACTORS_METRICS=off         nowhere
"""

import os
import platform
import re
import threading
from collections import Counter as Count
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from actors.errors import UserError
from actors.heartbeat import Vitals
from schemas.events import (
    Admitted,
    AnyTrajectoryEvent,
    Dropped,
    Expired,
    Failed,
    Result,
    Turn,
)
from schemas.messages import Heartbeat, StallKind
from schemas.trajectory import Trajectory

if TYPE_CHECKING:  # it needs the fleet, which counts here what it hears
    from actors.watchdog import Sight

VARIABLE = "ACTORS_METRICS"
_LOOPBACK = "127.0.0.1"
_PORTS = 16
_CAUSE = re.compile(r"([a-z]+\.[a-z0-9_]{1,40})?")
_ADDRESS = re.compile(r"([^:]+|\[[^]]+\]):([0-9]{1,5})")
_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)

# they would be a second series for each, which says when a process was forked
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"actors_{name}", text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"actors_{name}", text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(f"actors_{name}", text, labels, buckets=_BUCKETS_S, registry=REGISTRY)


# -- of whoever takes hops -------------------------------------------------------------------------

HOP_SECONDS = _histogram(
    "hop_seconds", "From taking a hop in hand to its event in the log.", "stage"
)
MOVED_ON = _counter("hops_moved_on", "Wake-ups that found the log ahead of them.", "stage")
REDELIVERED = _counter("redelivered_messages", "Wake-ups given out a second time or more.", "stage")
HOP_FAILURES = _counter(
    "hop_failures", "Hops that infrastructure failed, by cause.", "stage", "cause"
)
DEAD_LETTERS = _counter("dead_letters", "Messages put aside.", "stage")
TOKENS = _counter("tokens", "Tokens of turns in the log, sampled or given.", "kind")
TOOL_SECONDS = _histogram("tool_call_seconds", "What a call took, without its way there.", "tool")
TOOL_ERRORS = _counter("tool_errors", "Calls whose result is a tool's own error.", "tool")
SANDBOX = _gauge("sandbox_info", "The sandbox tier in use; always 1.", "tier")


def begin_stage(stage: str) -> None:
    """Let what is rare be seen before it happens: `increase()` does not see a series begin at 1."""
    for counter in (MOVED_ON, REDELIVERED, DEAD_LETTERS):
        counter.labels(stage)


def committed(stage: str, state: Trajectory, event: AnyTrajectoryEvent, seconds: float) -> None:
    """A hop's event is in the log; `state` is the trajectory before it."""
    HOP_SECONDS.labels(stage).observe(seconds)
    if isinstance(event, Turn):
        sampled = event.tokens.sampled_count
        TOKENS.labels("sampled").inc(sampled)
        TOKENS.labels("given").inc(len(event.tokens) - sampled)
    elif isinstance(event, Result):
        tool = state.turns[event.turn].calls[event.call].tool
        TOOL_SECONDS.labels(tool).observe(event.duration_ms / 1e3)
        if not event.ok:
            TOOL_ERRORS.labels(tool).inc()


# -- of the learner --------------------------------------------------------------------------------

STEPS = _counter("steps", "Optimizer steps.")
TRAINED_TOKENS = _counter("trained_tokens", "Tokens of the batches trained.")
TRAIN_SECONDS = _counter("train_seconds", "Time in optimizer steps.")
STEP = _gauge("step", "The numbers of the newest row of metrics.jsonl, staleness among them.", "of")


def stepped(row: Mapping[str, Any]) -> None:
    """A step is in the log, with its row of metrics.jsonl."""
    STEPS.inc()
    TRAINED_TOKENS.inc(row["train_tokens"])
    TRAIN_SECONDS.inc(row["train_s"])
    for name, value in row.items():
        if isinstance(value, int | float):
            STEP.labels(name).set(value)


# -- of the acting dispatcher ----------------------------------------------------------------------

ACTING = _gauge("dispatcher_acting", "1 while it holds the lease.")
ADMITTED = _counter("admitted_trajectories", "Trajectories that it let begin.", "purpose")
CLOSED = _counter(
    "closed_trajectories", "Trajectories that it ended; failed ones by cause.", "end", "cause"
)
SWEPT = _counter("swept_trajectories", "Wake-ups sent again for lack of news.", "stage")
HEARTBEATS = _counter("heartbeats_heard", "Signs of life heard.", "of")
IN_FLIGHT = _gauge("trajectories_in_flight", "Not ended, by whose turn it is.", "stage")
QUEUE = _gauge("queue_messages", "Wake-ups that nobody has taken yet.", "queue")
QUEUE_AGE = _gauge("queue_oldest_seconds", "The longest wait of those nobody holds.", "queue")
REPLICAS = _gauge("replicas_heard", "Live replicas.", "of")
LAG = _gauge("policy_version_lag", "Versions that the last generator is behind the newest.")
STALLS = _gauge(
    "stall_seconds", "How long the longest of a kind has stood still; 0: none does.", "stall"
)
STOPPED = _gauge("admission_stopped", "1 while nothing new, or little, is admitted.", "reason")


def appended(event: Admitted | Expired | Failed | Dropped) -> None:
    """An event of the dispatcher's own is in the log."""
    if isinstance(event, Admitted):
        ADMITTED.labels(event.purpose).inc()
        return
    cause = str(event.cause) if isinstance(event, Failed) else ""
    if not _CAUSE.fullmatch(cause):  # a worker in another language may have named it
        cause = "other"
    CLOSED.labels(event.kind, cause).inc()


def show_work(sight: "Sight") -> None:
    """Who is whose turn, how long the queues are, and how long those wait in them that nobody holds."""
    _show(IN_FLIGHT, Count(waiting.stage for waiting in sight.live.values()))
    _show(QUEUE, {name: queue.waiting for name, queue in sight.queues.items()})
    held = {each.trajectory for heard in sight.heard for each in heard.beat.held}
    ages = dict.fromkeys(sight.queues, 0.0)
    for name, waiting in sight.live.items():
        if name not in held and waiting.queue in ages:
            ages[waiting.queue] = max(ages[waiting.queue], sight.now_s - waiting.since_s)
    _show(QUEUE_AGE, ages)


def show_fleet(beats: Iterable[Heartbeat], policy_version: int) -> None:
    """The last signs of those alive, and the newest version."""
    heard = list(beats)
    _show(REPLICAS, Count(beat.role for beat in heard))
    held = [beat.policy_version for beat in heard if beat.role == "generator"]
    LAG.set(max([0, *(policy_version - version for version in held if version >= 0)]))
    longest = dict.fromkeys(get_args(StallKind), 0.0)
    for beat in heard:
        for stall in beat.stalls:
            longest[stall.kind] = max(longest[stall.kind], stall.for_s)
    _show(STALLS, longest)


def show_admission(**stopped: bool) -> None:
    """Whether admission is stopped, by reason."""
    _show(STOPPED, stopped)


def stop_acting() -> None:
    """What a dispatcher saw is another's to tell now."""
    ACTING.set(0)
    LAG.set(0)
    for gauge in (IN_FLIGHT, QUEUE, QUEUE_AGE, REPLICAS, STALLS, STOPPED):
        _show(gauge, {})


_shown: defaultdict[Gauge, set[str]] = defaultdict(set)


def _show(gauge: Gauge, values: Mapping[str, float]) -> None:
    """These and no others; what stays is there all the time, whenever a scrape comes."""
    for label, value in values.items():
        gauge.labels(label).set(value)
    for label in _shown[gauge] - values.keys():
        gauge.remove(label)
    _shown[gauge] = set(values)


# -- of every replica ------------------------------------------------------------------------------


class Replica(Collector):
    """All of a process's metrics with its run and role, and what its vitals say at this moment."""

    def __init__(self, vitals: Vitals, is_connected: Callable[[], bool]) -> None:
        self._vitals = vitals
        self._is_connected = is_connected

    def collect(self) -> Iterator[Metric]:
        """Called by the thread that answers a scrape."""
        mine = {"run": self._vitals.run, "role": self._vitals.role}
        for metric in (*self._own(), *REGISTRY.collect()):
            metric.samples = [
                Sample(each.name, {**mine, **each.labels}, each.value) for each in metric.samples
            ]
            yield metric

    def _own(self) -> Iterator[Metric]:
        beat = self._vitals.beat()
        yield _family("replica_info", "Its name; always 1.", {beat.replica: 1.0}, "replica")
        held = Count(stage for stage, _ in list(self._vitals.held.values()))
        yield _family("held_trajectories", "What it works on.", held, "stage")
        for name, text, value in (
            ("policy_version", "The version that it holds; -1: none.", beat.policy_version),
            ("event_loop_lag_seconds", "How long ago its event loop last ran.", beat.loop_lag_s),
            ("bus_connected", "1 while a NATS server is reached.", self._is_connected()),
        ):
            yield GaugeMetricFamily(f"actors_{name}", text, value=float(value))


def _family(name: str, text: str, values: Mapping[str, float], label: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"actors_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


@contextmanager
def serving(vitals: Vitals, is_connected: Callable[[], bool]) -> Iterator[None]:
    """Answer scrapes for as long as the block runs, and note the address in the vitals. Raises UserError."""
    wanted = os.environ.get(VARIABLE) or f"{_LOOPBACK}:0"
    if wanted == "off":
        yield
        return
    host, port = _address(wanted)
    registry = CollectorRegistry()
    registry.register(Replica(vitals, is_connected))
    server = None
    for number in range(port, min(port + _PORTS, 1 << 16)) if port else [0]:
        try:
            server, _ = start_http_server(number, host, registry)
            break
        except OSError as error:
            why = error.strerror or str(error)
    if server is None:
        raise UserError(f"{VARIABLE}={wanted}: cannot listen there: {why}")
    everywhere = host in ("0.0.0.0", "[::]")
    vitals.metrics = f"{platform.node() if everywhere else host}:{server.server_port}"
    try:
        yield
    finally:
        # it looks up twice a second whether it should end: nobody waits for that
        threading.Thread(target=server.shutdown, daemon=True).start()
        server.server_close()


def _address(text: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[2]) >= 1 << 16:
        raise UserError(f"{VARIABLE}={text}: write it as HOST:PORT, e.g. 0.0.0.0:9100, or off")
    return found[1].strip("[]"), int(found[2])


@contextmanager
def including(registry: CollectorRegistry) -> Iterator[None]:
    """Tell of another registry's metrics too, for as long as the block runs."""
    REGISTRY.register(registry)
    try:
        yield
    finally:
        REGISTRY.unregister(registry)


def write_targets(path: Path, beats: Iterable[Heartbeat]) -> None:
    """Where these replicas serve, for `file_sd_configs`; written when that changes, gone with the last."""
    addresses = sorted(beat.metrics for beat in beats if beat.metrics)
    data = msgspec.json.encode([{"targets": addresses}])
    if not addresses:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != data:
        new = path.with_suffix(".new")
        new.write_bytes(data)
        new.rename(path)
