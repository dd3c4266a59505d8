"""THE TABLE: every subject, its stream, who publishes it and who reads it.

Generated from nothing; streams are generated from it, and so will be each role's permissions. The run is the second
token of every subject. `*` in a row stands for one token: a trajectory, a kind, a tool, a replica.
"""

import re
from typing import Literal, NamedTuple

Stage = Literal["gen", "tool", "score"]

EVERYONE = ("everyone",)


class Row(NamedTuple):
    """One line of the table."""

    subject: str
    stream: str
    """Empty for core messages, which nobody stores."""
    publishes: tuple[str, ...]
    consumes: tuple[str, ...]


TABLE = (
    Row("log.*.t.*.admitted", "LOG", ("dispatcher", "gateway"), EVERYONE),
    Row("log.*.t.*.turn", "LOG", ("generator", "gateway"), EVERYONE),
    Row("log.*.t.*.started", "LOG", ("toolbox",), EVERYONE),
    Row("log.*.t.*.result", "LOG", ("toolbox",), EVERYONE),
    Row("log.*.t.*.scored", "LOG", ("scorer",), EVERYONE),
    Row("log.*.t.*.evaluated", "LOG", ("scorer",), EVERYONE),
    Row("log.*.t.*.expired", "LOG", ("dispatcher",), EVERYONE),
    Row("log.*.t.*.failed", "LOG", ("dispatcher",), EVERYONE),
    Row("log.*.t.*.dropped", "LOG", ("dispatcher",), EVERYONE),
    Row("log.*.t.*.finished", "LOG", ("gateway",), EVERYONE),
    Row("log.*.l.*.*", "LOG", ("learner",), EVERYONE),
    Row("log.*.r.*", "LOG", ("dispatcher", "supervisor"), EVERYONE),
    Row("gen.*", "GEN", ("dispatcher", "generator", "toolbox"), ("generator",)),
    Row("tool.*.*", "TOOL", ("dispatcher", "generator", "toolbox", "gateway"), ("toolbox",)),
    Row("score.*", "SCORE", ("dispatcher", "generator"), ("scorer",)),
    Row("$KV.policy.*", "KV_policy", ("learner",), ("generator", "dispatcher")),
    Row("$O.weights.C.*", "OBJ_weights", ("learner",), ("generator",)),
    Row("$O.weights.M.*", "OBJ_weights", ("learner",), ("generator",)),
    Row("$O.blobs.C.*", "OBJ_blobs", ("toolbox",), ("dispatcher", "gateway", "operator")),
    Row("$O.blobs.M.*", "OBJ_blobs", ("toolbox",), ("dispatcher", "gateway", "operator")),
    Row("weights.*.ready", "", ("learner",), ("generator", "dispatcher")),
    Row("$KV.private.*.*", "KV_private", ("dispatcher",), ("scorer",)),
    Row("$KV.lease.*.dispatcher", "KV_lease", ("dispatcher",), ("dispatcher",)),
    Row("$KV.lease.*.bookmark", "KV_lease", ("dispatcher",), ("dispatcher",)),
    Row("$KV.lease.*.recorder", "KV_lease", ("recorder",), ("recorder",)),
    Row("$KV.session.*.*.*", "KV_session", ("toolbox",), ("toolbox",)),
    Row("sess.*.*.*", "", ("toolbox",), ("toolbox",)),
    Row("hb.*.*", "", EVERYONE, ("supervisor", "dispatcher", "gateway", "operator")),
    Row("dead.*.*", "DEAD", ("generator", "toolbox", "scorer"), ("dispatcher", "operator")),
)

WORK_STREAMS: dict[Stage, str] = {"gen": "GEN", "tool": "TOOL", "score": "SCORE"}
LOG_STREAM = "LOG"
DEAD_STREAM = "DEAD"

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


def token(text: str, what: str) -> str:
    """The text, if it may be one token of a subject. Raises ValueError otherwise."""
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"{what} {text!r} may only have letters, digits, '_' and '-'")
    return text


def streams() -> dict[str, list[str]]:
    """Each stream with the subjects it stores, as server-side patterns."""
    subjects: dict[str, list[str]] = {}
    for row in TABLE:
        if row.stream:
            first = row.subject.split(".*")[0]
            pattern = f"{first}.>"
            known = subjects.setdefault(row.stream, [])
            if not any(pattern == other or pattern.startswith(other[:-1]) for other in known):
                known.append(pattern)
    return subjects


def trajectory(run: str, trajectory_id: str, kind: str = "*") -> str:
    """An event of one trajectory; all of its events without a kind."""
    return f"log.{run}.t.{trajectory_id}.{kind}"


def learner(run: str, name: str, kind: str = "*") -> str:
    """An event of a learner's write-ahead log."""
    return f"log.{run}.l.{name}.{kind}"


def run_event(run: str, kind: str = "*") -> str:
    """An event of the run itself."""
    return f"log.{run}.r.{kind}"


def log(run: str) -> str:
    """Everything that happens in a run."""
    return f"log.{run}.>"


def work(stage: Stage, run: str, tool: str = "") -> str:
    """Where a stage's wake-ups lie. `tool`: its queue, `<tool>` or `<tool>@<version>`."""
    return f"tool.{run}.{tool}" if stage == "tool" else f"{stage}.{run}"


def session(run: str, trajectory_id: str, tool: str) -> str:
    """Where the replica answers that holds what a tool keeps for a trajectory. `tool`: its queue."""
    return f"sess.{run}.{trajectory_id}.{tool}"


def durable(run: str, tool: str = "") -> str:
    """The one consumer of a (stage, run[, tool])."""
    return f"{run}={tool}" if tool else run  # no token has a "="


def ready(run: str) -> str:
    """A hint that new weights are there."""
    return f"weights.{run}.ready"


def heartbeat(role: str = "*", replica: str = "*") -> str:
    """Signs of life."""
    return f"hb.{role}.{replica}"


def dead(stage: str, run: str) -> str:
    """Messages that no handler could take."""
    return f"dead.{stage}.{run}"
