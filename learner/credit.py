"""Which turn earned the reward. One way of saying so, one function.

    trajectory   every token of a member has the member's advantage
    turns        turn k has the advantage of the discounted return from turn k on, among its group's
    anchors      the member's advantage, plus what the turn's return is above that of turns begun in the same state

A turn is a run of sampled tokens between given ones. Its state is what was given before it: the prompt, or the last
observation. Its reward is `turn_<index>` among the parts of the score; the last turn also has the reward itself.

Shapes: G members of a group, U turns of a member.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from learner.advantages import scaled
from learner.samples import FloatArray

Estimator = Callable[[FloatArray, FloatArray], FloatArray]
"""Rewards and lengths of a group's members to their advantages."""


def turn_returns(rewards_U: FloatArray, discount: float) -> FloatArray:
    """R_k = r_k + discount * R_{k+1}: what follows from each turn on."""
    returns_U = np.zeros(len(rewards_U), np.float64)
    following = 0.0
    for k in range(len(rewards_U) - 1, -1, -1):
        following = float(rewards_U[k]) + discount * following
        returns_U[k] = following
    return returns_U.astype(np.float32)


def by_turn(
    returns_GU: Sequence[FloatArray], lengths_G: FloatArray, estimator: Estimator
) -> list[FloatArray]:
    """The group's estimator at each turn: A_{i,k} = estimator(R_{1,k}, …, R_{G,k})_i.

    Process supervision, arXiv:2402.03300, section 4.1.3, with a baseline for each turn. A member that ended earlier
    stands in with its last turn, so that without discount and rewards of turns it is the trajectory's advantage.
    """
    longest = max((len(returns_U) for returns_U in returns_GU), default=0)
    advantages_GU = [np.zeros(len(returns_U), np.float32) for returns_U in returns_GU]
    members = [index for index, returns_U in enumerate(returns_GU) if len(returns_U)]
    for k in range(longest):
        column = np.array([returns_GU[i][min(k, len(returns_GU[i]) - 1)] for i in members])
        advantages = estimator(column.astype(np.float32), lengths_G[members])
        for place, index in enumerate(members):
            if k < len(returns_GU[index]):
                advantages_GU[index][k] = advantages[place]
    return advantages_GU


def by_anchor(
    returns_GU: Sequence[FloatArray], states_GU: Sequence[Sequence[Hashable]], scale: bool
) -> list[FloatArray]:
    """A_{i,k} = R_{i,k} - mean(R of all turns of the group that began in the same state).

    The step advantage of GiGPO, arXiv:2505.10978; with `scale` divided by their standard deviation. 0 for
    a state that was met once.
    """
    places: defaultdict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for i, states_U in enumerate(states_GU):
        for k, state in enumerate(states_U):
            places[state].append((i, k))
    advantages_GU = [np.zeros(len(returns_U), np.float32) for returns_U in returns_GU]
    for met in places.values():
        returns = np.array([returns_GU[i][k] for i, k in met], np.float32)
        advantages = (returns - returns.mean(dtype=np.float64)).astype(np.float32)
        if scale:
            advantages = scaled(advantages, returns)
        for (i, k), advantage in zip(met, advantages, strict=True):
            advantages_GU[i][k] = advantage
    return advantages_GU
