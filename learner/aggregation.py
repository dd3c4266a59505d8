"""How the losses of tokens become one number: sum(weight * loss) / divisor.

    token_mean      every token of the update counts the same: DAPO, section 3.3, arXiv:2503.14476
    sequence_mean   every trajectory counts the same, whatever its length: GRPO, eq. 3, arXiv:2402.03300
    constant        every trajectory's sum is divided by one constant: Dr. GRPO, section 3.2, arXiv:2503.20783

Tokens that a correction masks stay in the divisor: it is known before the first micro-batch, and a masked token
weakens a step instead of making the others louder.

Shapes: N sampled tokens of the update.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch


class Aggregation(NamedTuple):
    """sum(weights_N * losses_N) / divisor is the update's loss."""

    weights_N: torch.Tensor
    divisor: int


def aggregation(
    sequences_N: torch.Tensor,
    trained_N: torch.Tensor,
    kind: Literal["token_mean", "sequence_mean", "constant"],
    constant_tokens: int,
) -> Aggregation:
    """Weigh tokens by the trajectory that each belongs to; 0 for those that are not trained.

    `token_mean` divides by the trained tokens, the others by all trajectories that have tokens.
    """
    _, places_N, counts = np.unique(sequences_N, return_inverse=True, return_counts=True)
    weights_N = trained_N.float()
    if kind == "sequence_mean":
        return Aggregation(weights_N / torch.from_numpy(counts[places_N]), len(counts))
    if kind == "constant":
        return Aggregation(weights_N, len(counts) * constant_tokens)
    return Aggregation(weights_N, max(1, int(trained_N.sum())))
