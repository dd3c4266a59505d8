"""Models that are loaded and not learned: a reference, a teacher; and the value head, learned beside the policy.

Shapes: K sampled tokens of a micro-batch, H width.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from learner.errors import UnsupportedModel


def load_model(folder: Path) -> Any:
    """A Hugging Face folder's causal model in float32, on the CPU. Raises UnsupportedModel."""
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
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


def load_frozen(folder: Path, like: Any) -> Any:
    """A model that is only asked, on the device of the model `like`, whose vocabulary it must share.

    Raises UnsupportedModel.
    """
    model = load_model(folder)
    sizes = [other.get_output_embeddings().weight.shape[0] for other in (model, like)]
    if sizes[0] != sizes[1]:
        raise UnsupportedModel(
            str(folder), f"its vocabulary has {sizes[0]} tokens, the policy's {sizes[1]}"
        )
    return model.to(like.device).eval().requires_grad_(False)


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 where that is faster and no less exact."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if has["architecture"] == "x86_64" and not (has["avx512_bf16"] or has["amx_bf16"]):
            return torch.float32
    return dtype


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
