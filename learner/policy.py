"""The model that learns and its optimizer: batches in, one optimizer step, weights out.

Weights are held in float32 whatever `policy.dtype` is: an update at a learning rate of 1e-6 is lost in bfloat16.
With `bfloat16` the weights that leave are in bfloat16, and so are matrix products, but the head's, where the hardware
has them (a processor without them is 2.5 times faster in float32, measured).

The same batch, weights, optimizer state and number of torch threads give the same bits. Threads are the process's
own affair: call `torch.set_num_threads` before.

Shapes: K sampled tokens of a micro-batch, N of the whole batch.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import save as to_safetensors
from transformers import AutoTokenizer

from learner.batch import Survey, Tokens, tokens_of
from learner.checkpoints import write_folder
from learner.errors import LearnerError, NotFinite
from learner.logprobs import TokenLogprobs, refuse_unless_packable, sampled_logprobs
from learner.models import (
    ValueHead,
    assets_of,
    fastest_dtype,
    load_frozen,
    load_model,
    once,
    recompute_layers,
    to_file,
    with_dtype,
)
from learner.objective import MicroLoss, Objective, alone, of_updates
from learner.pack import Masked, MicroBatch, pack
from learner.samples import Sample
from learner.saved import MOMENTS, Fit, weights_file
from schemas.recipe import Recipe

if TYPE_CHECKING:
    from learner.lora import Adapters

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

VALUE_HEAD = "value_head."
"""Before the names of its parameters, in a checkpoint."""

LossOf = Callable[[MicroBatch], MicroLoss]


class Policy:
    """A Hugging Face causal model under AdamW."""

    def __init__(self, folder: Path, model: Any, config: Recipe) -> None:
        """Take over a float32 model; `Policy.open` makes one. Raises UnsupportedModel."""
        self.folder = folder
        """Where the model came from; its configuration and tokenizer are read there."""
        self.config = config
        self.model = model.eval()  # no dropout: the engine, with which we compare, has none
        self.dtype = _DTYPES[config.policy.dtype]
        """Of the weights that leave."""
        self._product_dtype = fastest_dtype(self.dtype, model.device)
        refuse_unless_packable(self.model, config.policy.max_tokens, self._product_dtype)
        self._width: int = model.config.get_text_config().hidden_size
        self.value_head: ValueHead | None = None
        if config.learner.advantage.estimator == "gae":
            self.value_head = ValueHead(self._width).to(model.device)
        self.adapters: Adapters | None = None
        """Then they alone are trained, kept and published."""
        if config.learner.lora.rank:
            from learner import lora  # peft takes seconds to import

            self.adapters = lora.Adapters(model, config.learner.lora, self.dtype, config.seed)
        if config.learner.gradient_checkpointing:
            recompute_layers(self.model)
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
        groups = self._parameter_groups()
        if self.value_head:
            groups.append({"params": list(self.value_head.parameters()), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decay = self.config.learner.weight_decay
        return [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
            # norms and biases keep their scale
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]

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
        return rows[0] if len(rows) == 1 else of_updates(rows)

    def _update(
        self, groups: Sequence[Sequence[Sample]], tokens: Tokens, step: int
    ) -> dict[str, float]:
        """One optimizer update."""
        config = self.config
        objective = Objective(config, tokens, (config.seed, step))

        def loss_of(batch: MicroBatch) -> MicroLoss:
            temperature = config.sampling.temperature
            now = self._logprobs(self.model, batch, temperature, config.learner.loss.entropy > 0)
            values_K = self.value_head(now.hidden_KH) if self.value_head else None
            return objective(batch, now, values_K)

        row = self._step(groups, loss_of, step, self._learning_rate(step), objective.divisor)
        return row | objective.metrics(self._summed)

    def _logprobs(
        self, model: Any, batch: MicroBatch, temperature: float, entropy_gradient: bool = False
    ) -> TokenLogprobs:
        return sampled_logprobs(model, batch, temperature, self._product_dtype, entropy_gradient)

    @torch.no_grad()
    def _survey(self, groups: Sequence[Sequence[Sample]]) -> Survey:
        """Ask the models that the recipe's loss compares with, and no other."""
        learner = self.config.learner
        models: dict[str, Any] = {}
        if learner.correction.proximal == "start":
            models["start_N"] = self.model
        if learner.kl.coefficient:
            models["reference_N"] = self._reference or (self.model if self.adapters else None)
        if learner.teacher.folder:
            models["teacher_N"] = self._teacher
        if missing := [name for name, model in models.items() if model is None]:
            name = missing[0].removesuffix("_N")
            raise LearnerError(f"the recipe needs a {name}: call hold_{name} first")
        if not models and not self.value_head:
            return Survey()
        count = sum(sample.sampled_count for group in groups for sample in group)
        found = {name: torch.zeros(count) for name in models}
        if self.value_head:
            found["values_N"] = torch.zeros(count)
        temperature = self.config.sampling.temperature
        for batch in self._micro_batches(groups):
            places_K = torch.from_numpy(batch.tokens_K)
            for name, model in models.items():
                with self._asked(name):
                    now = self._logprobs(model, batch, temperature)
                    found[name][places_K] = now.logprobs_K.cpu()
            if self.value_head:
                hidden_KH = self._logprobs(self.model, batch, temperature).hidden_KH
                found["values_N"][places_K] = self.value_head(hidden_KH).cpu()
        return Survey(**{name: array_N.float() for name, array_N in self._summed(found).items()})

    def _asked(self, name: str) -> AbstractContextManager[None]:
        """The reference may be the policy's own model: then it answers without its adapters."""
        own = name == "reference_N" and self._reference is None
        return self.adapters.absent() if self.adapters and own else nullcontext()

    def supervised_step(
        self, conversations: Sequence[Masked], step: int, learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step on the mean cross entropy of the conversations' trained tokens.

        Returns loss, grad_norm, learning_rate, train_tokens, computed_tokens, entropy. Raises as `train_step` does.
        """

        def loss_of(batch: MicroBatch) -> MicroLoss:
            now = self._logprobs(self.model, batch, 1.0)
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
        token_count = sum(int(member.mask_T.sum()) for group in groups for member in group)
        if not token_count:
            raise LearnerError(f"step {step}: the batch has no sampled token")
        divisor = divisor or token_count
        self._clear_gradient()
        sums: defaultdict[str, float] = defaultdict(float)
        batches = self._micro_batches(groups)
        with self.adapters.dropping(step) if self.adapters else nullcontext():
            for batch in batches:
                loss, parts = loss_of(batch)
                self._backward(loss / divisor, last=batch is batches[-1])
                for name, part in {"loss": loss, **parts}.items():
                    sums[name] += part.item()
                sums["computed_tokens"] += len(batch.ids_P)
        totals = self._summed(
            {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        )
        computed_tokens = int(totals.pop("computed_tokens"))
        means = {
            name: total.item() / (divisor if name == "loss" else token_count)
            for name, total in totals.items()
        }
        for name, value in means.items():
            if not math.isfinite(value):
                self._clear_gradient()
                raise NotFinite(step, name, value)
        return {
            **means,
            "grad_norm": self._apply(step, learning_rate),
            "learning_rate": learning_rate,
            "train_tokens": token_count,
            "computed_tokens": computed_tokens,
        }

    def _apply(self, step: int, learning_rate: float) -> float:
        """Clip the gradient, and update; returns its norm before. Raises NotFinite."""
        limit = self.config.learner.max_grad_norm
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.value_head:
            torch.nn.utils.clip_grad_norm_(self.value_head.parameters(), limit)
        if not math.isfinite(grad_norm):
            self._clear_gradient()
            raise NotFinite(step, "grad_norm", grad_norm)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        if self.value_head:
            self.optimizer.param_groups[-1]["lr"] = (
                self.config.learner.advantage.value_learning_rate
            )
        self.optimizer.step()
        self._clear_gradient()
        return grad_norm

    def _clear_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG002 (for several processes)
        """Add to the gradient; `last`: of this update."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _micro_batches(self, groups: Sequence[Sequence[Masked]]) -> list[MicroBatch]:
        """What this process computes."""
        return pack(groups, self.config.learner.microbatch_tokens)

    def _summed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each added up over the learner's processes."""
        return alone(tensors)

    def _learning_rate(self, step: int) -> float:
        config = self.config.learner
        return config.learning_rate * min(1.0, step / max(1, config.warmup_steps))

    # -- what leaves -------------------------------------------------------------------------------

    def weights(self) -> bytes:
        """The bytes of a safetensors file in `policy.dtype`; equal weights give equal bytes."""
        if self.adapters:
            return self.adapters.published()
        return to_file(self._state(), self.dtype)

    def assets(self) -> dict[str, bytes]:
        """The other files of the model's folder: configuration, tokenizer, chat template."""
        return assets_of(self.folder)

    def export(self, folder: Path, beside: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Write a plain Hugging Face folder, with the files `beside`, whole or not at all; replaces an older one.

        Adapters are merged into it.
        """
        files = self.assets()
        files["config.json"] = with_dtype(files["config.json"], self.config.policy.dtype)
        whole = once(self.adapters.merged()) if self.adapters else self._state()
        files["model.safetensors"] = to_file(whole, self.dtype)
        write_folder(folder, (files | dict(beside)).items())

    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    # -- checkpoints -------------------------------------------------------------------------------

    def load_checkpoint(self, path: Path) -> int:
        """Become what `checkpoint_files` saw; returns its step. Raises BadCheckpoint before anything is changed."""
        value_head = self.value_head.state_dict() if self.value_head else {}
        trained = [name for name, _ in self._trained()]
        saved = Fit(self._state(), trained, value_head, self._base_sha256).read(path)
        if self.value_head:
            self.value_head.load_state_dict(saved.value_head)
        self._become(saved.weights, saved.moments)
        torch.set_rng_state(saved.generators["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.generators["cuda"])
        return saved.step

    def _become(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        """Take over what `_state` and `_moments` gave."""
        live = self._state()
        for name, tensor in weights.items():
            live[name].copy_(tensor)
        self.restart_optimizer()
        for name, parameter in self._trained():
            if f"{name}/step" in moments:
                self.optimizer.state[parameter] = {
                    moment: moments[f"{name}/{moment}"].to(self.model.device) for moment in MOMENTS
                }

    def checkpoint_files(self, step: int) -> Iterator[tuple[str, bytes]]:
        """Everything that the next step depends on; made one by one, from the policy as it is then."""
        yield weights_file(self._base_sha256), to_safetensors(self._state(), {"format": "pt"})
        yield "optimizer.safetensors", to_safetensors(self._moments())
        if self.value_head:
            yield "value_head.safetensors", to_safetensors(self.value_head.state_dict())
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        yield "rng.safetensors", to_safetensors(generators)
        base = {"base_sha256": self._base_sha256} if self.adapters else {}
        yield "state.json", json.dumps({"step": step, **base}).encode()

    @property
    def _base_sha256(self) -> str:
        return self.adapters.base_sha256 if self.adapters else ""

    def _state(self) -> dict[str, torch.Tensor]:
        """What may change: the adapters, or the whole model."""
        return self.adapters.tensors() if self.adapters else once(self.model.state_dict())

    def _moments(self) -> dict[str, torch.Tensor]:
        """`<parameter>/<moment>`, of those that ever had a gradient."""
        return {
            f"{name}/{moment}": tensor
            for name, parameter in self._trained()
            for moment, tensor in self.optimizer.state.get(parameter, {}).items()
        }

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
        if self.value_head:
            for name, parameter in self.value_head.named_parameters():
                yield VALUE_HEAD + name, parameter
