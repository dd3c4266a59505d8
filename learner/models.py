"""Models as folders and as states; those that are only asked: a reference, a teacher; and the value head.

Shapes: K sampled tokens of a micro-batch, H width.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.errors import UnsupportedModel
from schemas.images import takes_images

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def load_model(folder: Path) -> Any:
    """A Hugging Face folder's causal model in float32, on the CPU. Raises UnsupportedModel."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        opened: Any = class_of(config).from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModel(str(folder), str(error)) from error
    model, loaded = opened
    if loaded["missing_keys"]:  # transformers would make them up
        raise UnsupportedModel(str(folder), f"no weights for {min(loaded['missing_keys'])}")
    return model


def class_of(config: Any) -> Any:
    """The class of transformers that makes the model of a configuration. Raises ValueError."""
    sees = hasattr(config, "vision_config") and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    if takes_images(config.model_type, has_vision=sees):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_frozen(folder: Path, like: Any) -> Any:
    """A model that is only asked, on the device of the model `like`, whose vocabulary it must share.

    Raises UnsupportedModel.
    """
    model = load_model(folder)
    sizes = [other.config.get_text_config().vocab_size for other in (model, like)]
    if sizes[0] != sizes[1]:
        raise UnsupportedModel(
            str(folder), f"its vocabulary has {sizes[0]} tokens, the policy's {sizes[1]}"
        )
    return model.to(like.device).eval().requires_grad_(False)


def recompute_layers(model: Any) -> None:
    """Keep only each layer's input for the backward pass, and compute the layer again there: bit for bit the same.

    Call it after `eval`, which ends it. Raises UnsupportedModel.
    """
    try:
        model.gradient_checkpointing_enable()
    except ValueError as error:
        raise UnsupportedModel(
            type(model).__name__, "learner.gradient_checkpointing is not for it; set it to false"
        ) from error
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # itself, which asks for it, but nothing in it: no dropout
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 where that is faster and no less exact."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if has["architecture"] == "x86_64" and not (has["avx512_bf16"] or has["amx_bf16"]):
            return torch.float32
    return dtype


def assets_of(folder: Path) -> dict[str, bytes]:
    """The files of a Hugging Face folder but its weights."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith((*_WEIGHT_FILES, ".index.json"))
    }


def with_dtype(config_json: bytes, dtype: str) -> bytes:
    """A config.json that names the dtype of the weights beside it."""
    config = json.loads(config_json)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def once(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state with every tensor once, under the first of its names when it is tied."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        seen.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name] for name in seen.values()}


def to_file(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """The bytes of a safetensors file; equal tensors give equal bytes."""
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    return save(cast, {"format": "pt"})


class ValueHead(torch.nn.Module):
    """The expected return of a state, from the policy's last hidden state; 0 everywhere before it has learned.

    No gradient goes back into the policy: the value is to describe it, not to shape it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.output.weight)
        torch.nn.init.zeros_(self.output.bias)

    def forward(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """[K, H] to [K], in float32."""
        values_K: torch.Tensor = self.output(hidden_KH.float()).squeeze(1)
        return values_K
