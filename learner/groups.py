"""Which complete groups are trained. Others are filtered, and new ones are admitted in their place."""

import re
from collections.abc import Sequence
from typing import Literal

from schemas.algorithm import Advantage, Filter
from schemas.trajectory import Trajectory

_TURN = re.compile(r"turn_(0|[1-9][0-9]{0,3})\Z")


def zero_variance(rewards: Sequence[object]) -> bool:
    """Whether all members got the same, so that every advantage would be 0."""
    return all(reward == rewards[0] for reward in rewards)


def refusal(
    rewards: Sequence[float], rules: Filter, outcomes: Sequence[tuple[float, ...]] = ()
) -> Literal["zero_variance", "range"] | None:
    """Why the recipe leaves a group with these rewards out; None when it is trained.

    The dynamic sampling of DAPO, section 3.2, arXiv:2503.14476; the range also takes out what is too easy or too hard.
    `outcomes`: of each member, where advantages depend on more than the reward.
    """
    if rules.zero_variance and zero_variance(outcomes or rewards):
        return "zero_variance"
    if rules.mean_reward:
        least, most = rules.mean_reward
        if not least <= sum(rewards) / len(rewards) <= most:
            return "range"
    return None


def outcome(trajectory: Trajectory, plan: Advantage) -> tuple[float, ...]:
    """What an estimator compares a member by: the reward, or what was got by turn, or the returns from each turn on."""
    reward, earned = trajectory.reward or 0.0, turn_rewards(trajectory)
    if plan.estimator in ("gae", "reinforce++"):
        return (reward, *earned)
    if plan.credit == "trajectory":
        return (reward,)
    rewards_U = [0.0] * max(1, trajectory.turn_count)
    for turn, value in enumerate(earned):
        rewards_U[min(turn, len(rewards_U) - 1)] += value
    rewards_U[-1] += reward
    returns: list[float] = []  # from the last turn on
    for value in reversed(rewards_U):
        returns.append(value + (plan.discount * returns[-1] if returns else 0.0))
    # a member that ended earlier stands in with its last turn
    ended = next((k for k, value in enumerate(returns) if value != returns[0]), len(returns))
    return tuple(returns[max(0, ended - 1) :])


def turn_rewards(trajectory: Trajectory) -> tuple[float, ...]:
    """The parts of its score named `turn_0`, `turn_1`, … in order, 0 where one is missing."""
    parts = trajectory.scored.parts if trajectory.scored else {}
    found = {int(match[1]): value for name, value in parts.items() if (match := _TURN.match(name))}
    return tuple(found.get(turn, 0.0) for turn in range(max(found, default=-1) + 1))
