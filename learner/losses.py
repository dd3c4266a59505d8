"""What is minimised, token by token. One algorithm, one function.

Shapes: K sampled tokens of a micro-batch.
"""

from typing import NamedTuple

import torch

from schemas.recipe import Learner

_LOG_RATIO_LIMIT = 20.0
"""Beyond it a ratio is only "far off" (e^20 is 5e8), and its exponential would make a mean infinite."""


class TokenLosses(NamedTuple):
    """The loss of each token, and what metrics are made from; all but `loss_K` are detached."""

    loss_K: torch.Tensor
    ratio_K: torch.Tensor
    kl_K: torch.Tensor
    masked_K: torch.Tensor
    clipped_K: torch.Tensor


def clipped_surrogate(
    logprobs_K: torch.Tensor,
    behaviour_K: torch.Tensor,
    advantages_K: torch.Tensor,
    bounds: Learner,
) -> TokenLosses:
    """The clipped policy-gradient loss against the engine's log-probabilities `behaviour_K`.

        ratio = exp(logprobs - behaviour)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)    PPO, eq. 7, arXiv:1707.06347,
                                                      its two bounds apart: DAPO, eq. 10, arXiv:2503.14476
        loss  = 0 where ratio is outside [ratio_min, ratio_max]                  IcePop, arXiv:2510.18855

    One ratio serves both purposes, since the behaviour policy is the engine itself: staleness and numerical
    mismatch are in it together. A batch's loss is the sum of `loss_K` over its sampled tokens divided by their
    number, masked ones included: the divisor is known before the first micro-batch, and a masked token weakens
    a step instead of making the others louder.

    `kl_K` estimates KL(engine || learner) without bias and never below 0: ratio - 1 - log(ratio), the "k3" of
    J. Schulman, "Approximating KL divergence" (2020). `clipped_K`: kept tokens whose gradient clipping stops.
    """
    log_ratio_K = logprobs_K - behaviour_K
    with torch.no_grad():
        limited_K = log_ratio_K.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        seen_K = limited_K.exp()
        kept_K = (seen_K >= bounds.ratio_min) & (seen_K <= bounds.ratio_max)
    # Masked before the exponential: infinity times 0 in the backward pass would not be 0.
    ratio_K = torch.where(kept_K, log_ratio_K, 0.0).exp()
    bounded_K = ratio_K.clamp(1.0 - bounds.clip_low, 1.0 + bounds.clip_high)
    surrogate_K = torch.minimum(ratio_K * advantages_K, bounded_K * advantages_K)
    with torch.no_grad():
        clipped_K = kept_K & (bounded_K * advantages_K < ratio_K * advantages_K)
    return TokenLosses(
        loss_K=-torch.where(kept_K, surrogate_K, 0.0),
        ratio_K=seen_K,
        kl_K=seen_K - 1.0 - limited_K,
        masked_K=~kept_K,
        clipped_K=clipped_K,
    )
