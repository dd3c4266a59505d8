"""What to train: a recipe, read from TOML and carried by the run's first event.

Every key has one meaning and a default; unknown keys are refused. `module:function` names are looked up on the
import path and in the recipe's own folder.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of every table of a recipe."""


class Policy(_Section, frozen=True):
    """The model that learns, and how a conversation with it is shaped."""

    model: str
    """A Hugging Face folder or hub name, or `module:function` of a source that writes such a folder once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_turns: Positive = 4
    """The turn at which a trajectory ends even if it still calls tools."""
    max_turn_tokens: Positive = 256
    """Sampled tokens of one turn."""
    max_tokens: Positive = 4096
    """Tokens of a whole trajectory, given and sampled."""
    observation_role: Literal["tool", "user"] = "tool"
    """The chat role in which the policy sees a tool's result."""


class Sampling(_Section, frozen=True):
    """How training trajectories are sampled; evaluation has its own temperature."""

    temperature: Annotated[float, Meta(gt=0)] = 1.0


class Data(_Section, frozen=True):
    """The tasks: a file, or a function that makes them."""

    path: str = ""
    """`*.jsonl` or `*.parquet`, relative to the recipe, or `hf:<dataset>[:<split>]`; rows as in schemas/task.py."""
    rows: str = ""
    """`module:function`; `function(seed)` yields TaskRow or the same as dicts. Instead of `path`."""
    shuffle: bool = True
    """Another order each epoch, from the run's seed. For `path` only."""


class Tools(_Section, frozen=True):
    """What the policy may call, and how it writes a call."""

    use: list[str] = []
    """Tool names, or `module:function` of your own."""
    format: Literal["tagged"] = "tagged"
    """`tagged`: `<python>…</python>`, the tag being the tool's name unless `tags` says otherwise."""
    tags: dict[str, str] = {}
    """Tool name to tag."""
    tier: Literal["auto", "ns", "unsafe"] = "auto"
    """The sandbox tier; `auto` takes the strongest that passes its own attack test and refuses otherwise."""
    timeout_s: Seconds = 10.0
    """Wall clock of one call of the policy's code."""
    observation_chars: Positive = 4000
    """A longer result is cut in the middle, and says so."""

    @property
    def names(self) -> list[str]:
        """The tools by name; a tool of one's own has its function's name."""
        return [name.rpartition(":")[2] for name in self.use]


class ColdStart(_Section, frozen=True):
    """Supervised fine-tuning before version 0; nothing is admitted before it ends."""

    demonstrations: str = ""
    """`module:function`; `function(seed)` yields conversations (lists of ChatMessage). Empty: no cold start."""
    steps: NonNegative = 0
    batch_size: Positive = 64
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    threads: Positive = 2
    """torch threads; the rest of the machine is idle in this phase."""


class Learner(_Section, frozen=True):
    """The optimisation. One optimizer step per batch."""

    steps: NonNegative = 100
    groups_per_step: Positive = 16
    """Groups trained in a step (zero-variance groups are not among them)."""
    group_size: Annotated[int, Meta(ge=2)] = 8
    refill_limit: Annotated[float, Meta(ge=1)] = 3.0
    """A step closes at `groups_per_step` groups with signal, or, with at least one, when `refill_limit` times as many
    groups have completed since the last step."""
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-5
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.28
    ratio_min: NonNegativeFloat = 0.5
    ratio_max: Annotated[float, Meta(gt=1)] = 2.0
    """A token whose ratio learner/engine lies outside [ratio_min, ratio_max] is masked."""
    microbatch_tokens: Positive = 8192
    """Tokens of one packed forward and backward pass."""
    threads: Positive = 1
    """torch threads."""
    checkpoint_every_steps: Positive = 10


class Asynchrony(_Section, frozen=True):
    """How far sampling may run ahead of learning."""

    max_staleness: NonNegative = 4
    """Version being updated minus the oldest sampled token's version; 0 is on-policy."""
    straggler_wait_s: NonNegativeFloat = 10.0
    """How long the learner waits for live trajectories that its next step would make too stale."""
    barriers: bool = False
    """Batch-synchronous, for comparison: a barrier after each hop of a batch, and after each batch."""


class Generator(_Section, frozen=True):
    """The engine that samples."""

    engine: Literal["transformers", "scripted"] = "transformers"
    script: str = ""
    """For `scripted`: `module:function`; see engines/scripted.py."""
    slots: Positive = 64
    """Trajectories that one replica samples at once."""
    threads: Positive = 1
    """torch threads."""
    weight_swap: Literal["token", "turn"] = "token"
    """New weights are taken between two tokens of running turns, or after they end."""


class Toolbox(_Section, frozen=True):
    """The executors of tool calls."""

    slots: Positive = 8
    """Calls that one replica runs at once."""


class Scorer(_Section, frozen=True):
    """The reward."""

    reward: str = "exact"
    """A name from rewards/, or `module:function`: `async reward(task, trajectory, run)`."""
    slots: Positive = 8


class Replicas(_Section, frozen=True):
    """How many processes of each role the supervisor starts; `actors run` adds more."""

    generator: NonNegative = 1
    toolbox: NonNegative = 1
    scorer: NonNegative = 1


class Evaluation(_Section, frozen=True):
    """Held-out tasks, sampled by one pinned version; never trained on."""

    path: str = ""
    rows: str = ""
    """As in `data`; without either there is no evaluation."""
    limit: Positive = 128
    """The first rows taken."""
    every_steps: NonNegative = 0
    """0: only before the first step and after the last."""
    temperature: NonNegativeFloat = 0.0


class Deadlines(_Section, frozen=True):
    """How long a stage may take without a new event before the sweep acts."""

    gen_s: Seconds = 120.0
    tool_s: Seconds = 60.0
    score_s: Seconds = 60.0
    sweeps: Positive = 3
    """Times that a work message is sent again before the trajectory fails."""
    handler_failures: Positive = 3
    """Failures of a handler (kills do not count) before it fails with their cause."""
    drain_s: Seconds = 10.0
    """How long a replica that was told to stop may take to finish or hand back what it holds."""


class Recipe(_Section, frozen=True):
    """A whole run."""

    policy: Policy
    name: str = ""
    """The run's default name; empty: the file's name."""
    seed: int = 0
    data: Data = Data()
    sampling: Sampling = Sampling()
    tools: Tools = Tools()
    cold_start: ColdStart = ColdStart()
    learner: Learner = Learner()
    asynchrony: Asynchrony = Asynchrony()
    generator: Generator = Generator()
    toolbox: Toolbox = Toolbox()
    scorer: Scorer = Scorer()
    replicas: Replicas = Replicas()
    evaluation: Evaluation = Evaluation()
    deadlines: Deadlines = Deadlines()
