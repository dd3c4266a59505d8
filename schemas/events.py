"""What the log holds, in the order it happens. An event says what happened and is never changed.

Of a trajectory, on `log.<run>.t.<trajectory>.<kind>`:

    admitted → turn → result → turn → … → scored            (train)
                                       … → evaluated          (eval)
                                       … → finished           (external)
    or it ends in expired, failed or dropped.

Of a learner, on `log.<run>.l.<learner>.<kind>`: warmed*, then filtered* and step → stepped, again and again; of one
that trains beside the main one, on the same steps: joined, then step → stepped.
Of the run, on `log.<run>.r.<kind>`: opened, tooladded, toolremoved, paused, resumed, stopping, ended, archived.

The kind is a class's name in lower case; it travels as the field `kind` and as the last token of the subject.
New fields need defaults, and no field changes its type: then old and new processes can talk.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from schemas.images import StoredImage
from schemas.recipe import OptionTable, Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens

Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """The base of everything in the log."""

    replica: str = ""
    """Who made it: `<role>-<host>-<pid>`."""

    @property
    def kind(self) -> str:
        """The last token of its subject."""
        return str(self.__struct_config__.tag)


# -- of a trajectory -------------------------------------------------------------------------------


class TrajectoryEvent(Event, frozen=True, kw_only=True):
    """The base of what happens to one trajectory."""

    trajectory: str
    """`<group>-<member>-<attempt>`."""


class Admitted(TrajectoryEvent, frozen=True, kw_only=True):
    """The dispatcher lets a trajectory begin; everyone reads it."""

    task: str
    """The id of the data row."""
    public: PublicPart
    private_key: str
    """Where scorers find the row's private part."""
    purpose: Literal["train", "eval", "external"] = "train"
    """`external`: its policy is elsewhere, and a gateway writes down its turns."""
    min_policy_version: int = 0
    """A generator loads at least this version before it samples."""
    pinned_policy_version: int | None = None
    """For eval: exactly this version samples."""
    temperature: float = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Derived from the run's seed, the group, the member and the attempt."""


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tool call that the policy wrote."""

    tool: str
    arguments: dict[str, Any]
    version: str = ""
    """Of the tool, as `tooladded` says, and no other runs it; empty for a tool of the recipe."""

    @property
    def queue(self) -> str:
        """Where it waits: `<tool>`, or `<tool>@<version>`."""
        return tool_queue(self.tool, self.version)


def tool_queue(tool: str, version: str) -> str:
    """What the queue of one version of a tool is called."""
    return f"{tool}@{version}" if version else tool


class Turn(TrajectoryEvent, frozen=True, kw_only=True):
    """A generator's hop: the tokens given since the last turn, then the tokens sampled."""

    tokens: Tokens
    text: str
    """What was sampled, decoded for people, parsers and rewards; never tokenised again."""
    calls: list[Call] = []
    feedback: str = ""
    """What the policy is told instead of a result, when its calls could not be read."""
    finish_reason: Literal["stop", "length", "partial"] = "stop"
    """`length`: at a limit of tokens, or it would have gone on and had no turn left; `partial`: cut by a drain or a
    weight policy, and another replica goes on from here."""
    last: bool = False
    """Nothing follows but the score."""


class Started(TrajectoryEvent, frozen=True, kw_only=True):
    """A toolbox is about to act on the world outside (tools marked `effects="external"`)."""

    turn: int
    call: int


class Result(TrajectoryEvent, frozen=True, kw_only=True):
    """A toolbox's hop: what one call of the last turn returned. A tool's own error is a result too."""

    turn: Index
    call: Index
    """Indices of the turn and of the call within it."""
    text: str
    ok: bool = True
    """False when the tool reports an error to the policy (an exception, a time-out of its code)."""
    duration_ms: float = 0.0
    tier: str = ""
    """The sandbox tier that ran it."""
    images: list[StoredImage] = []
    """One for each placeholder in the text, in order; those beyond come after it."""
    handed_in: bytes = b""
    """What the tool has for the reward and not for the policy, as a patch."""
    last: bool = False
    """Nothing follows but the score."""


class Scored(TrajectoryEvent, frozen=True, kw_only=True):
    """A scorer's hop on a training trajectory. Numbers only, never expected values."""

    reward: float
    parts: dict[str, float] = {}


class Evaluated(TrajectoryEvent, frozen=True, kw_only=True):
    """A scorer's hop on an evaluation trajectory; terminal."""

    reward: float
    parts: dict[str, float] = {}


class Expired(TrajectoryEvent, frozen=True, kw_only=True):
    """The dispatcher ends a trajectory too stale to train, or left over at the end of a run; terminal."""

    reason: str


Boundary = Literal["engine", "tool", "sandbox", "scorer", "bus", "deadline", "recipe"]


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why infrastructure failed, by the boundary where it did."""

    boundary: Boundary
    code: str
    """A short stable name, e.g. `no_workers`."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.boundary}.{self.code}"


class Failed(TrajectoryEvent, frozen=True, kw_only=True):
    """The dispatcher ends a trajectory that infrastructure broke; never a reward; terminal."""

    cause: Cause


class Dropped(TrajectoryEvent, frozen=True, kw_only=True):
    """The dispatcher ends a member of a group that cannot be completed; terminal."""

    reason: str


class Finished(TrajectoryEvent, frozen=True, kw_only=True):
    """A gateway ends an external trajectory: whoever trains on it asks for no more; terminal."""

    reason: str


# -- of a learner ----------------------------------------------------------------------------------


class Warmed(Event, frozen=True, kw_only=True):
    """A stretch of the supervised cold start, for its metric rows."""

    step: int
    steps: int
    metrics: dict[str, float]


class Filtered(Event, frozen=True, kw_only=True):
    """A complete group that will not be trained; the dispatcher fills its slot again."""

    group: str
    reason: Literal["zero_variance", "range", "stale", "surplus"]
    trajectories: list[str]


class Step(Event, frozen=True, kw_only=True):
    """Appended *before* the optimizer step: everything needed to do it again."""

    step: int
    """1 for the first."""
    start_version: int
    """The policy version that the step updates."""
    trajectories: list[str]
    """In batch order, members of a group side by side."""
    filtered: list[str] = []
    """Groups filtered since the last step; each has its own `filtered` event."""
    seed: int = 0
    threads: int = 1


class Joined(Event, frozen=True, kw_only=True):
    """A learner beside the main one begins; the first event of its log. It trains the main one's steps, and no more."""

    overrides: list[str]
    """What it changes of the run's recipe, as `key=value`."""


class Stepped(Event, frozen=True, kw_only=True):
    """Appended after the optimizer step and before the weights are published."""

    step: int
    policy_version: int
    """The version that the step made."""
    weights_sha256: str
    metrics: dict[str, Any]
    """One row of metrics.jsonl."""
    batch_sha256: str = ""
    """Of the batch as it was trained, by learner/samples.py: whoever folds the log again can compare."""


# -- of the run ------------------------------------------------------------------------------------


class Opened(Event, frozen=True, kw_only=True):
    """The first event of a run: the recipe as resolved. A later one is a resume with changes."""

    recipe: Recipe
    recipe_dir: str = ""
    """Where `module:function` names of the recipe are looked up, besides the import path."""


class ShownFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function of a tool, as the policy is shown it."""

    name: str
    description: str
    parameters: dict[str, Any]
    """A JSON schema of its arguments, an object."""


class ToolAdded(Event, frozen=True, kw_only=True):
    """The policy may call a tool from now on. It replaces one of its name, by which calls in the log are finished."""

    tool: str
    version: str
    """The first digits of a hash of all that follows."""
    functions: list[ShownFunction]
    use: str = ""
    """What toolboxes run, a name as in the recipe's `tools.use`; empty: it is served elsewhere."""
    source: str = ""
    """Python that defines the function `use`; empty: it is built in, or from an installed package."""
    options: OptionTable = {}

    @property
    def queue(self) -> str:
        """Where its calls wait."""
        return tool_queue(self.tool, self.version)


class ToolRemoved(Event, frozen=True, kw_only=True):
    """The policy may call a tool no more. Calls in the log are finished."""

    tool: str


class Paused(Event, frozen=True, kw_only=True):
    """Stop admitting; what is in flight goes on."""


class Resumed(Event, frozen=True, kw_only=True):
    """Admit again."""


class Stopping(Event, frozen=True, kw_only=True):
    """Drain and stop; `train --run` goes on from here."""

    reason: str


class Ended(Event, frozen=True, kw_only=True):
    """The run reached its end; nothing is admitted any more."""

    reason: str


class Archived(Event, frozen=True, kw_only=True):
    """The run is closed, and what the log held of it is in a file; only the run's own events stay."""

    messages: int
    sha256: str
    """As the file's last frame says; see actors/archive.py."""
    log_seq: int
    """The last sequence of the log in it."""


AnyTrajectoryEvent = (
    Admitted | Turn | Started | Result | Scored | Evaluated | Expired | Failed | Dropped | Finished
)
AnyLearnerEvent = Joined | Warmed | Filtered | Step | Stepped
AnyRunEvent = Opened | ToolAdded | ToolRemoved | Paused | Resumed | Stopping | Ended | Archived
AnyEvent = AnyTrajectoryEvent | AnyLearnerEvent | AnyRunEvent

TERMINAL = (Evaluated, Expired, Failed, Dropped, Finished)
"""After one of these nothing follows. `Scored` is not among them: it is then trained, filtered or dropped."""

OWNERS: dict[type[Event], str] = {
    Admitted: "dispatcher",
    Turn: "generator",
    Started: "toolbox",
    Result: "toolbox",
    Scored: "scorer",
    Evaluated: "scorer",
    Expired: "dispatcher",
    Failed: "dispatcher",
    Dropped: "dispatcher",
    Finished: "gateway",
    Joined: "learner",
    Warmed: "learner",
    Filtered: "learner",
    Step: "learner",
    Stepped: "learner",
    Opened: "supervisor",
    ToolAdded: "operator",
    ToolRemoved: "operator",
    Paused: "operator",
    Resumed: "operator",
    Stopping: "operator",
    Ended: "dispatcher",
    Archived: "operator",
}
"""The role that may append each kind."""

EXTERNAL = (Admitted, Turn, Finished)
"""What a gateway may append, of external trajectories."""
