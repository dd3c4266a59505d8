"""What is minimised, token by token. One algorithm, one function.

`log_ratio_K` is log(policy / old policy) of the sampled tokens and has the gradient; advantages have none. Every
function gives the loss of each token, and which tokens it stops from moving on ("clipped", a metric).

    clip        PPO, GRPO, DAPO      -min(rho A, clip(rho) A)
    gspo        the same, with the trajectory's geometric mean ratio in the place of rho
    cispo       -sg(min(rho, high)) A log p
    dppo        -rho A, unless that moves a token further that has moved too far
    reinforce   -A log p

Shapes: K sampled tokens of a micro-batch, S trajectories of it.
"""

from typing import Literal, NamedTuple

import torch

LOG_RATIO_LIMIT = 20.0
"""Beyond it a ratio is only "far off" (e^20 is 5e8), and its exponential would make a mean infinite."""


class TokenLosses(NamedTuple):
    """Of each token."""

    loss_K: torch.Tensor
    clipped_K: torch.Tensor
    """Whether it gets no gradient where the plain policy gradient would give one; detached."""


def clip(
    log_ratio_K: torch.Tensor,
    advantages_K: torch.Tensor,
    low: float,
    high: float,
    dual: float = 0.0,
) -> TokenLosses:
    """The clipped policy gradient.

        rho  = exp(log_ratio)
        loss = -min(rho * A, clip(rho, 1 - low, 1 + high) * A)    PPO, eq. 7, arXiv:1707.06347; its two bounds
                                                                  apart: DAPO, eq. 10, arXiv:2503.14476
        loss = min(loss, -dual * A)  where A < 0 and dual > 0     dual clip, eq. 5, arXiv:1912.09729

    Without the dual clip a token that got much likelier and is worse than expected has a loss without bound.
    """
    ratio_K = log_ratio_K.exp()
    bounded_K = ratio_K.clamp(1.0 - low, 1.0 + high)
    surrogate_K = torch.minimum(ratio_K * advantages_K, bounded_K * advantages_K)
    with torch.no_grad():
        clipped_K = bounded_K * advantages_K < ratio_K * advantages_K
    if dual:
        floor_K = dual * advantages_K
        too_far_K = (advantages_K < 0) & (surrogate_K < floor_K)
        surrogate_K = torch.where(too_far_K, floor_K, surrogate_K)
        clipped_K = clipped_K | too_far_K
    return TokenLosses(-surrogate_K, clipped_K)


def per_trajectory(
    values_K: torch.Tensor, reduce: Literal["mean", "sum"], lengths_S: torch.Tensor
) -> torch.Tensor:
    """The mean or the sum over each trajectory's tokens, which lie side by side."""
    # unchecked: several ranks share micro-batches out, and one may get no trajectory, which torch calls an error
    return torch.segment_reduce(values_K, reduce, lengths=lengths_S, unsafe=True)


def sequence_log_ratio(log_ratio_K: torch.Tensor, lengths_S: torch.Tensor) -> torch.Tensor:
    """The trajectory's ratio at each of its tokens: GSPO-token, arXiv:2507.18071, section 4.3.

        s = exp(mean over the trajectory of log_ratio)
        s_t = sg(s) * p_t / sg(p_t)

    In value s; the gradient of the mean over the trajectory is that of s itself (GSPO, eq. 5). `lengths_S` are the
    tokens of each trajectory, which lie side by side.
    """
    mean_S = per_trajectory(log_ratio_K.detach(), "mean", lengths_S)
    mean_K = mean_S.repeat_interleave(lengths_S, output_size=len(log_ratio_K))
    return mean_K + (log_ratio_K - log_ratio_K.detach())


def cispo(
    log_ratio_K: torch.Tensor, logprobs_K: torch.Tensor, advantages_K: torch.Tensor, high: float
) -> TokenLosses:
    """loss = -sg(min(rho, 1 + high)) * A * log p: MiniMax-M1, section 3.1, arXiv:2506.13585.

    The weight is clipped and not the update: every token keeps a gradient.
    """
    ratio_K = log_ratio_K.detach().exp()
    weight_K = ratio_K.clamp(max=1.0 + high)
    return TokenLosses(-weight_K * advantages_K * logprobs_K, torch.zeros_like(ratio_K).bool())


def dppo(
    log_ratio_K: torch.Tensor,
    old_K: torch.Tensor,
    advantages_K: torch.Tensor,
    divergence: Literal["tv", "kl"],
    limit: float,
) -> TokenLosses:
    """loss = -m * rho * A; m = 0 where the token moved too far and would move on: DPPO, arXiv:2602.04879.

        p = exp(old + log_ratio), q = exp(old)
        D = |p - q|                                             "tv", of token or not token
        D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))       "kl", the same two
        m = 0 where D > limit and (A > 0 and rho > 1, or A < 0 and rho < 1)

    A rare token may grow by a large ratio, since it moves little probability; a common one may not.
    """
    ratio_K = log_ratio_K.exp()
    with torch.no_grad():
        p_K, q_K = (old_K + log_ratio_K).exp(), old_K.exp()
        distance_K = (p_K - q_K).abs() if divergence == "tv" else _binary_kl(q_K, p_K)
        away_K = ((advantages_K > 0) & (ratio_K > 1)) | ((advantages_K < 0) & (ratio_K < 1))
        stopped_K = away_K & (distance_K > limit)
    loss_K = -torch.where(stopped_K, 0.0, ratio_K * advantages_K)
    return TokenLosses(loss_K, stopped_K)


def _binary_kl(q_K: torch.Tensor, p_K: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(torch.float32).tiny
    rest_q_K, rest_p_K = (1 - q_K).clamp(min=tiny), (1 - p_K).clamp(min=tiny)
    sampled_K = q_K * (q_K.clamp(min=tiny).log() - p_K.clamp(min=tiny).log())
    return sampled_K + rest_q_K * (rest_q_K.log() - rest_p_K.log())


def reinforce(logprobs_K: torch.Tensor, advantages_K: torch.Tensor) -> TokenLosses:
    """loss = -A * log p: Williams (1992), "Simple statistical gradient-following algorithms", eq. 11."""
    return TokenLosses(-advantages_K * logprobs_K, torch.zeros_like(advantages_K).bool())


def kl(log_ratio_K: torch.Tensor, estimator: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """Estimate KL(policy || other) from a token that the policy sampled; `log_ratio` is log(other / policy).

        k1 = -log_ratio                       without bias; its gradient's mean is 0, so it is no loss
        k2 = log_ratio^2 / 2                  its gradient's mean is that of the divergence
        k3 = exp(log_ratio) - 1 - log_ratio   without bias, never below 0; GRPO's, arXiv:2402.03300, eq. 4

    J. Schulman, "Approximating KL divergence" (2020); the gradients: arXiv:2506.09477.
    """
    if estimator == "k1":
        return -log_ratio_K
    if estimator == "k2":
        return log_ratio_K.square() / 2
    limited_K = log_ratio_K.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return limited_K.exp() - 1.0 - limited_K


def weighted_kl(
    kl_K: torch.Tensor, log_ratio_K: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """rho * k of each token: DeepSeek-V3.2, arXiv:2512.02556, section 3.1.

    The weight corrects for the policy that sampled the token. Its own gradient is what k3 lacks to have the
    divergence's; k2 has that already, so there the weight has none.
    """
    ratio_K = (log_ratio_K.detach() if estimator == "k2" else log_ratio_K).exp()
    return ratio_K * kl_K


def clip_cov(
    logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    bounds: tuple[float, float],
    fraction: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Which tokens get no gradient, so that entropy lasts: Clip-Cov, arXiv:2505.22617, section 4.2.

        cov_t = (log p_t - mean(log p)) * (A_t - mean(A))           over the batch

    Of the tokens with `bounds[0] < cov < bounds[1]`, those are drawn that make up `fraction` of all (at least one).
    """
    covariance_N = (logprobs_N - logprobs_N.mean()) * (advantages_N - advantages_N.mean())
    candidates = torch.nonzero((covariance_N > bounds[0]) & (covariance_N < bounds[1])).squeeze(1)
    count = min(len(candidates), max(1, int(fraction * len(logprobs_N))))
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    stopped_N = torch.zeros(len(logprobs_N), dtype=torch.bool)
    stopped_N[chosen] = True
    return stopped_N
