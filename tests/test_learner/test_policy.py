"""One optimizer step, and what leaves the learner."""

import hashlib
import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace as replace_fields
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.errors import LearnerError, NotFinite, UnsupportedModel
from learner.policy import Policy
from schemas.algorithm import Correction
from schemas.recipe import Recipe


def sha(policy: Policy) -> str:
    return hashlib.sha256(policy.weights()).hexdigest()


def with_learner(config: Recipe, **changes) -> Recipe:
    return replace(config, learner=replace(config.learner, **changes))


def on_policy(policy: Policy, groups):
    """The same groups with the engine's log-probabilities equal to the policy's own."""
    return [
        [replace_logprobs(sample, plain_logprobs(policy.model, sample)) for sample in group]
        for group in groups
    ]


def plain_logprobs(model, sample) -> torch.Tensor:
    ids_T = torch.from_numpy(sample.ids_T).long()
    logits_TV = model(input_ids=ids_T.unsqueeze(0)).logits[0]
    logprobs_T = torch.zeros(len(ids_T))
    logprobs_T[1:] = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
    return torch.where(torch.from_numpy(sample.mask_T), logprobs_T, 0.0)


def replace_logprobs(sample, logprobs_T: torch.Tensor):
    return replace_fields(sample, logprobs_T=logprobs_T.detach().numpy())


def test_on_policy_metrics(policy: Policy, make_groups) -> None:
    """When the engine is the learner: ratio 1, no KL, nothing clipped or masked, loss -(sum of A per token) / N."""
    groups = on_policy(policy, make_groups())
    row = policy.train_step(groups, step=1)
    assert row["is_ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert row["kl_behaviour"] == pytest.approx(0.0, abs=1e-4)
    assert row["masked_token_fraction"] == row["clip_fraction"] == 0
    samples = [sample for group in groups for sample in group]
    signed = sum((sample.reward - 0.5) * sample.sampled_count for sample in samples)
    assert row["train_tokens"] == sum(sample.sampled_count for sample in samples)
    assert row["loss"] == pytest.approx(-signed / row["train_tokens"], abs=1e-4)
    assert 0 < row["entropy"] < math.log(300)


def test_a_step_makes_the_better_members_likelier(policy: Policy, make_groups) -> None:
    """After one on-policy step tokens of rewarded members gain log-probability, the others lose."""
    groups = on_policy(policy, make_groups())
    policy.train_step(groups, step=1)
    gains = {0.0: 0.0, 1.0: 0.0}
    for sample in (sample for group in groups for sample in group):
        with torch.no_grad():
            now_T = plain_logprobs(policy.model, sample)
        gains[sample.reward] += float(now_T.sum()) - float(sample.logprobs_T.sum())
    assert gains[1.0] > 0 > gains[0.0]


def test_micro_batches_change_nothing(folder: Path, config: Recipe, make_groups) -> None:
    """The gradient is that of the whole batch, however many micro-batches it takes."""
    rows = [
        Policy.open(folder, with_learner(config, microbatch_tokens=tokens)).train_step(
            make_groups(), step=1
        )
        for tokens in (20, 4096)
    ]
    assert rows[0]["computed_tokens"] > rows[1]["computed_tokens"]
    for name in ("loss", "grad_norm", "entropy", "kl_behaviour", "is_ratio_mean"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3, abs=1e-6)


def test_masked_tokens_give_no_gradient(folder: Path, config: Recipe, make_groups) -> None:
    """When every ratio is outside the bounds the loss and the gradient are exactly 0, and the metric says why."""
    near = Correction(ratio_min=0.999, ratio_max=1.001, sequence="none")
    policy = Policy.open(folder, with_learner(config, correction=near))
    before = sha(policy)
    groups = [
        [replace_logprobs(s, torch.from_numpy(s.logprobs_T) * 50) for s in group]
        for group in make_groups()
    ]
    row = policy.train_step(groups, step=1)
    assert row["masked_token_fraction"] == 1
    assert row["loss"] == row["grad_norm"] == 0
    assert sha(policy) == before


def test_warmup(folder: Path, config: Recipe, make_groups) -> None:
    """The learning rate rises in a straight line from 0 over `warmup_steps`, then stays."""
    policy = Policy.open(folder, with_learner(config, warmup_steps=4))
    rates = [policy.train_step(make_groups(), step)["learning_rate"] for step in (1, 2, 4, 5)]
    assert rates == [0.25e-3, 0.5e-3, 1e-3, 1e-3]


def test_gradients_are_clipped(folder: Path, config: Recipe, make_groups) -> None:
    """The norm reported is the one before clipping."""
    free = Policy.open(folder, with_learner(config, max_grad_norm=1e9))
    clipped = Policy.open(folder, with_learner(config, max_grad_norm=1e-9))
    rows = [policy.train_step(on_policy(policy, make_groups()), 1) for policy in (free, clipped)]
    assert rows[0]["grad_norm"] == rows[1]["grad_norm"] > 1e-3
    moments = clipped.optimizer.state[clipped.model.get_input_embeddings().weight]["exp_avg"]
    assert moments.norm().item() < 1e-9


@pytest.mark.parametrize("damage", ["logprobs", "weights", "reward"])
def test_numbers_that_are_none_raise(policy: Policy, make_groups, damage: str) -> None:
    """The step is named, and neither weights nor optimizer have moved."""
    policy.train_step(make_groups(), step=1)
    groups = make_groups()
    if damage == "logprobs":
        sample = groups[0][0]
        groups[0][0] = replace_logprobs(sample, torch.full((len(sample.ids_T),), math.nan))
    elif damage == "reward":
        groups[0][0] = replace_fields(groups[0][0], reward=math.inf)
    else:
        with torch.no_grad():
            policy.model.get_input_embeddings().weight[groups[0][0].ids_T[0], 0] = math.inf
    before, steps = sha(policy), moment_steps(policy)
    with pytest.raises(NotFinite, match="step 7: ") as caught:
        policy.train_step(groups, step=7)
    assert caught.value.step == 7
    assert sha(policy) == before
    assert moment_steps(policy) == steps
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def moment_steps(policy: Policy) -> set[float]:
    return {state["step"].item() for state in policy.optimizer.state.values()}


def test_a_batch_without_sampled_tokens_raises(policy: Policy, make_sample) -> None:
    """There is nothing to divide by."""
    with pytest.raises(LearnerError, match="step 3: the batch has no sampled token"):
        policy.train_step([[make_sample([5, 6], [0, 0])]], step=3)


def test_supervised_loss_is_cross_entropy_of_the_mask(policy: Policy, make_groups) -> None:
    """The mean over masked tokens of all conversations, and only they have a gradient."""
    samples = make_groups()[0]
    logits = torch.cat(
        [plain_logprobs(policy.model, s)[torch.from_numpy(s.mask_T)] for s in samples]
    )
    expected = -logits.mean()
    (gradient,) = torch.autograd.grad(expected, [policy.model.get_output_embeddings().weight])
    row = policy.supervised_step(samples, step=1, learning_rate=0.0)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    moment = policy.optimizer.state[policy.model.get_output_embeddings().weight]["exp_avg"]
    scale = min(1.0, policy.config.learner.max_grad_norm / row["grad_norm"])
    torch.testing.assert_close(moment, 0.1 * scale * gradient, rtol=1e-3, atol=1e-6)


# -- what leaves -----------------------------------------------------------------------------------


def test_bfloat16_learns_like_float32(folder: Path, config: Recipe, make_groups) -> None:
    """Rounded products or not, a step reports the same numbers to a few per cent, on float32 weights."""
    rounded = Policy.open(folder, replace(config, policy=replace(config.policy, dtype="bfloat16")))
    exact = Policy.open(folder, config)
    groups = on_policy(exact, make_groups())
    rows = [policy.train_step(groups, step=1) for policy in (rounded, exact)]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=0.1)
    assert rows[0]["entropy"] == pytest.approx(rows[1]["entropy"], rel=0.01)
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_load_into_a_fresh_model(
    folder: Path, config: Recipe, make_model, make_groups, dtype: str
) -> None:
    """Plain Hugging Face names in the policy's dtype; a tied matrix once; the model is the trained one."""
    policy = Policy.open(folder, replace(config, policy=replace(config.policy, dtype=dtype)))
    policy.train_step(make_groups(), step=1)
    tensors = load(policy.weights())
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    fresh = make_model()
    missing, unexpected = fresh.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    for name, parameter in policy.model.named_parameters():
        rounded = parameter.to(getattr(torch, dtype)).float()
        assert torch.equal(fresh.get_parameter(name), rounded)


def test_untied_weights_are_all_there(tmp_path: Path, config: Recipe, make_model) -> None:
    """Each matrix under its own name."""
    make_model(tie=False).save_pretrained(tmp_path)
    tensors = load(Policy.open(tmp_path, config).weights())
    assert {"lm_head.weight", "model.embed_tokens.weight"} < tensors.keys()


def test_assets_and_export(policy: Policy, config: Recipe, make_groups, tmp_path: Path) -> None:
    """Assets are the folder without weights; an export opens with plain transformers and as a policy."""
    policy.train_step(make_groups(), step=1)
    assets = policy.assets()
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < assets.keys()
    assert not any("safetensors" in name for name in assets)
    policy.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, policy.model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    assert sha(Policy.open(tmp_path / "out", config)) == sha(policy)


def test_a_folder_without_all_weights_is_refused(
    folder: Path, config: Recipe, tmp_path: Path
) -> None:
    """transformers would make missing ones up."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UnsupportedModel):
        Policy.open(tmp_path, config)
    tensors = load((folder / "model.safetensors").read_bytes())
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"no weights for model.norm.weight"):
        Policy.open(tmp_path, config)


# -- determinism -----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "three_steps.py"


def test_a_fresh_process_agrees_to_the_bit(folder: Path) -> None:
    """The same batches, with 1 thread and with 2: the same losses and weights here and in a new process."""
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    run = runpy.run_path(str(SCRIPT))["three_steps"]
    assert json.loads(done.stdout) == [run(folder, threads) for threads in (1, 2)]


def test_the_order_of_groups_is_part_of_the_batch(
    folder: Path, config: Recipe, make_groups
) -> None:
    """The same order gives the same bits in one process; sums in another order may round otherwise."""
    first, again = (Policy.open(folder, config) for _ in range(2))
    rows = [policy.train_step(make_groups(), step=1) for policy in (first, again)]
    assert rows[0] == rows[1]
    assert sha(first) == sha(again)
    other = Policy.open(folder, config).train_step(make_groups()[::-1], step=1)
    assert np.isclose(other["loss"], rows[0]["loss"], rtol=1e-4)
