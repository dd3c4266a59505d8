"""How much better a member was than its group. One algorithm, one function.

Shapes: G members of a group.
"""

import numpy as np

from learner.samples import FloatArray


def grpo(rewards_G: FloatArray) -> FloatArray:
    """A_i = r_i - mean(r).

    Not divided by the standard deviation of r, which would weigh up questions that are nearly always or
    nearly never solved: Dr. GRPO, section 3.2 of arXiv:2503.20783. (GRPO itself, arXiv:2402.03300, divides.)
    """
    advantages_G: FloatArray = rewards_G - rewards_G.mean(dtype=np.float64).astype(np.float32)
    return advantages_G
