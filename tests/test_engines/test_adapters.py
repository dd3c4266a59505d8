"""Merging published adapters with their base; tests/test_actors/test_weights.py has those of a real learner."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from engines.adapters import merge
from engines.errors import EngineError

A, B = "layer.lora_A.default.weight", "layer.lora_B.default.weight"


def base(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.eye(3, 4, dtype=dtype), "norm.weight": torch.ones(4, dtype=dtype)}


def adapters() -> dict[str, torch.Tensor]:
    return {A: torch.full((2, 4), 0.5), B: torch.ones(3, 2), "scale": torch.tensor(3.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_added(dtype: torch.dtype) -> None:
    """scale * B A, by hand 3 * (1 * 0.5 + 1 * 0.5) everywhere; the rest and the dtype stay."""
    merged = load(merge(save(base(dtype)), save(adapters())))
    assert torch.equal(merged["layer.weight"], torch.eye(3, 4, dtype=dtype) + 3.0)
    assert torch.equal(merged["norm.weight"], base(dtype)["norm.weight"])
    assert merged["layer.weight"].dtype == dtype


@pytest.mark.parametrize(
    "change",
    [
        {"scale": None},
        {B: None},
        {"other.lora_A.default.weight": torch.ones(2, 4)},
        {"stray": torch.ones(1)},
        {A: torch.ones(2, 5)},
    ],
)
def test_adapters_of_another_model_are_refused(change: dict[str, torch.Tensor | None]) -> None:
    """A name or a shape that does not fit, or one that nothing reads."""
    changed = {name: t for name, t in (adapters() | change).items() if t is not None}
    with pytest.raises(EngineError, match="bad_weights"):
        merge(save(base()), save(changed))


@given(st.binary(max_size=64))
def test_any_bytes_are_adapters_or_refused(data: bytes) -> None:
    """Never another error."""
    with pytest.raises(EngineError):
        merge(save(base()), data)
