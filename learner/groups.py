"""Which groups carry a signal."""

from collections.abc import Sequence


def zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all members got the same reward, so that every advantage would be 0."""
    return all(reward == rewards[0] for reward in rewards)
