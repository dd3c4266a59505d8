"""Recomputed log-probabilities are those of the plain Hugging Face model."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner import logprobs
from learner.errors import UnsupportedModel
from learner.logprobs import refuse_unless_packable, sampled_logprobs
from learner.pack import pack

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_plain_forward(make_model, make_sample, temperature: float) -> None:
    """log softmax(logits / temperature) of each sampled token, and that distribution's entropy."""
    model = make_model()
    sample = make_sample([5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 0, 1])
    (batch,) = pack([[sample]], microbatch_tokens=64)
    now = sampled_logprobs(model, batch, temperature, torch.float32)
    logits_TV = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0] / temperature
    expected_TV = logits_TV.log_softmax(-1)
    expected_K = torch.stack([expected_TV[1, 7], expected_TV[2, 8], expected_TV[4, 10]])
    torch.testing.assert_close(now.logprobs_K, expected_K, rtol=1e-5, atol=1e-5)
    entropy_K = torch.distributions.Categorical(logits=logits_TV[[1, 2, 4]]).entropy()
    torch.testing.assert_close(now.entropies_K, entropy_K, rtol=1e-4, atol=1e-4)
    assert not now.entropies_K.requires_grad


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_gradients_equal_those_of_the_plain_forward(make_model, make_sample, weight) -> None:
    """Of log-probabilities, and of entropies where they have one, under a temperature."""
    model = make_model()
    sample = make_sample([5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 0, 1])
    (batch,) = pack([[sample]], microbatch_tokens=64)
    now = sampled_logprobs(model, batch, 0.7, torch.float32, entropy_gradient=weight > 0)
    (now.logprobs_K @ torch.tensor([1.0, -2.0, 0.5]) + weight * now.entropies_K.sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits_KV = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, [1, 2, 4]] / 0.7
    plain = torch.distributions.Categorical(logits=logits_KV)
    logprobs_K = plain.log_prob(torch.tensor([7, 8, 10]))
    (logprobs_K @ torch.tensor([1.0, -2.0, 0.5]) + weight * plain.entropy().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_chunks_change_nothing(make_model, make_groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 7 tokens' logits at a time: the same log-probabilities, entropies and gradients."""
    model = make_model()
    (batch,) = pack(make_groups(1), microbatch_tokens=4096)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        now = sampled_logprobs(model, batch, 1.0, torch.float32)
        now.logprobs_K.sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        return [now.logprobs_K.detach(), now.entropies_K, *gradients]

    whole = run()
    monkeypatch.setattr(logprobs, "_CHUNK_LOGITS", 7 * model.config.vocab_size)
    assert len(batch.targets_K) > 7
    for chunked, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(chunked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_a_gpu_sees_the_same(make_model, make_groups) -> None:
    """In bfloat16, where all segments are one call of another attention: log-probabilities and gradients are close."""
    (batch,) = pack(make_groups(1), microbatch_tokens=4096)
    found = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        now = sampled_logprobs(model, batch, 1.0, torch.bfloat16)
        now.logprobs_K.sum().backward()
        gradient = model.get_input_embeddings().weight.grad.cpu()
        found.append((now.logprobs_K.detach().cpu(), gradient))
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0.1, atol=0.2)


def test_bfloat16_is_float32_with_rounding(make_model, make_groups) -> None:
    """In bfloat16 the log-probabilities are float32 numbers close to the exact ones; gradients are float32."""
    model = make_model()
    (batch,) = pack(make_groups(1), microbatch_tokens=4096)
    exact = sampled_logprobs(model, batch, 1.0, torch.float32)
    rounded = sampled_logprobs(model, batch, 1.0, torch.bfloat16)
    assert rounded.logprobs_K.dtype == torch.float32
    assert not torch.equal(rounded.logprobs_K, exact.logprobs_K)
    torch.testing.assert_close(rounded.logprobs_K, exact.logprobs_K, rtol=0.05, atol=0.2)
    rounded.logprobs_K.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64,
                n_positions=64,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=None,
                eos_token_id=1,
            )
        ),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    ],
    ids=["gpt2", "qwen3", "mistral"],
)
def test_other_models_can_be_packed(build) -> None:
    """Models with learned positions, normalised queries or another attention class pass the check."""
    torch.manual_seed(0)
    refuse_unless_packable(build().eval(), max_tokens=64)


def test_logits_changed_after_the_head_are_refused() -> None:
    """Gemma 2 caps its logits after the head, which is not repeated here: refused by what it computes."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **SMALL, initializer_range=0.5, final_logit_softcapping=1.0, sliding_window=4096
    )
    with pytest.raises(UnsupportedModel, match=r"Gemma2ForCausalLM.*off by"):
        refuse_unless_packable(Gemma2ForCausalLM(config).eval(), max_tokens=64)


@pytest.mark.parametrize("max_tokens", [64, 65])
def test_a_window_shorter_than_a_trajectory_is_refused(max_tokens: int) -> None:
    """A window of 64 tokens is kept by trajectories of 64, and would not be by longer ones."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)).eval()
    if max_tokens <= 64:
        refuse_unless_packable(model, max_tokens)
    else:
        with pytest.raises(UnsupportedModel, match="window of 64"):
            refuse_unless_packable(model, max_tokens)
