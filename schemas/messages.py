"""What travels beside the log: wake-ups, pointers, signs of life. Losing any of these loses no fact."""

from typing import Literal

import msgspec

from schemas.events import Boundary
from schemas.trajectory import Trajectory

RoleName = Literal[
    "dispatcher", "generator", "toolbox", "scorer", "learner", "recorder", "supervisor"
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


class WeightsPointer(msgspec.Struct, frozen=True, kw_only=True):
    """Which policy is current; the learner writes it, generators, dispatcher and evaluation read it."""

    policy_version: int
    weights_sha256: str
    """The name of a safetensors object in the weights store."""
    assets_sha256: str
    """The name of an object that holds the model's other files (configuration, tokenizer)."""


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
