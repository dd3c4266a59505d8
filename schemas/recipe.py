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


_Value = bool | int | float | str | list[bool | int | float | str]
OptionTable = dict[str, _Value | dict[str, _Value | dict[str, _Value | dict[str, _Value]]]]
"""What TOML can say of one tool."""


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


class RemoteTool(_Section, frozen=True):
    """A tool that workers of its own serve, in any language (docs/wire.md): all that is known of it here."""

    description: str
    """What the policy is told of it."""
    parameters: str
    """A JSON schema of its arguments, as JSON text."""


class Tools(_Section, frozen=True):
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
    """Tool name to its own options; each may also have `timeout_s`, `observation_chars` and `keep` of its own."""
    remote: dict[str, RemoteTool] = {}
    """By name: tools that are served elsewhere. The policy is shown them after those of `use`."""

    @property
    def names(self) -> list[str]:
        """The tools by name; a tool of one's own has its function's name."""
        return [*(name.rpartition(":")[2] for name in self.use), *self.remote]


class ColdStart(_Section, frozen=True):
    """Supervised fine-tuning before version 0; nothing is admitted before it ends."""

    demonstrations: str = ""
    """`module:function`; `function(seed)` yields conversations (lists of ChatMessage). Empty: no cold start."""
    steps: NonNegative = 0
    batch_size: Positive = 64
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    threads: Positive = 2
    """torch threads; the rest of the machine is idle in this phase."""


class Advantage(_Section, frozen=True):
    """How rewards become advantages; the formulas are in learner/advantages.py and learner/credit.py."""

    estimator: Literal[
        "grpo", "rloo", "opo", "reinforce++", "reinforce++_baseline", "gae", "none"
    ] = "grpo"
    """`none`: the reward plays no part, a teacher does."""
    scale: Literal["none", "group", "batch"] = "none"
    """Divide by the standard deviation of the group's, or of the whole batch's, rewards."""
    credit: Literal["trajectory", "turns", "anchors"] = "trajectory"
    """What an advantage is of: the whole trajectory; each turn, from `turn_<index>` among the reward's parts; or each
    turn among all turns of the group that began from the same observation."""
    discount: Fraction = 1.0
    """Of a later reward, by turn; with `gae` by token."""
    gae_lambda: Fraction = 1.0
    value_learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    """Of the value head that `gae` trains beside the policy."""
    anchor_weight: NonNegativeFloat = 1.0
    overlong_tokens: NonNegative = 0
    """Below `policy.max_tokens` the reward falls over so many tokens, linearly; 0: not at all."""
    overlong_penalty: NonNegativeFloat = 1.0
    """What it has lost at the limit."""


class Loss(_Section, frozen=True):
    """What is minimised; the formulas are in learner/losses.py. `actors train --dry-run` prints the whole as a line."""

    method: Literal["clip", "gspo", "cispo", "dppo", "reinforce"] = "clip"
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.28
    """The ratio is held within [1 - clip_low, 1 + clip_high]."""
    dual_clip: NonNegativeFloat = 0.0
    """The largest ratio of a token with a negative advantage; 0: none."""
    divergence: Literal["tv", "kl"] = "tv"
    divergence_max: Annotated[float, Meta(gt=0)] = 0.15
    """For `dppo`: a token that has moved further takes no step away."""
    clip_cov_fraction: Fraction = 0.0
    """The share of all tokens, of those with a covariance within the bounds, that get no gradient; 0: none."""
    clip_cov_min: float = 1.0
    clip_cov_max: float = 5.0
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant_tokens: NonNegative = 0
    """What `constant` divides each trajectory's sum by; 0: `policy.max_tokens`."""
    entropy: NonNegativeFloat = 0.0
    """The weight of the entropy bonus."""
    mask_truncated: bool = False
    """Trajectories cut off at a limit are compared with, but not trained."""


class Correction(_Section, frozen=True):
    """What is done about the distance between the engine and the learner; learner/corrections.py."""

    proximal: Literal["behaviour", "start", "interpolated"] = "behaviour"
    """The centre of the trust region: the engine's policy; the learner's as the step begins, computed once more; or one
    in between, the nearer to the learner's the older a token is."""
    token: Literal["mask", "truncate", "none"] = "mask"
    """A token whose ratio learner/engine lies outside [ratio_min, ratio_max] is masked; or weights end at ratio_max."""
    ratio_min: NonNegativeFloat = 0.5
    ratio_max: Annotated[float, Meta(gt=1)] = 2.0
    sequence: Literal["geometric", "product", "none"] = "geometric"
    """A trajectory is masked whole when the geometric mean, or the product, of its tokens' ratios lies outside
    [sequence_min, sequence_max]."""
    sequence_min: NonNegativeFloat = 0.8
    sequence_max: Annotated[float, Meta(gt=1)] = 1.25


class Kl(_Section, frozen=True):
    """What the policy is held near to."""

    coefficient: NonNegativeFloat = 0.0
    """The weight of the divergence from the reference; 0: there is none."""
    reference: str = ""
    """A Hugging Face folder; empty: version 0."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"
    weighted: bool = True
    """In the loss: times learner/engine, so that its gradient is that of the divergence; masked tokens take no part."""
    behaviour_coefficient: NonNegativeFloat = 0.0
    """The weight, in the loss, of the divergence from the engine's policy."""


class Teacher(_Section, frozen=True):
    """On-policy distillation: a stronger model says of each sampled token how likely it was."""

    folder: str = ""
    """A Hugging Face folder with the same vocabulary; empty: no teacher."""
    coefficient: Annotated[float, Meta(gt=0)] = 1.0


class Filter(_Section, frozen=True):
    """Which complete groups are not trained; others take their place."""

    zero_variance: bool = True
    """Those whose rewards are all equal."""
    mean_reward: list[float] = []
    """[least, most]: those whose mean reward is not within; empty: none."""


class Lora(_Section, frozen=True):
    """Low-rank adapters (Hu et al. 2021) on version 0, which stays as it is; only they are trained and published."""

    rank: NonNegative = 0
    """0: no adapters, all weights are trained."""
    alpha: Annotated[float, Meta(gt=0)] = 16.0
    """An adapter's product is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of an adapter's input while a step's gradient is computed; the engine has none."""
    target: list[str] = []
    """Modules by the last part of their names, e.g. ["q_proj", "v_proj"]; empty: every linear layer but the head."""


class Learner(_Section, frozen=True):
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
    sessions: Positive = 1000
    """Sessions that one replica keeps between calls (2.8 MB each); beyond it the longest unused is closed, and made
    anew by running its calls again when it is needed."""
    rebuild_s: Seconds = 60.0
    """How long running a lost session's calls again may take before the trajectory fails."""
    imports: list[str] = []
    """Modules that Python code finds already imported (tier `ns`): `import sympy` costs each call 0.3 s otherwise."""


class Scorer(_Section, frozen=True):
    """The reward."""

    reward: str = "exact"
    """A name from rewards/, or `module:function`: `async reward(task, trajectory, run)`."""
    slots: Positive = 8


class Gateway(_Section, frozen=True):
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


class Replicas(_Section, frozen=True):
    """How many processes of each role the supervisor starts; `actors run` adds more."""

    generator: NonNegative = 1
    toolbox: NonNegative = 1
    scorer: NonNegative = 1
    recorder: Annotated[int, Meta(ge=0, le=1)] = 1
    """Writes the archive for analytics, docs/archive.md; a second one would only stand by."""
    gateway: NonNegative = 0
    """`actors serve` starts one at least."""


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
    hang_s: Seconds = 30.0
    """A replica that gives no sign of life, or whose event loop stands still, for so long is killed and replaced."""


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
    gateway: Gateway = Gateway()
    replicas: Replicas = Replicas()
    evaluation: Evaluation = Evaluation()
    deadlines: Deadlines = Deadlines()


def stage_limits_s(deadlines: Deadlines) -> dict[str, float]:
    """The deadline of each stage, by its name."""
    return {"gen": deadlines.gen_s, "tool": deadlines.tool_s, "score": deadlines.score_s}
