"""Low-rank adapters: W + alpha / rank * B A, of which only A and B are learned (Hu et al. 2021, "LoRA", section 4).

peft puts them into the model in place, so that whoever asks the model asks both. B begins at 0: the model with fresh
adapters is the model without.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from learner.errors import UnsupportedModel
from learner.models import once, to_file
from schemas.recipe import Lora

_NAME = "default"
_BASE_LAYER = ".base_layer."


class Adapters:
    """The adapters of a model, which itself is frozen."""

    def __init__(self, model: Any, config: Lora, dtype: torch.dtype, seed: int) -> None:
        """Put them in, the same from the same seed. `dtype`: in which others hold the model without them.

        Raises UnsupportedModel.
        """
        plan = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type] # it may be any number
            lora_dropout=config.dropout,
            target_modules=config.target or "all-linear",
        )
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(plan, model, adapter_name=_NAME)
            except ValueError as error:
                why = f"learner.lora.target: {error}"
                raise UnsupportedModel(type(model).__name__, why) from error
        self._model = model
        self._dtype = dtype
        self._scale = config.alpha / config.rank
        self._drops = config.dropout > 0
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        for layer in self._layers.values():
            layer.eval()
        self.base_sha256 = hashlib.sha256(self.base()).hexdigest()
        """Of the weights that they are adapters of, as `base` gives them."""

    def base(self) -> bytes:
        """A safetensors file of the model without them."""
        return to_file(once(self._plain()), self._dtype)

    @torch.no_grad()
    def merged(self) -> dict[str, torch.Tensor]:
        """The state of the model with them added in, by the names that it had before."""
        tensors = self._plain()
        for name, layer in self._layers.items():
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + layer.get_delta_weight(_NAME)
        return tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is learned: `<module>.lora_A.default.weight` and `<module>.lora_B.default.weight`."""
        parameters = self._model.named_parameters()
        return {
            name: parameter.detach() for name, parameter in parameters if parameter.requires_grad
        }

    def published(self) -> bytes:
        """A safetensors file of what is learned, with the factor `scale` of each product."""
        return to_file(self.tensors() | {"scale": torch.tensor(self._scale)}, torch.float32)

    @contextmanager
    def absent(self) -> Iterator[None]:
        """The model is as it was without them for as long as the block runs, in which no gradient is computed."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    @contextmanager
    def dropping(self, seed: int) -> Iterator[None]:
        """They drop inputs, if the recipe says so, for as long as the block runs: the same ones for the same seed."""
        if not self._drops:
            yield
            return
        drops = [drop for layer in self._layers.values() for drop in layer.lora_dropout.values()]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for drop in drops:
                drop.train()
            try:
                yield
            finally:
                for drop in drops:
                    drop.eval()

    def _plain(self) -> dict[str, torch.Tensor]:
        """The state of the model without them, by the names that it had before."""
        return {
            name.replace(_BASE_LAYER, "."): tensor
            for name, tensor in self._model.state_dict().items()
            if ".lora_" not in name
        }
