"""The model that learns and its optimizer: batches in, one optimizer step, weights out.

Weights are held in float32 whatever `policy.dtype` is: an update at a learning rate of 1e-6 is lost in bfloat16.
With `bfloat16` the weights that leave are in bfloat16, and so are matrix products where the hardware has them (a
processor without them is 2.5 times faster in float32, measured).

The same batch, weights, optimizer state and number of torch threads give the same bits. Threads are the process's
own affair: call `torch.set_num_threads` before.

Shapes: K sampled tokens of a micro-batch, N of the whole batch.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from transformers import AutoTokenizer

from learner.batch import Survey, Tokens, tokens_of
from learner.checkpoints import write_folder
from learner.errors import BadCheckpoint, LearnerError, NotFinite
from learner.logprobs import TokenLogprobs, refuse_unless_packable, sampled_logprobs
from learner.models import ValueHead, fastest_dtype, load_frozen, load_model
from learner.objective import MicroLoss, Objective
from learner.pack import Masked, MicroBatch, pack
from learner.samples import Sample
from schemas.recipe import Recipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")

_VALUE_HEAD = "value_head."
"""Before the names of its parameters, in a checkpoint."""

LossOf = Callable[[MicroBatch], MicroLoss]


class _Saved(NamedTuple):
    """A checkpoint as read, and found to fit."""

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[torch.Tensor, dict[str, torch.Tensor]]
    generators: dict[str, torch.Tensor]
    value_head: dict[str, torch.Tensor]


class Policy:
    """A Hugging Face causal model under AdamW."""

    def __init__(self, folder: Path, model: Any, config: Recipe) -> None:
        """Take over a float32 model; `Policy.open` makes one. Raises UnsupportedModel."""
        refuse_unless_packable(model, config.policy.max_tokens)
        self.folder = folder
        """Where the model came from; its configuration and tokenizer are read there."""
        self.config = config
        self.model = model.eval()  # no dropout: the engine, with which we compare, has none
        self.dtype = _DTYPES[config.policy.dtype]
        """Of the weights that leave."""
        self._product_dtype = fastest_dtype(self.dtype, model.device)
        self._width: int = model.config.get_text_config().hidden_size
        self.value_head: ValueHead | None = None
        if config.learner.advantage.estimator == "gae":
            self.value_head = ValueHead(self._width).to(model.device)
        self._reference: Any = None
        self._teacher: Any = None
        self.optimizer: torch.optim.AdamW
        self.restart_optimizer()

    @classmethod
    def open(cls, folder: Path, config: Recipe, device: str = "auto") -> Self:
        """Load a Hugging Face folder with its weights.

        `device`: `auto` takes a GPU if there is one. Raises UnsupportedModel.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder, load_model(folder).to(device), config)

    def restart_optimizer(self) -> None:
        """Forget the optimizer's moments, as between the cold start and reinforcement learning."""
        decay = self.config.learner.weight_decay
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": decay},
                {"params": vectors, "weight_decay": 0.0},  # norms and biases keep their scale
                *(
                    [{"params": list(self.value_head.parameters()), "weight_decay": 0.0}]
                    if self.value_head
                    else []
                ),
            ],
            lr=0.0,
            fused=True,
        )

    def hold_reference(self, folder: Path) -> None:
        """The model that `kl.coefficient` keeps the policy near to. Raises UnsupportedModel."""
        self._reference = load_frozen(folder, self.model)

    def hold_teacher(self, folder: Path) -> None:
        """The model that the policy is distilled from. Raises UnsupportedModel."""
        self._teacher = load_frozen(folder, self.model)

    # -- steps -------------------------------------------------------------------------------------

    def train_step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """One step on whole groups; `step` counts from 1, is the version it makes, and sets the learning rate.

        Returns loss, grad_norm, learning_rate, train_tokens, computed_tokens; as means over all sampled tokens
        entropy, kl_behaviour, is_ratio_mean, masked_token_fraction, clip_fraction, and where the recipe has them
        kl_reference, value_loss; and what `Objective.metrics` names. Of several updates the means.
        Raises NotFinite, and LearnerError when nothing was sampled; then that update changed nothing.
        """
        for sample in (sample for group in groups for sample in group):
            for reward in (sample.reward, *sample.turn_rewards):
                if not math.isfinite(reward):
                    raise NotFinite(step, f"the reward of {sample.trajectory}", reward)
        if not any(sample.sampled_count for group in groups for sample in group):
            raise LearnerError(f"step {step}: the batch has no sampled token")
        tokens = tokens_of(groups, step, self.config, self._survey(groups))
        updates = min(self.config.learner.updates_per_step, len(groups))
        rows, first = [], 0
        for update in range(updates):
            part = groups[update * len(groups) // updates : (update + 1) * len(groups) // updates]
            end = first + sum(sample.sampled_count for group in part for sample in group)
            if first < end:
                rows.append(self._update(part, tokens.part(first, end), step))
            first = end
        return rows[0] if len(rows) == 1 else _of_updates(rows)

    def _update(
        self, groups: Sequence[Sequence[Sample]], tokens: Tokens, step: int
    ) -> dict[str, float]:
        """One optimizer update."""
        config = self.config
        objective = Objective(config, tokens, (config.seed, step))

        def loss_of(batch: MicroBatch) -> MicroLoss:
            now = self._logprobs(
                self.model, batch, entropy_gradient=config.learner.loss.entropy > 0
            )
            values_K = self.value_head(now.hidden_KH) if self.value_head else None
            return objective(batch, now, values_K)

        row = self._step(groups, loss_of, step, self._learning_rate(step), objective.divisor)
        return row | objective.metrics()

    def _logprobs(
        self, model: Any, batch: MicroBatch, entropy_gradient: bool = False
    ) -> TokenLogprobs:
        temperature = self.config.sampling.temperature
        return sampled_logprobs(model, batch, temperature, self._product_dtype, entropy_gradient)

    @torch.no_grad()
    def _survey(self, groups: Sequence[Sequence[Sample]]) -> Survey:
        """Ask the models that the recipe's loss compares with, and no other."""
        learner = self.config.learner
        models: dict[str, Any] = {}
        if learner.correction.proximal == "start":
            models["start_N"] = self.model
        if learner.kl.coefficient:
            models["reference_N"] = self._reference
        if learner.teacher.folder:
            models["teacher_N"] = self._teacher
        if missing := [name for name, model in models.items() if model is None]:
            name = missing[0].removesuffix("_N")
            raise LearnerError(f"the recipe needs a {name}: call hold_{name} first")
        if not models and not self.value_head:
            return Survey()
        batches = pack(groups, learner.microbatch_tokens, row_tokens=self._width)
        count = sum(len(batch.tokens_K) for batch in batches)
        found = {name: torch.zeros(count) for name in models}
        values_N = torch.zeros(count) if self.value_head else None
        for batch in batches:
            places_K = torch.from_numpy(batch.tokens_K)
            for name, model in models.items():
                found[name][places_K] = self._logprobs(model, batch).logprobs_K.cpu()
            if self.value_head and values_N is not None:
                hidden_KH = self._logprobs(self.model, batch).hidden_KH
                values_N[places_K] = self.value_head(hidden_KH).cpu()
        return Survey(**found, values_N=values_N)

    def supervised_step(
        self, conversations: Sequence[Masked], step: int, learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step on the mean cross entropy of the conversations' trained tokens.

        Returns loss, grad_norm, learning_rate, train_tokens, computed_tokens, entropy. Raises as `train_step` does.
        """

        def loss_of(batch: MicroBatch) -> MicroLoss:
            now = sampled_logprobs(self.model, batch, 1.0, self._product_dtype)
            return MicroLoss(-now.logprobs_K.sum(), {"entropy": now.entropies_K.sum()})

        groups = [[conversation] for conversation in conversations]
        return self._step(groups, loss_of, step, learning_rate)

    def _step(
        self,
        groups: Sequence[Sequence[Masked]],
        loss_of: LossOf,
        step: int,
        learning_rate: float,
        divisor: int = 0,
    ) -> dict[str, float]:
        """Accumulate the gradient of the loss over micro-batches, clip it, update.

        The loss is their sum divided by `divisor`, or by the number of tokens.
        """
        batches = pack(groups, self.config.learner.microbatch_tokens, row_tokens=self._width)
        token_count = sum(len(batch.tokens_K) for batch in batches)
        if not token_count:
            raise LearnerError(f"step {step}: the batch has no sampled token")
        divisor = divisor or token_count
        self.optimizer.zero_grad(set_to_none=True)
        sums: defaultdict[str, float] = defaultdict(float)
        for batch in batches:
            loss, parts = loss_of(batch)
            (loss / divisor).backward()  # type: ignore[no-untyped-call]
            for name, part in {"loss": loss, **parts}.items():
                sums[name] += part.item()
        means = {
            name: value / (divisor if name == "loss" else token_count)
            for name, value in sums.items()
        }
        limit = self.config.learner.max_grad_norm
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.value_head:
            torch.nn.utils.clip_grad_norm_(self.value_head.parameters(), limit)
        for name, value in {**means, "grad_norm": grad_norm}.items():
            if not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise NotFinite(step, name, value)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        if self.value_head:
            self.optimizer.param_groups[-1]["lr"] = (
                self.config.learner.advantage.value_learning_rate
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **means,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "train_tokens": token_count,
            "computed_tokens": sum(batch.ids_RL.size for batch in batches),
        }

    def _learning_rate(self, step: int) -> float:
        config = self.config.learner
        return config.learning_rate * min(1.0, step / max(1, config.warmup_steps))

    # -- what leaves -------------------------------------------------------------------------------

    def weights(self) -> bytes:
        """The bytes of a safetensors file in `policy.dtype`; equal weights give equal bytes."""
        return to_safetensors(
            {name: tensor.to(self.dtype).contiguous() for name, tensor in self._tensors()},
            metadata={"format": "pt"},
        )

    def assets(self) -> dict[str, bytes]:
        """The other files of the model's folder: configuration, tokenizer, chat template."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith((*_WEIGHT_FILES, ".index.json"))
        }

    def export(self, folder: Path) -> None:
        """Write a plain Hugging Face folder, whole or not at all; replaces an older one."""
        files = self.assets()
        files["config.json"] = _with_dtype(files["config.json"], self.config.policy.dtype)
        write_folder(folder, [*files.items(), ("model.safetensors", self.weights())])

    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    # -- checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(self, path: Path, step: int) -> None:
        """Write everything that the next step depends on, whole or not at all."""
        write_folder(path, self._checkpoint_files(step))

    def load_checkpoint(self, path: Path) -> int:
        """Become what `save_checkpoint` saw; returns its step. Raises BadCheckpoint before anything is changed."""
        try:
            saved = self._read_checkpoint(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(path, f"{type(error).__name__}: {error}") from error
        live = dict(self._tensors())
        for name, tensor in saved.weights.items():
            live[name].copy_(tensor)
        if self.value_head:
            self.value_head.load_state_dict(saved.value_head)
        self.restart_optimizer()
        self.optimizer.state.update(saved.moments)
        torch.set_rng_state(saved.generators["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.generators["cuda"])
        return saved.step

    def _read_checkpoint(self, path: Path) -> "_Saved":
        step = int(json.loads((path / "state.json").read_bytes())["step"])
        weights = load_file(path / "model.safetensors")
        if _shapes(weights) != _shapes(dict(self._tensors())):
            raise ValueError("model.safetensors is another model's")
        named = load_file(path / "optimizer.safetensors")
        moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for name, parameter in self._trained():
            if f"{name}/step" in named:  # a parameter that never had a gradient has no moments
                moments[parameter] = {
                    moment: named.pop(f"{name}/{moment}").to(self.model.device)
                    for moment in _MOMENTS
                }
        if named:
            raise ValueError(f"optimizer.safetensors has {min(named)} alone")
        generators = load_file(path / "rng.safetensors")
        wanted = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
        if not wanted <= generators.keys():
            raise ValueError(f"rng.safetensors lacks {min(wanted - generators.keys())}")
        value_head: dict[str, torch.Tensor] = {}
        if self.value_head:
            value_head = load_file(path / "value_head.safetensors")
            if _shapes(value_head) != _shapes(self.value_head.state_dict()):
                raise ValueError("value_head.safetensors is another model's")
        return _Saved(step, weights, moments, generators, value_head)

    def _checkpoint_files(self, step: int) -> Iterator[tuple[str, bytes]]:
        yield "model.safetensors", to_safetensors(dict(self._tensors()), {"format": "pt"})
        moments = {
            f"{name}/{moment}": tensor
            for name, parameter in self._trained()
            for moment, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        yield "optimizer.safetensors", to_safetensors(moments)
        if self.value_head:
            yield "value_head.safetensors", to_safetensors(self.value_head.state_dict())
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        yield "rng.safetensors", to_safetensors(generators)
        yield "state.json", json.dumps({"step": step}).encode()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state once, under the first of its names when it is tied."""
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield name, tensor

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
        if self.value_head:
            for name, parameter in self.value_head.named_parameters():
                yield _VALUE_HEAD + name, parameter


def _of_updates(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row of a step's updates: tokens are summed, of maxima the largest is taken, of the rest the mean."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if name in ("train_tokens", "computed_tokens"):
            found[name] = sum(values)
        else:
            found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return found


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _with_dtype(config_json: bytes, dtype: str) -> bytes:
    """A config.json that names the dtype of the weights beside it."""
    config = json.loads(config_json)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
