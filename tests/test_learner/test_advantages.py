"""Advantages by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner import advantages, credit


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def close(found, expected) -> None:
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-5, atol=1e-6)


def test_grpo_by_hand() -> None:
    """Mean 1/4: 1 - 1/4 and 0 - 1/4."""
    assert advantages.grpo(array(1, 0, 0, 0)).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_by_hand() -> None:
    """The others' means are 0, 1/3, 1/3, 1/3."""
    close(advantages.rloo(array(1, 0, 0, 0)), [1, -1 / 3, -1 / 3, -1 / 3])


def test_opo_by_hand() -> None:
    """Lengths 1, 2, 5 and rewards 1, 0, 1: the baseline is (1 * 1 + 5 * 1) / 8 = 3/4."""
    close(advantages.opo(array(1, 0, 1), array(1, 2, 5)), [0.25, -0.75, 0.25])


def test_opo_of_silent_members() -> None:
    """Nobody sampled a token: a baseline of 0, and no division by 0."""
    close(advantages.opo(array(1, 0), array(0, 0)), [1, 0])


def test_scaled_by_hand() -> None:
    """Rewards 1, 0, 0, 0: squares of the distances are 9/16 + 3/16 = 3/4, over 3 is 1/4, so the deviation is 1/2."""
    rewards = array(1, 0, 0, 0)
    close(
        advantages.scaled(advantages.grpo(rewards), rewards), [0.75 / 0.5001] + [-0.25 / 0.5001] * 3
    )


def test_scaled_by_the_batch() -> None:
    """Rewards of the batch 1, 0, 1, 1, mean 3/4: 3/16 + 9/16 = 3/4, over 3: again 1/2; of one member: nothing."""
    close(advantages.scaled(array(0.5, -0.5), array(1, 0, 1, 1)), [0.5 / 0.5001, -0.5 / 0.5001])
    assert advantages.scaled(array(0.5), array(1.0)).tolist() == [0.5]


def test_whitened_by_hand() -> None:
    """1, 1, 4 have mean 2 and squares 1 + 1 + 4 = 6, over 2 is 3."""
    deviation = 3**0.5 + 1e-4
    close(advantages.whitened(array(1, 1, 4)), [-1 / deviation, -1 / deviation, 2 / deviation])
    assert advantages.whitened(array(7)).tolist() == [7]


def test_gae_by_hand() -> None:
    """Rewards 0, 0, 1, values 0.5, 0.4, 0.8, discount 0.9, lambda 0.5.

    delta = (0.9 * 0.4 - 0.5, 0.9 * 0.8 - 0.4, 1 - 0.8) = (-0.14, 0.32, 0.2); from the end
    A = 0.2; 0.32 + 0.45 * 0.2 = 0.41; -0.14 + 0.45 * 0.41 = 0.0445.
    """
    close(advantages.gae(array(0, 0, 1), array(0.5, 0.4, 0.8), 0.9, 0.5), [0.0445, 0.41, 0.2])


def test_gae_without_values_is_the_return() -> None:
    """Discount and lambda 1: the sum of what follows."""
    close(advantages.gae(array(1, -2, 3), array(0, 0, 0), 1.0, 1.0), [2, 1, 3])


@pytest.mark.parametrize(("length", "lost"), [(70, 0), (80, 0), (85, 0.25), (100, 1), (130, 1)])
def test_overlong_by_hand(length: int, lost: float) -> None:
    """A limit of 100 with a buffer of 20: nothing up to 80, then a twentieth for each token, at most 1."""
    assert advantages.overlong_penalty(length, 100, 20) == pytest.approx(lost)


def test_no_buffer_is_no_penalty() -> None:
    """The default: lengths play no part, even at the limit."""
    assert advantages.overlong_penalty(100, 100, 0) == 0


REWARDS = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16)


@given(REWARDS)
def test_centred_advantages_sum_to_zero(rewards: list[float]) -> None:
    """For any rewards, whatever is subtracted: grpo, rloo, and opo weighted by length."""
    rewards_G = array(*rewards)
    lengths_G = array(*range(1, len(rewards) + 1))
    for found_G in (
        advantages.grpo(rewards_G),
        advantages.rloo(rewards_G),
        advantages.opo(rewards_G, lengths_G) * lengths_G,
        advantages.whitened(rewards_G),
    ):
        assert abs(float(found_G.sum(dtype=np.float64))) < 2e-3 * len(rewards)


# -- turns -----------------------------------------------------------------------------------------


def grpo_of(rewards_G, lengths_G):
    return advantages.grpo(rewards_G)


def test_turn_returns_by_hand() -> None:
    """Rewards 1, 0, 2, discount 1/2: 2; 0 + 1; 1 + 1/2."""
    close(credit.turn_returns(array(1, 0, 2), 0.5), [1.5, 1, 2])


def test_by_turn_by_hand() -> None:
    """Returns (3, 1) and (1): turn 0 compares 3 with 1; at turn 1 the second stands in with its last: 1 with 1."""
    found = credit.by_turn([array(3, 1), array(1)], array(2, 1), grpo_of)
    assert [advantages_U.tolist() for advantages_U in found] == [[1, 0], [-1]]


def test_turns_without_rewards_of_their_own_are_grpo() -> None:
    """Every turn of a member then has the member's advantage, however many turns each has."""
    rewards, turns = array(1, 0, 0.5), (3, 1, 2)
    returns = [
        credit.turn_returns(array(*[0] * (n - 1), r), 1.0)
        for r, n in zip(rewards, turns, strict=True)
    ]
    found = credit.by_turn(returns, array(*turns), grpo_of)
    for advantages_U, expected in zip(found, advantages.grpo(rewards), strict=True):
        close(advantages_U, [expected] * len(advantages_U))


def test_anchors_by_hand() -> None:
    """Both begin in p: returns 1 and 0, mean 1/2. Only one meets q. o is met three times, twice by one member:

    returns 1, 0.5, 0, mean 0.5.
    """
    found = credit.by_anchor(
        [array(1, 1, 0.5), array(0, 0, 0)], [["p", "o", "o"], ["p", "q", "o"]], scale=False
    )
    assert [advantages_U.tolist() for advantages_U in found] == [[0.5, 0.5, 0], [-0.5, 0, -0.5]]


def test_scaled_anchors_by_hand() -> None:
    """Returns 1 and 0 have a deviation of sqrt(1/2); a state met once stays 0."""
    found = credit.by_anchor([array(1, 5), array(0)], [["p", "q"], ["p"]], scale=True)
    deviation = 0.5**0.5 + 1e-4
    close(found[0], [0.5 / deviation, 0])
    close(found[1], [-0.5 / deviation])
