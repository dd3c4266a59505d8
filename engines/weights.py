"""Weights as they arrive: names and shapes are checked against the model before anything is copied."""

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from engines.errors import EngineError


def read_weights(weights: bytes, module: Any) -> dict[str, torch.Tensor]:
    """Read a safetensors file's bytes for a transformers model, which may be on the device `meta`.

    Of tied weights one name is enough. Raises EngineError (`bad_weights`) naming what does not fit.
    """
    try:
        tensors: dict[str, torch.Tensor] = load(weights)
    except SafetensorError as error:
        raise EngineError("bad_weights", f"not a safetensors file: {error}") from error
    live: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    given = {id(live[name]) for name in tensors if name in live}
    for name, tensor in tensors.items():
        if name not in live:
            raise EngineError("bad_weights", f"unexpected {name}")
        if tensor.shape != live[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(live[name].shape)}"
            raise EngineError("bad_weights", f"{name} is {shapes}")
    for name, parameter in live.items():
        if id(parameter) not in given:
            raise EngineError("bad_weights", f"missing {name}")
    return tensors
