"""Adapters and the weights that they belong to, as one: what an engine loads.

W + scale * B A (Hu et al. 2021, "LoRA", section 4), computed in float32 and rounded once.

Shapes: I inputs and O outputs of a layer, R rank.
"""

from safetensors import SafetensorError
from safetensors.torch import load, save

from engines.errors import EngineError

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def merge(base: bytes, adapters: bytes) -> bytes:
    """A safetensors file of whole weights from that of the base and that of the adapters, which holds their `scale`.

    Raises EngineError (`bad_weights`).
    """
    try:
        tensors, parts = load(base), load(adapters)
        scale = parts.pop("scale")
        for name in [name for name in parts if name.endswith(_A)]:
            module = name.removesuffix(_A)
            weight = tensors[f"{module}.weight"]
            a_RI, b_OR = parts.pop(name).float(), parts.pop(f"{module}{_B}").float()
            tensors[f"{module}.weight"] = (weight.float() + b_OR @ a_RI * scale).to(weight.dtype)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise EngineError("bad_weights", f"no adapters of this base: {error}") from error
    if parts:
        raise EngineError("bad_weights", f"adapters have {min(parts)} alone")
    return save(tensors, {"format": "pt"})
