"""A policy that several processes hold together, by DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

    stage 1   every rank has the model; the optimizer's state is divided
    stage 2   the gradient too
    stage 3   the weights too: each layer is gathered while it is computed

All ranks have the whole batch and compute the same advantages; of the micro-batches each computes its share, as many
as any other. The loss is divided by the tokens of all, so that the step is that of one process. What leaves, weights
and checkpoints, is whole, and of the same form as that of a Policy: either goes on from the other's, on any number of
ranks.

Rank 0 is a Policy like any other; the others follow it. Everything DeepSpeed is here.

Shapes: K sampled tokens of a micro-batch.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import deepspeed
import msgspec
import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from transformers import AutoConfig

from learner import orders
from learner.conversations import Conversation
from learner.errors import LearnerError, NotFinite
from learner.logprobs import TokenLogprobs, sampled_logprobs
from learner.models import class_of, load_frozen, load_model, once
from learner.pack import Masked, MicroBatch, pack
from learner.policy import VALUE_HEAD, Policy
from learner.ranks import Ranks
from learner.samples import Sample
from schemas.recipe import Learner, Recipe

_SLACK = 1.125
"""Room of a micro-batch above its share, as trajectories cannot be cut."""
_DIVIDED = ("exp_avg", "exp_avg_sq")
"""Moments of which each rank has a share."""


def _empty() -> MicroBatch:
    """One token of a prompt."""
    nobody = Conversation(ids_T=np.zeros(2, np.int32), mask_T=np.array([False, True]))
    (batch,) = pack([[nobody]], 2)
    nothing = batch.tokens_K[:0]
    return replace(batch, sources_K=nothing, targets_K=nothing, tokens_K=nothing)


_EMPTY = _empty()


def _seeing(batch: MicroBatch, together: Sequence[MicroBatch]) -> MicroBatch:
    """A micro-batch that computes as many images as any of those that other ranks compute at the same time.

    Else their exchanges in the vision tower would not meet.
    """
    most = max(together, key=lambda each: len(each.pixels)).pixels
    return replace(batch, unseen=most[len(batch.pixels) :])


def settings(learner: Learner, width: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration, for a model so wide."""
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "stage3_param_persistence_threshold": 10 * width,  # norms and biases stay whole
    }
    in_memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if learner.offload != "none":
        zero["offload_optimizer"] = in_memory
    if learner.offload == "weights":
        zero["offload_param"] = in_memory
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts by it, and nothing else
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's is fused as well, and needs no compiler
        "steps_per_print": sys.maxsize,
    }


class _Forward(torch.nn.Module):
    """What DeepSpeed sees: the gathering of weights, and its count of passes, hang on calls of its module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> TokenLogprobs:
        """`sampled_logprobs` of the model."""
        return sampled_logprobs(self.model, *arguments)


class DeepSpeedPolicy(Policy):
    """One rank's part of a policy; made by `lead` on rank 0, and by `follow` on the others."""

    _engine: Any = None
    _tells = False

    def __init__(self, folder: Path, model: Any, config: Recipe, ranks: Ranks) -> None:
        """Take over a float32 model, of which rank 0 has the weights. Raises UnsupportedModel."""
        self._ranks = ranks
        self._whole = config.learner.zero_stage < 3
        """Every rank has all weights."""
        ranks.spread(once(model.state_dict()).values())
        super().__init__(folder, model.to(ranks.device), config)
        self._tells = ranks.rank == 0

    @classmethod
    def lead(cls, ranks: Ranks, folder: Path, config: Recipe) -> Self:
        """Open a Hugging Face folder on rank 0, and let the others follow. Raises UnsupportedModel."""
        model = load_model(folder)
        opened = orders.Open(config_json=model.config.to_json_string(), recipe=config)
        ranks.share(orders.encode(opened))
        return cls(folder, model, config, ranks)

    def obey(self, order: orders.AnyOrder) -> None:
        """Do with rank 0 what it does."""
        match order:
            case orders.Train():
                self.train_step(order.groups, order.step)
            case orders.Teach():
                self.supervised_step(order.conversations, order.step, order.learning_rate)
            case orders.Restart():
                self.restart_optimizer()
            case orders.Hold():
                model = blank_model(order.config_json).to(self._ranks.device)
                self._hold(order.what, model.eval().requires_grad_(False))
            case orders.GatherState():
                self._state()
            case orders.GatherMoments():
                self._moments()
            case orders.Become():
                self._take({}, {}, order.moments, order.updates)

    def _tell(self, order: orders.AnyOrder) -> None:
        if self._tells:
            self._ranks.share(orders.encode(order))

    # -- steps -------------------------------------------------------------------------------------

    def train_step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """On all ranks; returns the same on each, with their number as `ranks`."""
        self._tell(orders.Train(groups=[list(group) for group in groups], step=step))
        return super().train_step(groups, step) | {"ranks": self._ranks.count}

    def supervised_step(
        self, conversations: Sequence[Masked], step: int, learning_rate: float
    ) -> dict[str, float]:
        """On all ranks; returns the same on each."""
        told = [Conversation(ids_T=each.ids_T, mask_T=each.mask_T) for each in conversations]
        self._tell(orders.Teach(conversations=told, step=step, learning_rate=learning_rate))
        return super().supervised_step(conversations, step, learning_rate)

    def _micro_batches(self, groups: Sequence[Sequence[Masked]]) -> list[MicroBatch]:
        """This rank's share: as many as the others', or the exchanges in their backward passes would not meet."""
        count, limit = self._ranks.count, self.config.learner.microbatch_tokens
        places = sum(len(batch.ids_P) for batch in pack(groups, limit))
        passes = -(-places // (count * limit))
        batches = pack(groups, min(limit, int(_SLACK * places / (count * passes)) + 1))
        batches.sort(key=lambda batch: -len(batch.ids_P))
        batches += [_EMPTY] * (-len(batches) % count)
        own = batches[self._ranks.rank :: count]
        return [
            _seeing(batch, batches[first : first + count])
            for batch, first in zip(own, range(0, len(batches), count), strict=True)
        ]

    def _summed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._ranks.summed(tensors)

    def _clear_gradient(self) -> None:
        """DeepSpeed clears its own after each update; where one is given up the process is, too."""
        if self.value_head:
            self._value_optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # it takes the mean over the ranks
        self._engine.backward(loss * self._ranks.count)

    def _apply(self, step: int, learning_rate: float) -> float:
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise NotFinite(step, "grad_norm", grad_norm)
        if self.value_head:
            self._apply_values(self.value_head)
        return grad_norm

    def _apply_values(self, head: torch.nn.Module) -> None:
        """Every rank has the value head whole; it is small."""
        parameters = dict(head.named_parameters())
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if not gradients:
            return  # demonstrations teach it nothing
        for name, gradient in self._summed(gradients).items():
            parameters[name].grad = (gradient / self._ranks.count).to(parameters[name])
        torch.nn.utils.clip_grad_norm_(head.parameters(), self.config.learner.max_grad_norm)
        self._value_optimizer.step()
        self._clear_gradient()

    def _logprobs(
        self, model: Any, batch: MicroBatch, temperature: float, entropy_gradient: bool = False
    ) -> TokenLogprobs:
        asked = self._engine if model is self.model else partial(sampled_logprobs, model)
        found: TokenLogprobs = asked(batch, temperature, self._product_dtype, entropy_gradient)
        return found

    # -- the optimizer -----------------------------------------------------------------------------

    def restart_optimizer(self) -> None:
        """Forget the optimizer's moments; the first time, make it, and divide what the stage divides."""
        self._tell(orders.Restart())
        if self._engine is None:
            self._start()
        self._forget()

    def _forget(self) -> None:
        for state in self.optimizer.state.values():
            for moment in state.values():
                moment.zero_()
        if self.value_head:
            rate = self.config.learner.advantage.value_learning_rate
            self._value_optimizer = torch.optim.AdamW(
                self.value_head.parameters(), lr=rate, weight_decay=0.0, fused=True
            )

    def _start(self) -> None:
        """Hand the model and its optimizer to DeepSpeed."""
        # only inference has a use for its shared memory, which takes a compiler, and minutes, to build
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        groups = [group for group in self._parameter_groups() if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=_Forward(self.model),
            optimizer=self.optimizer,
            config=settings(self.config.learner, self._width, self._ranks.device),
        )
        if not self._whole:
            return
        for shares in self.optimizer.param_groups:
            for share in shares["params"]:
                # as it makes it itself, but it links what there is after the first group's step to the parameters
                self.optimizer.state[share] = {
                    "step": torch.zeros((), device=share.device),
                    "exp_avg": torch.zeros_like(share),
                    "exp_avg_sq": torch.zeros_like(share),
                }
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _moments(self) -> dict[str, torch.Tensor]:
        self._tell(orders.GatherMoments())
        found: dict[str, torch.Tensor] = {}
        steps = [state["step"] for state in self.optimizer.state.values()]
        if not any(steps):
            return found
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            for moment in _DIVIDED:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if self._ranks.rank == 0:
                    found[f"{name}/{moment}"] = whole.cpu().clone()
            found[f"{name}/step"] = steps[0].cpu().clone()
        if self.value_head:
            for name, parameter in self.value_head.named_parameters():
                for moment, tensor in self._value_optimizer.state[parameter].items():
                    found[f"{VALUE_HEAD}{name}/{moment}"] = tensor
        return found

    # -- the weights -------------------------------------------------------------------------------

    def _state(self) -> dict[str, torch.Tensor]:
        """Whole on rank 0."""
        if self._whole:
            return super()._state()
        self._tell(orders.GatherState())
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self._places():
            with deepspeed.zero.GatheredParameters([tensor]):
                if self._ranks.rank == 0:
                    found[name] = tensor.detach().cpu().clone()
        return found

    def _places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state once, by the first of its names; of divided ones the share."""
        yield from self.model.named_parameters()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.model.state_dict().items():
            if name not in parameters:
                yield name, tensor

    def _become(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        updates = [int(tensor) for name, tensor in moments.items() if name.endswith("/step")]
        named = [name for name in moments if not name.endswith("/step")]
        self._tell(orders.Become(moments=named, updates=max(updates, default=0)))
        self._take(weights, moments, named, max(updates, default=0))

    @torch.no_grad()
    def _take(
        self,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        named: Sequence[str],
        updates: int,
    ) -> None:
        """Take over what rank 0 has; the others know the moments' names."""
        for name, tensor in super()._state().items() if self._whole else self._places():
            if self._whole:
                self._spread(tensor, weights.get(name))
            else:
                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    if weights:
                        tensor.copy_(weights[name])
        self._engine.optimizer.refresh_fp32_params()
        self._forget()
        for name, parameter in self.model.named_parameters():
            for moment in _DIVIDED:
                if f"{name}/{moment}" in named:
                    shape = parameter.shape if self._whole else parameter.ds_shape
                    full = torch.zeros(shape, device=self._ranks.device)
                    self._spread(full, moments.get(f"{name}/{moment}"))
                    safe_set_full_optimizer_state(parameter, full, moment)
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
        if self.value_head:
            self._take_values(self.value_head, moments, updates)

    def _take_values(
        self, head: torch.nn.Module, moments: Mapping[str, torch.Tensor], updates: int
    ) -> None:
        """The value head, which rank 0 has, and its moments."""
        for name, parameter in head.named_parameters():
            self._spread(parameter)
            if updates:
                state = {moment: torch.zeros_like(parameter) for moment in _DIVIDED}
                for moment, tensor in state.items():
                    self._spread(tensor, moments.get(f"{VALUE_HEAD}{name}/{moment}"))
                step = torch.tensor(float(updates), device=self._ranks.device)
                self._value_optimizer.state[parameter] = {**state, "step": step}

    def _spread(self, tensor: torch.Tensor, value: torch.Tensor | None = None) -> None:
        """Set it, on rank 0, and then to what rank 0 has."""
        if value is not None:
            tensor.copy_(value)
        self._ranks.spread([tensor])

    # -- other models ------------------------------------------------------------------------------

    def hold_reference(self, folder: Path) -> None:
        """On every rank, whole. Raises UnsupportedModel."""
        self._hold("reference", load_frozen(folder, self.model))

    def hold_teacher(self, folder: Path) -> None:
        """On every rank, whole. Raises UnsupportedModel."""
        self._hold("teacher", load_frozen(folder, self.model))

    def _hold(self, what: orders.Other, model: Any) -> None:
        self._tell(orders.Hold(what=what, config_json=model.config.to_json_string()))
        self._ranks.spread(once(model.state_dict()).values())
        if what == "reference":
            self._reference = model
        else:
            self._teacher = model


def blank_model(config_json: str) -> Any:
    """A float32 model by its configuration, on the CPU; its weights are nobody's."""
    plan = msgspec.json.decode(config_json)
    config = AutoConfig.for_model(plan.pop("model_type"), **plan)
    return class_of(config).from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def follow(ranks: Ranks) -> NoReturn:
    """Do as rank 0 says, until it leaves."""
    policy: DeepSpeedPolicy | None = None
    while True:
        order = orders.decode(ranks.share())
        if isinstance(order, orders.Open):
            torch.set_num_threads(order.recipe.learner.threads)
            model = blank_model(order.config_json)
            policy = DeepSpeedPolicy(Path(), model, order.recipe, ranks)
        elif policy is not None:
            # a batch that rank 0 cannot train either: it decides what comes of it
            with suppress(LearnerError):
                policy.obey(order)
