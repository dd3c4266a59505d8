"""The loss, by hand. Bounds: clip to [0.8, 1.28], mask outside [0.5, 2]."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import grpo
from learner.groups import zero_variance
from learner.losses import clipped_surrogate
from schemas.recipe import Learner

BOUNDS = Learner(clip_low=0.2, clip_high=0.28, ratio_min=0.5, ratio_max=2.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "masked"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),  # on policy: d(-r A)/d(log p) = -r A
        (1.2, 1.0, -1.2, -1.2, 0, 0),  # within both bounds
        (1.5, 1.0, -1.28, 0.0, 1, 0),  # better and already likelier: held at 1 + clip_high
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # worse but likelier: the pessimistic side, not clipped
        (0.6, 1.0, -0.6, -0.6, 0, 0),  # better but less likely: not clipped
        (0.6, -1.0, 0.8, 0.0, 1, 0),  # worse and already less likely: held at 1 - clip_low
        (2.5, 1.0, 0.0, 0.0, 0, 1),  # too far off either way: masked
        (2.5, -1.0, 0.0, 0.0, 0, 1),
        (0.4, 1.0, 0.0, 0.0, 0, 1),
    ],
)
def test_one_token_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int, masked: int
) -> None:
    """Loss and its derivative with respect to the log-probability, in each region of the ratio."""
    logprob = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    result = clipped_surrogate(logprob, torch.tensor([-1.0]), torch.tensor([advantage]), BOUNDS)
    result.loss_K.sum().backward()
    assert result.loss_K.item() == pytest.approx(loss, rel=1e-5)
    assert logprob.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert result.clipped_K.item() == clipped
    assert result.masked_K.item() == masked
    assert result.ratio_K.item() == pytest.approx(ratio, rel=1e-5)
    assert result.kl_K.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


def test_a_vanished_probability_is_masked_without_a_trace() -> None:
    """Ratios of e^200 and e^-200 leave finite metrics, and a gradient of exactly 0."""
    logprobs = torch.tensor([-1.0, -201.0], requires_grad=True)
    result = clipped_surrogate(logprobs, torch.tensor([-201.0, -1.0]), torch.ones(2), BOUNDS)
    result.loss_K.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]
    assert torch.isfinite(result.ratio_K).all()
    assert torch.isfinite(result.kl_K).all()


def test_not_a_number_is_not_masked_away() -> None:
    """A log-probability that is not a number shows in the KL estimate, so that the step is given up."""
    result = clipped_surrogate(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1), BOUNDS)
    assert math.isnan(result.kl_K.item())


def test_grpo_by_hand() -> None:
    """Reward minus the mean, not divided by the deviation."""
    assert grpo(np.array([1, 0, 0, 0], np.float32)).tolist() == [0.75, -0.25, -0.25, -0.25]


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16))
def test_grpo_sums_to_zero(rewards: list[float]) -> None:
    """For any rewards."""
    advantages_G = grpo(np.array(rewards, np.float32))
    assert abs(float(advantages_G.sum(dtype=np.float64))) < 1e-3
    assert not zero_variance(rewards) or np.abs(advantages_G).max() < 1e-4


def test_zero_variance() -> None:
    """Only when all rewards are the same."""
    assert zero_variance([1.0, 1.0])
    assert not zero_variance([1.0, 1.0, 0.5])
