"""Which complete groups are trained. Others are filtered, and new ones are admitted in their place."""

from collections.abc import Sequence
from typing import Literal

from schemas.recipe import Filter


def zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all members got the same reward, so that every advantage would be 0."""
    return all(reward == rewards[0] for reward in rewards)


def refusal(rewards: Sequence[float], rules: Filter) -> Literal["zero_variance", "range"] | None:
    """Why the recipe leaves a group with these rewards out; None when it is trained.

    The dynamic sampling of DAPO, section 3.2, arXiv:2503.14476; the range also takes out what is too easy or too hard.
    """
    if rules.zero_variance and zero_variance(rewards):
        return "zero_variance"
    if rules.mean_reward:
        least, most = rules.mean_reward
        if not least <= sum(rewards) / len(rewards) <= most:
            return "range"
    return None
