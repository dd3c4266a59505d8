"""Advantages, weights, losses and gradients beside TRL 1.16's, on the same tensors.

Where the two differ, the test's docstring says why. Only here: OPO, REINFORCE++, GAE, turns, anchors, DPPO, Clip-Cov,
k2, the geometric gate, A-3PO. Only there: SAPO, VESPO, LUSPO, off-policy sequence masking, adaptive entropy.
"""

import msgspec
import pytest
import torch

from learner import corrections
from learner.batch import Survey
from schemas import recipe

NONE = {"token": "none", "sequence": "none"}


def config(**learner) -> recipe.Recipe:
    tables = {
        "policy": {"model": "m", "max_tokens": 60},
        "learner": {"correction": NONE, **learner},
    }
    return msgspec.convert(tables, recipe.Recipe)


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def same_loss(ours, theirs, value: bool = True) -> None:
    """The loss, unless `value` is off, and every parameter's gradient."""
    loss, gradients = theirs.loss()
    if value:
        assert ours.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    assert gradients.keys() == ours.gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=2e-3, atol=2e-6)


# -- advantages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_grpo_advantages(folder, batch, grpo, learn, scale: str) -> None:
    """With the sample deviation of the group or the batch plus 1e-4, or undivided."""
    theirs = grpo(batch, scale_rewards=scale)
    same(learn(batch, config(advantage={"scale": scale})).advantages_B, theirs.inputs["advantages"])


def test_rloo_advantages(batch, rloo, learn) -> None:
    """The reward less the mean of the group's others."""
    ours = learn(batch, config(advantage={"estimator": "rloo"}))
    same(ours.advantages_B, rloo(batch).inputs["advantages"])


# -- losses ----------------------------------------------------------------------------------------


def stale(theirs, batch):
    """Makes the engine's log-probabilities those of the old policy."""
    theirs.inputs["old_per_token_logps"] = batch.behaviour
    return theirs


LOSSES = {
    "DAPO: token mean, two bounds": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {},
    ),
    "BNPO: the same in one micro-batch": (
        {"loss_type": "bnpo", "epsilon": 0.2, "epsilon_high": 0.28},
        {},
    ),
    "GRPO: mean by trajectory": (
        {"loss_type": "grpo", "epsilon": 0.1},
        {"aggregation": "sequence_mean", "clip_low": 0.1, "clip_high": 0.1},
    ),
    "Dr. GRPO: a constant": (
        {"loss_type": "dr_grpo", "epsilon": 0.2, "max_completion_length": 20},
        {"aggregation": "constant", "constant_tokens": 20, "clip_high": 0.2},
    ),
    "dual clip": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.3},
        {"dual_clip": 1.3},
    ),
    "GSPO: the trajectory's ratio": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
        {
            "method": "gspo",
            "aggregation": "sequence_mean",
            "clip_low": 0.1,
            "clip_high": 0.1,
        },
    ),
    "CISPO: theirs bounds the ratio itself, ours by 1 + clip_high": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"method": "cispo", "clip_high": 0.2},
    ),
    "truncated completions masked, token mean": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"mask_truncated": True},
    ),
    "truncated completions masked, mean by trajectory": (
        {"loss_type": "grpo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"mask_truncated": True, "aggregation": "sequence_mean"},
    ),
    "truncated completions masked, a constant": (
        {
            "loss_type": "dr_grpo",
            "epsilon_high": 0.28,
            "mask_truncated_completions": True,
            "max_completion_length": 20,
        },
        {"mask_truncated": True, "aggregation": "constant", "constant_tokens": 20},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(batch, grpo, learn, name: str) -> None:
    """Value and gradient, where the engine is the old policy and observations stand between the turns."""
    settings, loss = LOSSES[name]
    theirs = stale(grpo(batch, scale_rewards="group", **settings), batch)
    same_loss(learn(batch, config(loss=loss, advantage={"scale": "group"})), theirs)


@pytest.mark.parametrize("weighted", [True, False])
def test_divergence_from_a_reference(batch, grpo, learn, weighted: bool) -> None:
    """k3, added to each token's loss; times the ratio, unless that is off."""
    settings = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}
    theirs = stale(grpo(batch, use_bias_correction_kl=weighted, **settings), batch)
    theirs.trainer.beta = 0.3
    theirs.inputs["ref_per_token_logps"] = batch.behaviour - 0.2
    reference = _by_token(batch) - 0.2
    ours = learn(
        batch,
        config(kl={"coefficient": 0.3, "weighted": weighted}, advantage={"scale": "group"}),
        Survey(reference_N=reference),
    )
    same_loss(ours, theirs)


def test_entropy_bonus(batch, grpo, learn) -> None:
    """The mean entropy of the tokens times its weight.

    Theirs is a mean over tokens whatever the policy's term is; ours is weighed as the policy's term is, so that they
    agree under the mean over tokens.
    """
    settings = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "entropy_coef": 0.1}
    theirs = stale(grpo(batch, scale_rewards="group", **settings), batch)
    same_loss(learn(batch, config(loss={"entropy": 0.1}, advantage={"scale": "group"})), theirs)


# -- the engine's mismatch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "bounds", "token"),
    [
        ("token_truncate", (None, 1.5), {"token": "truncate", "ratio_max": 1.5}),
        ("token_mask", (0.7, 1.5), {"token": "mask", "ratio_min": 0.7, "ratio_max": 1.5}),
    ],
)
def test_weights_of_tokens(batch, grpo, learn, mode: str, bounds, token) -> None:
    """TIS and IcePop: the clipped loss against the policy as the step begins, times learner / engine."""
    theirs = grpo(
        batch,
        engine=True,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
    )
    start = _flat(theirs.inputs["old_per_token_logps"], batch)
    chosen = config(
        correction={"proximal": "start", "sequence": "none", **token}, advantage={"scale": "group"}
    )
    same_loss(learn(batch, chosen, Survey(start_N=start)), theirs)
    # As REINFORCE the value is another (log p in the place of a ratio that is 1), the gradient the same.
    chosen = config(
        loss={"method": "reinforce"},
        correction={"sequence": "none", **token},
        advantage={"scale": "group"},
    )
    same_loss(learn(batch, chosen), theirs, value=False)


def test_masks_of_trajectories(batch, grpo) -> None:
    """Which trajectories the product of ratios lets through.

    Those that pass are weighed by the product in theirs, by token in ours: the product of a long trajectory is too
    noisy to multiply with.
    """
    theirs = grpo(
        batch,
        engine=True,
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_min=0.5,
        vllm_importance_sampling_clip_max=2.0,
    )
    gap = _flat(theirs.inputs["old_per_token_logps"], batch) - _by_token(batch)
    lengths = torch.tensor([sample.sampled_count for sample in batch.samples])
    kept = corrections.product_gate(gap, lengths, 0.5, 2.0)
    passed = theirs.inputs["importance_sampling_ratio"].squeeze(1) > 0
    assert kept.tolist() == passed.repeat_interleave(lengths).tolist()
    assert 0 < passed.sum() < len(passed)


# -- RLOO ------------------------------------------------------------------------------------------


def test_rloo_loss(whole, rloo, learn) -> None:
    """The sum over a trajectory's tokens, the mean over trajectories.

    Theirs is the ratio of the whole trajectory, 1 on policy, ours log p: another value, the same gradient. Theirs clips
    that ratio off policy; ours corrects by token or gate.
    """
    chosen = config(
        advantage={"estimator": "rloo"},
        loss={"method": "reinforce", "aggregation": "constant", "constant_tokens": 1},
    )
    same_loss(learn(whole, chosen), rloo(whole), value=False)


def test_rloo_penalty_in_the_reward(whole, rloo, learn) -> None:
    """k1 against the reference, summed over the trajectory and taken off its reward."""
    theirs = rloo(whole, beta=0.2)  # their reference is the model itself: k1 is 0
    same(
        learn(whole, config(advantage={"estimator": "rloo"})).advantages_B,
        theirs.inputs["advantages"],
    )
    with torch.no_grad():
        for parameter in theirs.trainer.ref_model.parameters():
            parameter.mul_(0.9)
    again = theirs.trainer._generate_and_score_completions([{"prompt": "w2"}] * len(whole.samples))
    reference = theirs.trainer._get_per_token_logps_and_entropies(
        theirs.trainer.ref_model,
        torch.cat([again["prompt_ids"], again["completion_ids"]], 1),
        torch.cat([again["prompt_mask"], again["completion_mask"]], 1),
        again["completion_ids"].shape[1],
    )[0]
    chosen = config(
        advantage={"estimator": "rloo"},
        kl={"coefficient": 0.2, "estimator": "k1", "place": "reward"},
    )
    ours = learn(whole, chosen, Survey(reference_N=_flat(reference.detach(), whole)))
    same(ours.advantages_B, again["advantages"])


# -- layouts ---------------------------------------------------------------------------------------


def _by_token(batch) -> torch.Tensor:
    """The engine's log-probabilities of the sampled tokens, one after another."""
    return torch.cat([torch.from_numpy(s.logprobs_T[s.mask_T]) for s in batch.samples])


def _flat(padded_BT: torch.Tensor, batch) -> torch.Tensor:
    """TRL's padded layout as ours: the sampled tokens one after another."""
    rows = [
        row[: len(s.ids_T) - s.prompt_length][torch.from_numpy(s.mask_T[s.prompt_length :])]
        for row, s in zip(padded_BT, batch.samples, strict=True)
    ]
    return torch.cat(rows)
