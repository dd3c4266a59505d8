"""What is done about tokens that another policy sampled: the engine's numbers, or an older version.

`gap_K` is log(learner / engine) of the sampled tokens, without gradient: staleness and numerical mismatch together.

    token mask      outside [min, max] a token is left out: IcePop, arXiv:2510.18855
    truncated       a token's weight is min(ratio, max): TIS, "Your Efficient RL Framework Secretly Brings You
                    Off-Policy RL Training" (2025)
    geometric gate  a trajectory is left out when the geometric mean of its ratios is outside: the mismatch of a token
                    is noise, that of all is a distribution the learner does not have. MIS, "When Speed Kills
                    Stability" (2025)
    product gate    the same with the product, the trajectory's true importance weight
    interpolated    a proximal policy between the engine's and the learner's: A-3PO, arXiv:2512.06547

Shapes: K sampled tokens of a micro-batch, S trajectories of it.
"""

import math

import torch

from learner.losses import per_trajectory


def token_mask(gap_K: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Which tokens are kept: low <= exp(gap) <= high. Not a number is not kept."""
    ratio_K = gap_K.exp()
    return (ratio_K >= low) & (ratio_K <= high)


def geometric_gate(
    gap_K: torch.Tensor, lengths_S: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Which tokens belong to a trajectory with low <= exp(mean(gap)) <= high."""
    return _gate(per_trajectory(gap_K, "mean", lengths_S), lengths_S, low, high)


def product_gate(
    gap_K: torch.Tensor, lengths_S: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Which tokens belong to a trajectory with low <= exp(sum(gap)) <= high."""
    return _gate(per_trajectory(gap_K, "sum", lengths_S), lengths_S, low, high)


def _gate(gap_S: torch.Tensor, lengths_S: torch.Tensor, low: float, high: float) -> torch.Tensor:
    # The bounds in logarithms: the product over a long trajectory has no float32.
    kept_S = (gap_S >= (math.log(low) if low else -math.inf)) & (gap_S <= math.log(high))
    return kept_S.repeat_interleave(lengths_S)


def truncated(gap_K: torch.Tensor, high: float) -> torch.Tensor:
    """min(exp(gap), high)."""
    return gap_K.clamp(max=math.log(high)).exp()


def interpolated_proximal(
    behaviour_K: torch.Tensor, now_K: torch.Tensor, ages_K: torch.Tensor
) -> torch.Tensor:
    """log p = behaviour / (a + 1) + now * a / (a + 1), for a token that is `a` versions old: A-3PO.

    At age 0 the behaviour policy itself, which makes it PPO; the older a token, the nearer to the learner.
    """
    share_K = ages_K / (ages_K + 1)
    return behaviour_K + share_K * (now_K - behaviour_K)
