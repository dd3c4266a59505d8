"""A checkpoint as read, and found to fit, before anything is changed by it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from learner.errors import BadCheckpoint

Tensors = dict[str, torch.Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's, of each parameter."""


def weights_file(base_sha256: str) -> str:
    """Where a checkpoint has what it is of: adapters of a base, or the whole model."""
    return "adapter.safetensors" if base_sha256 else "model.safetensors"


class Saved(NamedTuple):
    """What the files of a checkpoint hold."""

    step: int
    weights: Tensors
    moments: Tensors
    """`<parameter>/<moment>`."""
    generators: Tensors
    value_head: Tensors


class Fit(NamedTuple):
    """What a checkpoint must hold to be a policy's."""

    weights: Mapping[str, torch.Tensor]
    """What may change: names and shapes."""
    trained: Collection[str]
    """Its parameters with moments, those of the value head included."""
    value_head: Mapping[str, torch.Tensor]
    base_sha256: str
    """Of the weights that they are adapters of; empty: they are whole."""

    def read(self, path: Path) -> Saved:
        """Read a checkpoint. Raises BadCheckpoint when it is damaged, or another model's."""
        try:
            return self._read(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(path, f"{type(error).__name__}: {error}") from error

    def _read(self, path: Path) -> Saved:
        state = json.loads((path / "state.json").read_bytes())
        step = int(state["step"])
        file = weights_file(self.base_sha256)
        weights = load_file(path / file)
        if _shapes(weights) != _shapes(self.weights):
            raise ValueError(f"{file} is another model's")
        if self.base_sha256 and state["base_sha256"] != self.base_sha256:
            raise ValueError(f"{file} is of other weights than these")
        named = load_file(path / "optimizer.safetensors")
        moments = {
            f"{name}/{moment}": named.pop(f"{name}/{moment}")
            for name in self.trained
            if f"{name}/step" in named  # a parameter that never had a gradient has no moments
            for moment in MOMENTS
        }
        if named:
            raise ValueError(f"optimizer.safetensors has {min(named)} alone")
        generators = load_file(path / "rng.safetensors")
        wanted = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
        if not wanted <= generators.keys():
            raise ValueError(f"rng.safetensors lacks {min(wanted - generators.keys())}")
        value_head = load_file(path / "value_head.safetensors") if self.value_head else {}
        if _shapes(value_head) != _shapes(self.value_head):
            raise ValueError("value_head.safetensors is another model's")
        return Saved(step, weights, moments, generators, value_head)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
