"""The losses of one token, by hand. Where a ratio is given, the old policy's log-probability is -1."""

import math

import pytest
import torch

from learner import losses


def one(value: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor([value], requires_grad=grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # on policy: d(-r A)/d(log p) = -r A
        (1.2, 1.0, -1.2, -1.2, 0),  # within both bounds
        (1.5, 1.0, -1.28, 0.0, 1),  # better and already likelier: held at 1 + clip_high
        (1.5, -1.0, 1.5, 1.5, 0),  # worse but likelier: the pessimistic side, not clipped
        (0.6, 1.0, -0.6, -0.6, 0),  # better but less likely: not clipped
        (0.6, -1.0, 0.8, 0.0, 1),  # worse and already less likely: held at 1 - clip_low
        (9.0, -1.0, 9.0, 9.0, 0),  # without dual clip the loss has no bound
    ],
)
def test_clip_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int
) -> None:
    """Bounds [0.8, 1.28]: loss and derivative with respect to the log-probability, in each region."""
    log_ratio = one(math.log(ratio), grad=True)
    found = losses.clip(log_ratio, one(advantage), 0.2, 0.28)
    found.loss_K.sum().backward()
    assert found.loss_K.item() == pytest.approx(loss, rel=1e-5)
    assert log_ratio.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert found.clipped_K.item() == clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (9.0, -1.0, 3.0, 0.0),  # held at dual * |A|
        (2.0, -1.0, 2.0, 2.0),  # not that far: as without
        (9.0, 1.0, -1.28, 0.0),  # a positive advantage has its own bound
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    """dual = 3."""
    log_ratio = one(math.log(ratio), grad=True)
    found = losses.clip(log_ratio, one(advantage), 0.2, 0.28, dual=3.0)
    found.loss_K.sum().backward()
    assert found.loss_K.item() == pytest.approx(loss, rel=1e-5)
    assert log_ratio.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_sequence_ratio_by_hand() -> None:
    """Trajectories of 2 and 1 tokens, ratios (4, 1) and 3: the geometric means are 2, 2 and 3.

    With weights 1/length, sum(s_t A / length) of the first is 2 A, and each of its tokens has half of the gradient.
    """
    log_ratio = torch.tensor([4.0, 1.0, 3.0]).log().requires_grad_()
    lengths = torch.tensor([2, 1])
    ratio = losses.sequence_log_ratio(log_ratio, lengths).exp()
    torch.testing.assert_close(ratio, torch.tensor([2.0, 2.0, 3.0]))
    (ratio / torch.tensor([2.0, 2.0, 1.0])).sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([1.0, 1.0, 3.0]))


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.1, 1.1), (3.0, 1.28)])
def test_cispo_by_hand(ratio: float, weight: float) -> None:
    """log p = -2, A = -1.5: the loss is weight * 1.5 * -2, its derivative weight * 1.5, also where it is clipped."""
    logprob = one(-2.0, grad=True)
    found = losses.cispo(one(math.log(ratio)), logprob, one(-1.5), 0.28)
    found.loss_K.sum().backward()
    assert found.loss_K.item() == pytest.approx(-3.0 * weight, rel=1e-5)
    assert logprob.grad.item() == pytest.approx(1.5 * weight, rel=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "advantage", "stopped"),
    [
        (0.6, 0.8, 1.0, 1),  # moved by 0.2, further up
        (0.6, 0.8, -1.0, 0),  # back again
        (0.6, 0.4, -1.0, 1),  # moved by 0.2, further down
        (0.6, 0.7, 1.0, 0),  # moved by 0.1
        (0.001, 0.01, 1.0, 0),  # ten times as likely, and still rare
    ],
)
def test_dppo_by_total_variation(old: float, new: float, advantage: float, stopped: int) -> None:
    """At most 0.15: a stopped token has neither loss nor gradient, any other -rho A, however large rho is."""
    log_ratio = one(math.log(new / old), grad=True)
    found = losses.dppo(log_ratio, one(math.log(old)), one(advantage), "tv", 0.15)
    found.loss_K.sum().backward()
    expected = 0.0 if stopped else -new / old * advantage
    assert found.loss_K.item() == pytest.approx(expected, rel=1e-4)
    assert log_ratio.grad.item() == pytest.approx(expected, rel=1e-4)
    assert found.clipped_K.item() == stopped


@pytest.mark.parametrize(("limit", "stopped"), [(0.09, 1), (0.093, 0)])
def test_dppo_by_binary_kl(limit: float, stopped: int) -> None:
    """From 0.6 to 0.8: 0.6 log(0.6 / 0.8) + 0.4 log(0.4 / 0.2) = -0.17261 + 0.27726 = 0.10465; to 0.79: 0.09251."""
    found = losses.dppo(one(math.log(0.79 / 0.6)), one(math.log(0.6)), one(1.0), "kl", limit)
    assert found.clipped_K.item() == stopped


def test_dppo_of_a_certain_token() -> None:
    """A probability that was 1 and is 1 has not moved: no logarithm of 0 shows."""
    found = losses.dppo(one(0.0), one(0.0), one(1.0), "kl", 0.1)
    assert found.loss_K.item() == -1
    assert found.clipped_K.item() == 0


def test_reinforce_by_hand() -> None:
    """A = 2, log p = -3: 6, and the derivative -2."""
    logprob = one(-3.0, grad=True)
    found = losses.reinforce(logprob, one(2.0))
    found.loss_K.sum().backward()
    assert found.loss_K.item() == 6
    assert logprob.grad.item() == -2


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", -math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, -math.log(2)),
        ("k3", 1 - math.log(2), -1.0),
    ],
)
def test_kl_by_hand(estimator, value: float, gradient: float) -> None:
    """The other policy finds the token twice as likely; the derivative is by the policy's own log-probability.

    k3 = 2 - 1 - log 2; by log p its derivative is -2 + 1.
    """
    logprob = one(-1.0, grad=True)
    found = losses.kl(-1.0 + math.log(2) - logprob, estimator)
    found.sum().backward()
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert logprob.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_k2_has_the_gradient_of_the_divergence_in_the_mean_and_k1_has_none() -> None:
    """p = (0.2, 0.8) from logits, q = (0.5, 0.5): by enumeration, d/dlogits KL(p || q) = p_i (log(p_i/q_i) - KL)."""
    logits = torch.tensor([0.2, 0.8]).log().requires_grad_()
    q = torch.tensor([0.5, 0.5])

    def mean_gradient(estimator):
        logits.grad = None
        logprobs = logits.log_softmax(0)
        (logprobs.exp().detach() * losses.kl(q.log() - logprobs, estimator)).sum().backward()
        return logits.grad.clone()

    p = torch.tensor([0.2, 0.8])
    ratio = (p / q).log()
    torch.testing.assert_close(mean_gradient("k2"), p * (ratio - (p * ratio).sum()))
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_weighted_one_has_the_gradient_of_the_divergence_even_off_policy(estimator: str) -> None:
    """p = (0.2, 0.8) sampled from (0.6, 0.4), against q = (0.5, 0.5): by enumeration as above."""
    logits = torch.tensor([0.2, 0.8]).log().requires_grad_()
    sampler, q = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])
    logprobs = logits.log_softmax(0)
    kl = losses.kl(q.log() - logprobs, estimator)
    (sampler * losses.weighted_kl(kl, logprobs - sampler.log(), estimator)).sum().backward()
    p = torch.tensor([0.2, 0.8])
    ratio = (p / q).log()
    torch.testing.assert_close(logits.grad, p * (ratio - (p * ratio).sum()))


def test_clip_cov_by_hand() -> None:
    """log p = (0, -4), A = (1, -1): the means are -2 and 0, both covariances 2; then two tokens of covariance 0."""
    logprobs = torch.tensor([0.0, -4.0, -2.0, -2.0])
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])

    def stopped(bounds, fraction, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return losses.clip_cov(logprobs, advantages, bounds, fraction, generator).tolist()

    assert stopped((1.0, 5.0), 0.5) == [True, True, False, False]
    assert sum(stopped((1.0, 5.0), 0.01)) == 1  # at least one
    assert stopped((2.0, 5.0), 1.0) == [False] * 4  # the bounds are excluded
    assert {tuple(stopped((1.0, 5.0), 0.25, seed)) for seed in range(20)} == {
        (True, False, False, False),
        (False, True, False, False),
    }
