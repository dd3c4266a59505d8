"""How much better a trajectory was than could be expected. One estimator, one function.

    grpo                  r_i - mean(r)                              the group's mean
    rloo                  r_i - mean(r without r_i)                  the mean of the others
    opo                   r_i - sum(l r) / sum(l)                    the group's mean, weighted by length
    reinforce++           r_i, then whitened over the batch          no baseline but the batch's mean
    reinforce++_baseline  r_i - mean(r), then whitened over the batch
    gae                   by token, from a value head

Shapes: G members of a group, B members of the whole batch, T tokens, N sampled tokens of the whole batch.
"""

import numpy as np

from learner.samples import FloatArray

STD_EPSILON = 1e-4
"""Added to every standard deviation that is divided by, so that one of 0 does no harm."""


def grpo(rewards_G: FloatArray) -> FloatArray:
    """A_i = r_i - mean(r).

    Not divided by the standard deviation of r, which would weigh up questions that are nearly always or
    nearly never solved: Dr. GRPO, section 3.2 of arXiv:2503.20783. (GRPO itself, arXiv:2402.03300, section 4.1.2,
    divides: `scaled` after it.)
    """
    advantages_G: FloatArray = rewards_G - rewards_G.mean(dtype=np.float64).astype(np.float32)
    return advantages_G


def rloo(rewards_G: FloatArray) -> FloatArray:
    """A_i = r_i - sum(r_j, j != i) / (G - 1): REINFORCE leave-one-out, arXiv:2402.14740.

    The baseline does not know r_i, so that the gradient is unbiased; it is grpo times G / (G - 1).
    """
    rewards = rewards_G.astype(np.float64)
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    advantages_G: FloatArray = (rewards - others).astype(np.float32)
    return advantages_G


def opo(rewards_G: FloatArray, lengths_G: FloatArray) -> FloatArray:
    """A_i = r_i - sum(l_j r_j) / sum(l_j): on-policy RL with optimal reward baseline, arXiv:2505.23585.

    The baseline of least variance, where the square of a trajectory's gradient grows with the number l of its sampled
    tokens.
    """
    rewards, lengths = rewards_G.astype(np.float64), lengths_G.astype(np.float64)
    baseline = (lengths * rewards).sum() / max(1.0, lengths.sum())
    advantages_G: FloatArray = (rewards - baseline).astype(np.float32)
    return advantages_G


def scaled(advantages_G: FloatArray, rewards_B: FloatArray) -> FloatArray:
    """A_i / (std(r) + 1e-4), the sample standard deviation (n - 1).

    Over the group's own rewards: GRPO, arXiv:2402.03300, section 4.1.2. Over the whole batch's: arXiv:2508.08221,
    where a group with nearly equal rewards is not blown up.
    """
    if len(rewards_B) < 2:
        return advantages_G
    deviation = rewards_B.std(ddof=1, dtype=np.float64) + STD_EPSILON
    scaled_G: FloatArray = (advantages_G / deviation).astype(np.float32)
    return scaled_G


def whitened(advantages_N: FloatArray) -> FloatArray:
    """(A_t - mean(A)) / (std(A) + 1e-4) over all sampled tokens of the batch: REINFORCE++, arXiv:2501.03262.

    A long trajectory counts once for each of its tokens.
    """
    if len(advantages_N) < 2:
        return advantages_N
    values = advantages_N.astype(np.float64)
    whitened = (values - values.mean()) / (values.std(ddof=1) + STD_EPSILON)
    whitened_N: FloatArray = whitened.astype(np.float32)
    return whitened_N


def gae(rewards_T: FloatArray, values_T: FloatArray, discount: float, trace: float) -> FloatArray:
    """Generalised advantage estimation: arXiv:1506.02438, eq. 16; nothing follows the last token.

        delta_t = r_t + discount * V_{t+1} - V_t
        A_t     = delta_t + discount * trace * A_{t+1}

    T are a trajectory's sampled tokens: a token that was given is no action. A_t + V_t is what the value is to learn.
    """
    advantages_T = np.zeros(len(rewards_T), np.float64)
    following, next_value = 0.0, 0.0
    for t in range(len(rewards_T) - 1, -1, -1):
        delta = float(rewards_T[t]) + discount * next_value - float(values_T[t])
        following = delta + discount * trace * following
        advantages_T[t], next_value = following, float(values_T[t])
    return advantages_T.astype(np.float32)


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """The soft overlong punishment, between 0 and 1: DAPO, arXiv:2503.14476, eq. 13.

    0 up to `limit - buffer` tokens, from there in a straight line to 1 at the limit. (The paper's is negative.)
    """
    if not buffer:
        return 0.0
    return min(1.0, max(0.0, (length - (limit - buffer)) / buffer))
