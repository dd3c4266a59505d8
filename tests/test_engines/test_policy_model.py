"""What is refused when a folder is opened or weights arrive, and how it is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from engines.engine import SampleRequest
from engines.errors import EngineError
from engines.policy_model import PolicyModel, open_model
from engines.transformers_engine import TransformersEngine

MakeFolder = Callable[..., Path]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MistralConfig(**SMALL, sliding_window=8), "MistralForCausalLM.*Sliding"),
        (Gemma2Config(**SMALL, head_dim=8), "Gemma2ForCausalLM.*sliding"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "MambaForCausalLM"),
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), "BloomForCausalLM"),
        (
            LlamaConfig(
                **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "longest row",
        ),
    ],
)
def test_other_kinds_of_layers_are_refused_by_name(config: object, why: str) -> None:
    """Sliding windows, recurrent layers, biased attention: never served wrongly."""
    with pytest.raises(EngineError, match=why) as caught:
        PolicyModel(AutoModelForCausalLM.from_config(config))
    assert caught.value.code == "unsupported_model"


def test_mistral_without_a_window_is_served() -> None:
    """The same class as one that is refused."""
    PolicyModel(AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=None)))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight is \(3,\) instead of \(32,\)",
        ),
    ],
)
async def test_weights_that_do_not_fit_are_refused(
    make_folder: MakeFolder, spoil: Callable[[dict[str, torch.Tensor]], object], why: str
) -> None:
    """The first name is told; the engine goes on with what it has."""
    folder = make_folder("llama")
    engine = TransformersEngine.open(folder, dtype="float32", slots=2, threads=1, device="cpu")
    tensors = load((folder / "model.safetensors").read_bytes())
    spoil(tensors)
    for weights, message in ((save(tensors), why), (b"junk", "not a safetensors file")):
        with pytest.raises(EngineError, match=message) as caught:
            await engine.load(weights, 1)
        assert caught.value.code == "bad_weights"
    sample = await engine.sample(SampleRequest(ids=[5], max_tokens=1))
    assert sample.versions == [-1]
    await engine.close()


async def test_a_folder_without_weights_waits_for_them(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    """Made-up parameters are never sampled from; loaded ones are those of the complete folder."""
    folder = make_folder("llama")
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    request = SampleRequest(ids=[5, 6], max_tokens=9, seed=2)
    settings = {"dtype": "float32", "slots": 2, "threads": 1, "device": "cpu"}
    complete = TransformersEngine.open(folder, **settings)
    bare = TransformersEngine.open(tmp_path, **settings)
    with pytest.raises(EngineError, match="no_weights"):
        await bare.sample(request)
    await bare.load((folder / "model.safetensors").read_bytes(), 0)
    assert (await bare.sample(request)).ids == (await complete.sample(request)).ids
    await bare.close()
    await complete.close()


def test_an_incomplete_folder_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    """A missing tensor is not made up."""
    for file in make_folder("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load((tmp_path / "model.safetensors").read_bytes())
    del tensors["model.norm.weight"]
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    with pytest.raises(EngineError, match=r"missing model\.norm\.weight"):
        open_model(tmp_path, "float32", "cpu")


def test_bfloat16_is_served(make_folder: MakeFolder) -> None:
    """Parameters and slots in half the memory; rounding is not taken for an unsupported model."""
    model = open_model(make_folder("tied"), "bfloat16", "cpu")
    assert model.module.dtype == model.slots.layer(0).dtype == torch.bfloat16
