"""What to train: a recipe, read from TOML and carried by the run's first event.

Every key has one meaning and a default; unknown keys are refused. `module:function` names are looked up on the
import path and in the recipe's own folder.
"""

from typing import Annotated, Literal

from msgspec import Meta

from schemas.algorithm import Advantage, Correction, Filter, Kl, Loss, Teacher
from schemas.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Seconds,
    Section,
)

_Value = bool | int | float | str | list[bool | int | float | str]
OptionTable = dict[str, _Value | dict[str, _Value | dict[str, _Value | dict[str, _Value]]]]
"""What TOML can say of one tool."""


class Policy(Section, frozen=True):
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


class Sampling(Section, frozen=True):
    """How training trajectories are sampled; evaluation has its own temperature."""

    temperature: Annotated[float, Meta(gt=0)] = 1.0


class Data(Section, frozen=True):
    """The tasks: a file, or a function that makes them."""

    path: str = ""
    """`*.jsonl` or `*.parquet`, relative to the recipe, or `hf:<dataset>[:<split>]`; rows as in schemas/task.py."""
    rows: str = ""
    """`module:function`; `function(seed)` yields TaskRow or the same as dicts. Instead of `path`."""
    shuffle: bool = True
    """Another order each epoch, from the run's seed. For `path` only."""


class RemoteTool(Section, frozen=True):
    """A tool that workers of its own serve, in any language (docs/wire.md): all that is known of it here."""

    description: str
    """What the policy is told of it."""
    parameters: str
    """A JSON schema of its arguments, as JSON text."""


class Tools(Section, frozen=True):
    """What the policy may call, and how it writes a call."""

    use: list[str] = []
    """Tool names, or `module:function` of your own."""
    format: Literal["tagged", "hermes", "fenced", "llama", "json", "template"] = "tagged"
    """`tagged`: `<python>…</python>`, the tag being the function's name unless `tags` says otherwise; `fenced`: code
    blocks by their first word; `hermes`: `<tool_call>{…}</tool_call>`; `llama`, `json`: a bare object, `parameters`
    or `arguments`; `template`: as the chat template writes calls, which also shows the policy the functions."""
    tags: dict[str, str] = {}
    """Function name to tag, or to a code block's first word."""
    show: Literal["none", "template", "system"] = "none"
    """How the policy learns what it may call: only from the task's messages; through the chat template; or written into
    the system message."""
    stop_after_call: bool = True
    """A turn ends with its first call, where the format has an end to stop at; else the policy ends it."""
    tier: Literal["auto", "ns", "landlock", "docker", "unsafe"] = "auto"
    """The sandbox tier; `auto` takes the strongest that passes its own attack test and refuses otherwise."""
    timeout_s: Seconds = 10.0
    """Wall clock of one call of the policy's code."""
    observation_chars: Positive = 4000
    """A longer result is cut, and says so; an image and its placeholder stay whole."""
    keep: Literal["auto", "head", "tail", "both"] = "auto"
    """Which side of it stays; `auto`: the tool says, and most keep both."""
    options: dict[str, OptionTable] = {}
    """Tool name to its own options; each may also have `timeout_s`, `observation_chars`, `keep` and `imports` of its
    own."""
    remote: dict[str, RemoteTool] = {}
    """By name: tools that are served elsewhere. The policy is shown them after those of `use`."""

    @property
    def names(self) -> list[str]:
        """The tools by name; a tool of one's own has its function's name."""
        return [*(name.rpartition(":")[2] for name in self.use), *self.remote]


class ColdStart(Section, frozen=True):
    """Supervised fine-tuning before version 0; nothing is admitted before it ends."""

    demonstrations: str = ""
    """`module:function`; `function(seed)` yields conversations (lists of ChatMessage). Empty: no cold start."""
    steps: NonNegative = 0
    batch_size: Positive = 64
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    threads: Positive = 2
    """torch threads; the rest of the machine is idle in this phase."""


class Lora(Section, frozen=True):
    """Low-rank adapters (Hu et al. 2021) on version 0, which stays as it is; only they are trained and published."""

    rank: NonNegative = 0
    """0: no adapters, all weights are trained."""
    alpha: Annotated[float, Meta(gt=0)] = 16.0
    """An adapter's product is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of an adapter's input while a step's gradient is computed; the engine has none."""
    target: list[str] = []
    """Modules by the last part of their names, e.g. ["q_proj", "v_proj"]; empty: every linear layer but the head."""


class Learner(Section, frozen=True):
    """The optimisation."""

    steps: NonNegative = 100
    groups_per_step: Positive = 16
    """Groups trained in a step (filtered groups are not among them)."""
    group_size: Annotated[int, Meta(ge=2)] = 8
    refill_limit: Annotated[float, Meta(ge=1)] = 3.0
    """A step closes at `groups_per_step` groups with signal, or, with at least one, when `refill_limit` times as many
    groups have completed since the last step."""
    updates_per_step: Positive = 1
    """Optimizer updates of a step, each on its share of the groups."""
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-5
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    microbatch_tokens: Positive = 8192
    """Tokens of one packed forward and backward pass."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of being kept: less memory, about a third more time."""
    threads: Positive = 1
    """torch threads; of each rank."""
    ranks: Positive = 1
    """Processes that train together, by DeepSpeed, each on a GPU of its own where there are GPUs."""
    zero_stage: Literal[1, 2, 3] = 1
    """What each rank holds only its share of: the optimizer's state; the gradient too; the weights too."""
    offload: Literal["none", "optimizer", "weights"] = "none"
    """What the GPU's share waits for its turn in the machine's memory; `weights`: they and the optimizer's state."""
    hostfile: str = ""
    """DeepSpeed's list of hosts, `<host> slots=<ranks>` a line, this machine first; empty: all ranks are here."""
    checkpoint_every_steps: Positive = 10
    checkpoints_kept: Positive = 2
    """Newest checkpoints that stay; beside them that of step 0, from which a run can be replayed, and the best."""
    best_checkpoints_kept: NonNegative = 1
    best_by: Literal["reward", "evaluation"] = "reward"
    """What is best: the mean reward of the step, or the held-out mean of the version that it made."""
    weights_kept: Positive = 4
    """Newest versions of the weights that stay in the store; beside them the first, and what evaluations need."""
    advantage: Advantage = Advantage()
    loss: Loss = Loss()
    correction: Correction = Correction()
    kl: Kl = Kl()
    teacher: Teacher = Teacher()
    filter: Filter = Filter()
    lora: Lora = Lora()

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed holds the model, and not torch alone."""
        return self.ranks > 1 or self.offload != "none"


class Asynchrony(Section, frozen=True):
    """How far sampling may run ahead of learning."""

    max_staleness: NonNegative = 4
    """Version being updated minus the oldest sampled token's version; 0 is on-policy."""
    straggler_wait_s: NonNegativeFloat = 10.0
    """How long the learner waits for live trajectories that its next step would make too stale."""
    barriers: bool = False
    """Batch-synchronous, for comparison: a barrier after each hop of a batch, and after each batch."""


class Generator(Section, frozen=True):
    """The engine that samples."""

    engine: Literal["transformers", "vllm", "scripted"] = "transformers"
    script: str = ""
    """For `scripted`: `module:function`; see engines/scripted.py."""
    slots: Positive = 64
    """Trajectories that one replica samples at once."""
    threads: Positive = 1
    """torch threads."""
    weight_swap: Literal["token", "turn"] = "token"
    """New weights are taken between two tokens of running turns, or after they end."""


class Toolbox(Section, frozen=True):
    """The executors of tool calls."""

    slots: Positive = 8
    """Calls that one replica runs at once."""
    sessions: Positive = 1000
    """Sessions that one replica keeps between calls; beyond it the longest unused is closed, and made anew by running
    its calls again when it is needed."""
    sessions_mb: Positive = 4096
    """MiB that they may take together (2 each that has imported nothing); beyond it the same happens."""
    rebuild_s: Seconds = 60.0
    """How long running a lost session's calls again may take before the trajectory fails."""
    imports: list[str] = []
    """Modules that Python code finds already imported (tier `ns`): `import sympy` costs each call 0.3 s otherwise. A
    tool's own `imports`, in its options, take their place."""


class Scorer(Section, frozen=True):
    """The reward."""

    reward: str = "exact"
    """A name from rewards/, or `module:function`: `async reward(task, trajectory, run)`."""
    slots: Positive = 8


class Gateway(Section, frozen=True):
    """The door for other trainers: VerlTool's tool server over this run's toolboxes; docs/verltool.md."""

    host: str = "127.0.0.1"
    """The address it listens on. Whoever reaches it may run code in the sandboxes."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 5000
    """Each replica takes the first that is free of this and the next 15; 0: any."""
    slots: Positive = 1024
    """Actions that one replica has under way at once."""
    waiting: NonNegative = 10_000
    """Further ones that wait for a slot; a request beyond them is answered with 503 and `Retry-After`."""
    idle_s: Seconds = 3600.0
    """A trajectory of which nothing is asked for so long has expired, and its sessions are closed."""
    done_if_invalid: bool = False
    """Whether an action in which no call is found ends its trajectory."""


class Replicas(Section, frozen=True):
    """How many processes of each role the supervisor starts; `actors run` adds more."""

    generator: NonNegative = 1
    toolbox: NonNegative = 1
    scorer: NonNegative = 1
    recorder: Annotated[int, Meta(ge=0, le=1)] = 1
    """Writes the archive for analytics, docs/archive.md; a second one would only stand by."""
    gateway: NonNegative = 0
    """`actors serve` starts one at least."""


class Evaluation(Section, frozen=True):
    """Held-out tasks, sampled by one pinned version; never trained on."""

    path: str = ""
    rows: str = ""
    """As in `data`; without either there is no evaluation."""
    limit: Positive = 128
    """The first rows taken."""
    every_steps: NonNegative = 0
    """0: only before the first step and after the last."""
    temperature: NonNegativeFloat = 0.0


class Deadlines(Section, frozen=True):
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
    hang_s: Seconds = 30.0
    """A replica that gives no sign of life, or whose event loop stands still, for so long is killed and replaced."""


class Nats(Section, frozen=True):
    """The servers of the bus."""

    replicas: Literal[1, 3, 5] = 1
    """How many of them hold each stream: of 3 any one may die, of 5 any two. What a stream has does not get fewer."""
    analytics_sees_answers: bool = False
    """Whether the login `analytics` may read answers too, at the server that is started for the run."""


class Recipe(Section, frozen=True):
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
    gateway: Gateway = Gateway()
    replicas: Replicas = Replicas()
    evaluation: Evaluation = Evaluation()
    deadlines: Deadlines = Deadlines()
    nats: Nats = Nats()


def stage_limits_s(deadlines: Deadlines) -> dict[str, float]:
    """The deadline of each stage, by its name."""
    return {"gen": deadlines.gen_s, "tool": deadlines.tool_s, "score": deadlines.score_s}
