"""What travels beside the log: wake-ups, pointers, signs of life. Losing any of these loses no fact."""

from typing import Literal

import msgspec

from schemas.events import Boundary, Cause, Result
from schemas.trajectory import Trajectory

RoleName = Literal[
    "dispatcher",
    "generator",
    "toolbox",
    "scorer",
    "learner",
    "shadow",
    "recorder",
    "gateway",
    "supervisor",
]


class Work(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Take this trajectory's next hop. Made by whoever's hop came before, or by the dispatcher's sweep."""

    trajectory: str
    seq: int
    """The log sequence that the trajectory was folded to."""
    state: Trajectory | None = None
    """None above the size limit: the receiver folds from the log."""
    failures: int = 0
    """Handler failures of this hop so far."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A toolbox asks the one that holds a session to run the trajectory's next call in it, and asks until it has."""

    id: str
    holder: str
    """Which replica is meant: another one that still listens keeps silent."""
    work: bytes = b""
    """A `Work`, in its own bytes; empty when it is asked again."""
    run: bool = True
    """False: run nothing, only say what came of the call."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the holder says. None of it: it does not hold the session, or knows nothing of the call."""

    at_work: bool = False
    """Ask again."""
    result: Result | None = None
    """For whoever asked to append."""
    cause: Cause | None = None
    """Why there is none."""


class Bookmark(msgspec.Struct, frozen=True, kw_only=True):
    """What a dispatcher need not read the log's beginning for: all that was admitted before it has ended.

    Dispatchers write and read it. It is a cache of the log: without it, the whole log is read.
    """

    seq: int
    """Read on after this sequence."""
    next_row: int
    lost_rows: list[int]
    repeats: dict[str, int]
    evaluated: list[int]
    """Versions whose evaluation is admitted whole."""
    evaluations: list[str]
    """Evaluations admitted of other versions."""
    steps_begun: int
    steps_done: int
    recent: list[str]
    """How the last trajectories ended; see `Dispatcher.failing_cause`."""


class WeightsPointer(msgspec.Struct, frozen=True, kw_only=True):
    """Which policy is current; the learner writes it, generators, dispatcher and evaluation read it."""

    policy_version: int
    weights_sha256: str
    """The name of a safetensors object in the weights store."""
    assets_sha256: str
    """The name of an object that holds the model's other files (configuration, tokenizer)."""
    base_sha256: str = ""
    """The name of the object with the weights that these are adapters of; empty: these are whole."""


class ModelAssets(msgspec.Struct, frozen=True, kw_only=True):
    """A Hugging Face folder without its weights."""

    files: dict[str, bytes]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One thing a replica is working on."""

    trajectory: str
    stage: str
    for_s: float


StallKind = Literal[
    "no_replica", "silent", "blocked", "held", "lost", "queue", "learner", "dispatcher"
]


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """Something that stands still longer than it should. Made by the watchdog; `ps` and the terminal show it."""

    kind: StallKind
    subject: str
    """Which replica, role, trajectory or queue."""
    detail: str
    """What stands still, where, and who has it."""
    for_s: float

    def __str__(self) -> str:
        return f"{self.detail}, for {self.for_s:.0f} s"


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """A replica is alive; once a second on `hb.<role>.<replica>`, from a thread of its own."""

    run: str
    role: RoleName
    replica: str
    host: str
    pid: int
    up_s: float
    phase: str = ""
    """What it is doing when that is no trajectory, e.g. `cold start 120/400`."""
    policy_version: int = -1
    held: list[Held] = []
    held_count: int = 0
    loop_lag_s: float = 0.0
    """How long ago its event loop last ran; the thread sees what the loop cannot tell."""
    rss_bytes: int = 0
    stalls: list[Stall] = []
    """What the acting dispatcher, or a supervisor, sees stand still."""
    metrics: str = ""
    """Where it answers Prometheus, as host:port."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that no handler could take, with why."""

    stage: str
    run: str
    error: str
    payload: bytes
    trajectory: str = ""
    seq: int = 0
    boundary: Boundary = "bus"
    code: str = "bad_message"
    replica: str = ""
