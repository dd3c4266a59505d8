"""Which keys fit together, and the line that says what they amount to."""

import subprocess
import sys

import msgspec
import pytest

from learner.combination import contradictions, formula
from schemas.recipe import Recipe


def recipe(**learner) -> Recipe:
    return msgspec.convert(
        {"policy": {"model": "m", "max_tokens": 512}, "learner": learner}, Recipe
    )


KNOWN = {
    "default": (
        {},
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) [0.5 <= rho <= 2] [0.8 <= geometric mean of "
        "rho over the trajectory <= 1.25]; rho = learner / engine; A = R - mean(R of the group); R = reward",
    ),
    "GRPO": (
        {
            "advantage": {"scale": "group"},
            "loss": {"aggregation": "sequence_mean", "clip_high": 0.2},
            "correction": {"token": "none", "sequence": "none"},
            "kl": {"coefficient": 0.04, "weighted": False},
        },
        "loss = mean over trajectories of the mean over tokens of -min(rho A, clip(rho, 0.8, 1.2) A) + 0.04 k3(policy "
        "|| version 0); rho = learner / engine; A = (R - mean(R of the group)) / std(R of the group); R = reward",
    ),
    "Dr. GRPO": (
        {"loss": {"aggregation": "constant"}, "correction": {"sequence": "none"}},
        "loss = mean over trajectories of 1/512 the sum over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) "
        "[0.5 <= rho <= 2]; rho = learner / engine; A = R - mean(R of the group); R = reward",
    ),
    "DAPO": (
        {
            "advantage": {"scale": "group", "overlong_tokens": 128},
            "loss": {"dual_clip": 3.0, "mask_truncated": True},
            "correction": {"token": "none", "sequence": "none"},
        },
        "loss = mean over tokens (truncated ones masked) of -max(min(rho A, clip(rho, 0.8, 1.28) A), 3 A if A < 0); "
        "rho = learner / engine; A = (R - mean(R of the group)) / std(R of the group); "
        "R = reward - 1 ramp(length, 384, 512)",
    ),
    "RLOO with TIS": (
        {
            "advantage": {"estimator": "rloo"},
            "loss": {"method": "reinforce"},
            "correction": {"token": "truncate", "sequence": "none"},
            "kl": {"coefficient": 0.05, "estimator": "k1", "place": "reward"},
        },
        "loss = mean over tokens of -A log p min(w, 2); w = sg(learner / engine); A = R - mean(R of the group's "
        "others); R = reward - 0.05 k1(engine || version 0)",
    ),
    "OPO, uncorrected": (
        {
            "advantage": {"estimator": "opo"},
            "loss": {"method": "reinforce"},
            "correction": {"token": "none", "sequence": "none"},
        },
        "loss = mean over tokens of -A log p; A = R - mean(R of the group, weighted by length); R = reward",
    ),
    "REINFORCE++": (
        {
            "advantage": {"estimator": "reinforce++"},
            "loss": {"method": "reinforce"},
            "correction": {"sequence": "none"},
        },
        "loss = mean over tokens of -A log p w [0.5 <= w <= 2]; w = sg(learner / engine); "
        "A = R whitened over the batch's tokens; R = reward",
    ),
    "GSPO": (
        {
            "loss": {"method": "gspo", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
            "correction": {"token": "none", "sequence": "product"},
        },
        "loss = mean over trajectories of the mean over tokens of -min(s A, clip(s, 0.9997, 1.0004) A) [0.8 <= product "
        "of rho over the trajectory <= 1.25]; rho = learner / engine; s = geometric mean of rho over the trajectory; "
        "A = R - mean(R of the group); R = reward",
    ),
    "CISPO with Clip-Cov": (
        {"loss": {"method": "cispo", "clip_cov_fraction": 0.01}, "correction": {"sequence": "none"}},
        "loss = mean over tokens of -sg(min(rho, 1.28)) A log p [but 0.01 of the tokens, of those with 1 < cov(log p, "
        "A) < 5] [0.5 <= rho <= 2]; rho = learner / engine; A = R - mean(R of the group); R = reward",
    ),
    "DPPO": (
        {"loss": {"method": "dppo", "entropy": 0.01}, "correction": {"token": "none", "sequence": "none"}},
        "loss = mean over tokens of -rho A [not moved away by tv > 0.15] - 0.01 entropy; rho = learner / engine; "
        "A = R - mean(R of the group); R = reward",
    ),
    "PPO": (
        {
            "advantage": {"estimator": "gae", "scale": "batch", "gae_lambda": 0.95},
            "correction": {"sequence": "none"},
            "kl": {"behaviour_coefficient": 0.1},
        },
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) [0.5 <= rho <= 2] "
        "+ 0.1 (learner / engine) k3(policy || engine); "
        "rho = learner / engine; A = GAE(R - V, discount 1, lambda 0.95), whitened over the batch's tokens; "
        "R = reward; V: a value head's, (V - A - V_before)^2 / 2",
    ),
    "GiGPO": (
        {
            "advantage": {"credit": "anchors", "discount": 0.95, "scale": "group"},
            "correction": {"sequence": "none"},
        },
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) [0.5 <= rho <= 2]; rho = learner / engine; "
        "A = (R - mean(R of the group)) / std(R of the group) + 1 (R_turn - mean(R_turn of turns from the same state))"
        " / std of the same, R_turn = the return from the turn on, discount 0.95; R = reward",
    ),
    "turns": (
        {"advantage": {"credit": "turns", "discount": 0.9}, "correction": {"sequence": "none"}},
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) [0.5 <= rho <= 2]; rho = learner / engine; "
        "A = R_turn - mean(R_turn of the group), R_turn = the return from the turn on, discount 0.9; R = reward",
    ),
    "decoupled PPO": (
        {"updates_per_step": 4, "correction": {"proximal": "start", "token": "truncate", "sequence": "none"}},
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) min(w, 2); rho = learner / proximal; "
        "w = proximal / engine; proximal = the learner as the step begins; A = R - mean(R of the group); R = reward",
    ),
    "A-3PO": (
        {"correction": {"proximal": "interpolated", "sequence": "none"}},
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) w [0.5 <= w <= 2]; rho = learner / proximal; "
        "w = proximal / engine; proximal = engine^(1/(age+1)) learner^(age/(age+1)); A = R - mean(R of the group); "
        "R = reward",
    ),
    "distillation": (
        {
            "teacher": {"folder": "big"},
            "advantage": {"estimator": "none"},
            "filter": {"zero_variance": False},
            "correction": {"sequence": "none"},
        },
        "loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) [0.5 <= rho <= 2]; rho = learner / engine; "
        "A = log(teacher / engine)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_the_line_of_a_known_algorithm(name: str) -> None:
    """Its keys fit together, and the line is what the paper says."""
    keys, line = KNOWN[name]
    assert list(contradictions(recipe(**keys))) == []
    assert formula(recipe(**keys)) == line


@pytest.mark.parametrize(
    ("keys", "key", "fix"),
    [
        ({"correction": {"ratio_min": 1.5}}, "correction.ratio_min", "below 1"),
        ({"correction": {"sequence_min": 1.0}}, "correction.sequence_min", "below 1"),
        ({"loss": {"dual_clip": 1.1}}, "loss.dual_clip", "above 1 + loss.clip_high"),
        ({"loss": {"dual_clip": 3.0}}, "loss.dual_clip", "above correction.ratio_max = 2"),
        ({"loss": {"clip_high": 1.0}}, "loss.clip_high", "above correction.ratio_max = 2"),
        (
            {"loss": {"method": "cispo", "clip_high": 4.0}},
            "loss.clip_high",
            "above correction.ratio_max = 2",
        ),
        ({"loss": {"clip_low": 0.5}}, "loss.clip_low", "below correction.ratio_min = 0.5"),
        ({"loss": {"method": "gspo"}}, "loss.aggregation", 'write "sequence_mean"'),
        ({"loss": {"method": "reinforce", "clip_low": 0.1}}, "loss.clip_low", "leave it out"),
        ({"loss": {"divergence_max": 0.1}}, "loss.divergence_max", "without method dppo"),
        ({"loss": {"clip_cov_min": 0.1}}, "loss.clip_cov_min", "clip_cov_fraction above 0"),
        (
            {"loss": {"clip_cov_fraction": 0.1, "clip_cov_min": 9.0}},
            "loss.clip_cov_min",
            "below loss.clip_cov_max",
        ),
        ({"loss": {"constant_tokens": 9}}, "loss.constant_tokens", "aggregation constant"),
        ({"correction": {"proximal": "start"}}, "correction.proximal", "raise learner.updates"),
        (
            {"correction": {"proximal": "interpolated"}, "loss": {"method": "dppo"}},
            "correction.proximal",
            "no proximal policy",
        ),
        ({"correction": {"token": "truncate"}}, "correction.token", "count twice"),
        (
            {"correction": {"token": "none", "ratio_max": 3.0}},
            "correction.ratio_max",
            "token mask or truncate",
        ),
        ({"kl": {"reference": "x"}}, "kl.reference", "kl.coefficient above 0"),
        ({"kl": {"coefficient": 0.1, "estimator": "k1"}}, "kl.estimator", 'or place = "reward"'),
        ({"kl": {"behaviour_coefficient": 0.1, "estimator": "k1"}}, "kl.estimator", '"k2" or'),
        ({"advantage": {"estimator": "none"}}, "advantage.estimator", "a teacher.folder"),
        (
            {"advantage": {"estimator": "none"}, "teacher": {"folder": "x"}},
            "filter.zero_variance",
            "the reward plays no part",
        ),
        (
            {"advantage": {"estimator": "reinforce++", "scale": "group"}},
            "advantage.scale",
            "estimator grpo",
        ),
        (
            {"advantage": {"estimator": "gae", "scale": "group"}},
            "advantage.scale",
            'write "batch" or "none"',
        ),
        ({"advantage": {"discount": 0.9}}, "advantage.discount", "credit turns or anchors"),
        ({"advantage": {"gae_lambda": 0.9}}, "advantage.gae_lambda", "estimator gae"),
        ({"advantage": {"overlong_tokens": 512}}, "advantage.overlong_tokens", "policy.max_tokens"),
        ({"filter": {"mean_reward": [0.5]}}, "filter.mean_reward", "[least, most]"),
        ({"filter": {"mean_reward": [0.9, 0.1]}}, "filter.mean_reward", "[least, most]"),
        ({"updates_per_step": 17}, "updates_per_step", "learner.groups_per_step"),
        ({"teacher": {"coefficient": 2.0}}, "teacher.coefficient", "teacher.folder"),
    ],
)
def test_a_contradiction_is_refused_by_name(keys, key: str, fix: str) -> None:
    """With the key and what to write instead."""
    found = list(contradictions(recipe(**keys)))
    assert [one.key for one in found][:1] == [key]
    assert fix in found[0].fix


def test_the_line_needs_no_torch() -> None:
    """`actors train --dry-run` answers before anything heavy is imported."""
    code = (
        "import sys; import learner.combination, learner.groups; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
