"""Which complete groups are trained. Others are filtered, and new ones are admitted in their place."""

import re
from collections.abc import Sequence
from typing import Literal

from schemas.algorithm import Filter
from schemas.trajectory import Trajectory

_TURN = re.compile(r"turn_(0|[1-9][0-9]{0,3})\Z")


def zero_variance(rewards: Sequence[object]) -> bool:
    """Whether all members got the same, so that every advantage would be 0."""
    return all(reward == rewards[0] for reward in rewards)


def refusal(
    rewards: Sequence[float], rules: Filter, by_turn: Sequence[tuple[float, ...]] = ()
) -> Literal["zero_variance", "range"] | None:
    """Why the recipe leaves a group with these rewards out; None when it is trained.

    The dynamic sampling of DAPO, section 3.2, arXiv:2503.14476; the range also takes out what is too easy or too hard.
    `by_turn`: what each member's turns got, where advantages are of turns; then these must be equal as well.
    """
    if rules.zero_variance and zero_variance(rewards) and zero_variance(by_turn):
        return "zero_variance"
    if rules.mean_reward:
        least, most = rules.mean_reward
        if not least <= sum(rewards) / len(rewards) <= most:
            return "range"
    return None


def turn_rewards(trajectory: Trajectory) -> tuple[float, ...]:
    """The parts of its score named `turn_0`, `turn_1`, … in order, 0 where one is missing."""
    parts = trajectory.scored.parts if trajectory.scored else {}
    found = {int(match[1]): value for name, value in parts.items() if (match := _TURN.match(name))}
    return tuple(found.get(turn, 0.0) for turn in range(max(found, default=-1) + 1))
