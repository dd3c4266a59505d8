"""What is kept and what it weighs, and how tokens become one number; by hand."""

import math

import pytest
import torch

from learner import corrections
from learner.aggregation import aggregation
from learner.groups import outcome, refusal, zero_variance
from schemas.algorithm import Advantage, Filter
from schemas.events import Admitted, Scored, Turn
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios).log()


LENGTHS = torch.tensor([2, 3])


def test_token_mask() -> None:
    """[0.5, 2], bounds included; what is not a number is not kept."""
    gap = torch.cat([logs(0.49, 0.5, 1.0, 2.0, 2.01), torch.tensor([math.nan])])
    assert corrections.token_mask(gap, 0.5, 2.0).tolist() == [False, True, True, True, False, False]


def test_geometric_gate() -> None:
    """Ratios (4, 1/4) have a geometric mean of 1, however far each is; (1.5, 1.5, 1) have 2.25^(1/3) = 1.31."""
    gap = logs(4, 0.25, 1.5, 1.5, 1)
    assert corrections.geometric_gate(gap, LENGTHS, 0.8, 1.25).tolist() == [True] * 2 + [False] * 3
    assert corrections.geometric_gate(gap, LENGTHS, 0.8, 1.32).all()


def test_product_gate() -> None:
    """The same have products of 1 and 2.25; a product beyond float32 is outside, not an error."""
    gap = logs(4, 0.25, 1.5, 1.5, 1)
    assert corrections.product_gate(gap, LENGTHS, 0.5, 2.0).tolist() == [True] * 2 + [False] * 3
    assert corrections.product_gate(gap, LENGTHS, 0.0, 2.3).all()
    far = torch.full((5,), 90.0)
    assert not corrections.product_gate(far, LENGTHS, 0.5, 2.0).any()


def test_truncated() -> None:
    """min(ratio, 2)."""
    found = corrections.truncated(logs(0.1, 1, 2, 50), 2.0)
    torch.testing.assert_close(found, torch.tensor([0.1, 1.0, 2.0, 2.0]))


def test_interpolated_proximal() -> None:
    """Behaviour -4, now -1: age 0 gives -4, age 1 half of the way, age 2 two thirds."""
    found = corrections.interpolated_proximal(
        torch.full((3,), -4.0), torch.full((3,), -1.0), torch.tensor([0, 1, 2])
    )
    torch.testing.assert_close(found, torch.tensor([-4.0, -2.5, -2.0]))


# -- aggregation -----------------------------------------------------------------------------------

SEQUENCES = torch.tensor([0, 1, 1, 1, 2, 2])
"""Trajectories of 1, 3 and 2 tokens."""


def total(kind, trained=(1, 1, 1), constant=10) -> float:
    """Of losses 1, 2, 3, 4, 5, 6."""
    trained_N = torch.tensor(trained).bool()[SEQUENCES]
    weights_N, divisor = aggregation(SEQUENCES, trained_N, kind, constant)
    return round((weights_N * torch.arange(1.0, 7.0)).sum().item() / divisor, 5)


def test_aggregation_by_hand() -> None:
    """21 / 6; (1 + 9/3 + 11/2) / 3 = 9.5 / 3; 21 / (3 * 10)."""
    assert total("token_mean") == 3.5
    assert total("sequence_mean") == 3.16667
    assert total("constant") == 0.7


def test_untrained_trajectories() -> None:
    """Without the second: 12 / 3; (1 + 5.5) / 3 and 12 / 30: the number of trajectories stays."""
    assert total("token_mean", (1, 0, 1)) == 4.0
    assert total("sequence_mean", (1, 0, 1)) == 2.16667
    assert total("constant", (1, 0, 1)) == 0.4
    assert total("token_mean", (0, 0, 0)) == 0.0


# -- groups ----------------------------------------------------------------------------------------


def test_zero_variance() -> None:
    """Only when all rewards are the same."""
    assert zero_variance([1.0, 1.0])
    assert not zero_variance([1.0, 1.0, 0.5])


def test_refusal() -> None:
    """Zero variance unless that is allowed; then a mean outside the range, whose bounds are within."""
    assert refusal([1.0, 1.0], Filter()) == "zero_variance"
    assert refusal([1.0, 0.0], Filter()) is None
    assert refusal([1.0, 1.0], Filter(zero_variance=False)) is None
    assert refusal([1.0, 1.0], Filter(zero_variance=False, mean_reward=[0.1, 0.9])) == "range"
    assert refusal([1.0, 0.0, 0.0, 0.0], Filter(mean_reward=[0.5, 0.9])) == "range"
    assert refusal([1.0, 0.0], Filter(mean_reward=[0.5, 0.9])) is None
    # the same reward in the end is not the same
    assert refusal([1.0, 1.0], Filter(), [(0.5, 0.0), (0.0, 0.5)]) is None
    assert refusal([1.0, 1.0], Filter(), [(0.5,), (0.5,)]) == "zero_variance"


def scored(reward: float, turns: int, *by_turn: float) -> Trajectory:
    """So many turns, of which the first ones got something."""
    name = "g0-0-0"
    tokens = Tokens.given([1]) + Tokens.sampled([2], [-1.0], [0])
    return Trajectory(
        admitted=Admitted(
            trajectory=name, task="t", public=PublicPart(messages=[]), private_key=""
        ),
        turns=[Turn(trajectory=name, tokens=tokens, text="") for _ in range(turns)],
        scored=Scored(
            trajectory=name, reward=reward, parts={f"turn_{k}": v for k, v in enumerate(by_turn)}
        ),
        seq=1,
    )


@pytest.mark.parametrize(
    ("plan", "same", "other"),
    [
        # of the whole: what turns got beside it is not compared
        (Advantage(), [scored(1, 1), scored(1, 2, 0.5)], scored(0, 1)),
        # by token, whatever the credit
        (Advantage(estimator="gae"), [scored(0, 1, 1), scored(0, 2, 1)], scored(0, 1)),
        (Advantage(estimator="reinforce++"), [scored(0, 1, 1), scored(0, 2, 1)], scored(0, 1)),
        # returns 1; 1, 1; and with a turn's reward 1.5, 1
        (Advantage(credit="turns"), [scored(1, 1), scored(1, 2)], scored(1, 2, 0.5)),
        # returns 1 against 0.9, 1
        (Advantage(credit="turns", discount=0.9), [scored(1, 1), scored(1, 1)], scored(1, 2)),
        (Advantage(credit="anchors", discount=0.9), [scored(1, 2), scored(1, 2)], scored(1, 1)),
    ],
)
def test_what_is_compared(plan: Advantage, same: list[Trajectory], other: Trajectory) -> None:
    """Members that an estimator cannot tell apart have no variance; those that it can have one."""

    def refused(*members: Trajectory) -> str | None:
        rewards = [member.reward or 0.0 for member in members]
        return refusal(rewards, Filter(), [outcome(member, plan) for member in members])

    assert refused(*same) == "zero_variance"
    assert refused(*same, other) is None
