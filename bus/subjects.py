"""THE TABLE: every subject, its stream, who publishes it and who reads it.

Generated from nothing; streams are generated from it, and each role's permissions (permissions.py). The run is the
second token of every subject. `*` in a row stands for one token: a trajectory, a kind, a tool, a replica.
"""

import re
from typing import Literal, NamedTuple

Stage = Literal["gen", "tool", "score"]

KEPT = ("dispatcher", "generator", "toolbox", "scorer", "learner", "recorder", "gateway")
"""The roles whose replicas a supervisor keeps alive."""
ROLES = (*KEPT, "shadow", "supervisor", "operator", "analytics", "provision")
"""Everyone who has a login of its own."""

EVERYONE = ("everyone",)
"""Of ROLES all but `provision`, which reads nothing."""
_HEARERS = (*KEPT, "supervisor", "operator")
"""Each role hears signs of life: who keeps it alive where nothing else is, has its login only."""
_WEIGHTS = ("generator", "learner", "shadow", "operator")
_BLOBS = ("toolbox", "generator", "learner", "shadow", "gateway", "dispatcher", "operator")


class Row(NamedTuple):
    """One line of the table."""

    subject: str
    stream: str
    """Empty for core messages, which nobody stores."""
    publishes: tuple[str, ...]
    consumes: tuple[str, ...]
    lists: tuple[str, ...] = ()
    """Who reads the keys of all runs, too, and not just those that it can name."""


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
    Row("log.*.l.*.*", "LOG", ("learner", "shadow"), EVERYONE),  # a shadow: none called `main`
    Row("log.*.r.opened", "LOG", ("supervisor",), EVERYONE),
    Row("log.*.r.tooladded", "LOG", ("operator",), EVERYONE),
    Row("log.*.r.toolremoved", "LOG", ("operator",), EVERYONE),
    Row("log.*.r.paused", "LOG", ("operator",), EVERYONE),
    Row("log.*.r.resumed", "LOG", ("operator",), EVERYONE),
    Row("log.*.r.stopping", "LOG", ("operator",), EVERYONE),
    Row("log.*.r.ended", "LOG", ("dispatcher",), EVERYONE),
    Row("log.*.r.archived", "LOG", ("operator",), EVERYONE),
    Row("gen.*", "GEN", ("dispatcher", "generator", "toolbox", "operator"), ("generator",)),
    Row(
        "tool.*.*",
        "TOOL",
        ("dispatcher", "generator", "toolbox", "gateway", "operator"),
        ("toolbox",),
    ),
    Row(
        "score.*",
        "SCORE",
        ("dispatcher", "generator", "toolbox", "scorer", "operator"),
        ("scorer",),
    ),
    Row(
        "$KV.policy.*",
        "KV_policy",
        ("learner",),
        ("generator", "dispatcher", "learner", "shadow", "operator"),
    ),
    Row(
        "$KV.policy.*.*",
        "KV_policy",
        ("learner",),
        ("generator", "learner", "shadow", "operator"),
        lists=("learner", "operator"),
    ),
    Row("$O.weights.C.*", "OBJ_weights", ("learner",), _WEIGHTS),
    Row("$O.weights.M.*", "OBJ_weights", ("learner",), _WEIGHTS),
    # the dispatcher: images of tasks; and it takes away what a killed replica has not finished
    Row("$O.blobs.C.*", "OBJ_blobs", ("toolbox", "dispatcher"), _BLOBS),
    Row("$O.blobs.M.*", "OBJ_blobs", ("toolbox", "dispatcher"), _BLOBS),
    Row("weights.*.ready", "", ("learner",), ("generator", "dispatcher", "shadow")),
    Row("$KV.private.*.*", "KV_private", ("dispatcher",), ("scorer", "operator"), ("operator",)),
    Row("$KV.lease.*.dispatcher", "KV_lease", ("dispatcher",), ("dispatcher",)),
    Row("$KV.lease.*.bookmark", "KV_lease", ("dispatcher",), ("dispatcher",)),
    Row("$KV.lease.*.recorder", "KV_lease", ("recorder",), ("recorder",)),
    Row("$KV.session.*.*.*", "KV_session", ("toolbox",), ("toolbox",)),
    Row("sess.*.*.*", "", ("toolbox",), ("toolbox",)),
    *(Row(f"hb.{role}.*", "", (role,), _HEARERS) for role in (*KEPT, "shadow")),
    Row("hb.supervisor.*", "", ("supervisor", *KEPT), _HEARERS),
    Row("dead.gen.*", "DEAD", ("generator",), ("dispatcher", "operator")),
    Row("dead.tool.*", "DEAD", ("toolbox",), ("dispatcher", "operator")),
    Row("dead.score.*", "DEAD", ("scorer",), ("dispatcher", "operator")),
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
