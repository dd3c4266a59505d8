"""The recipe's loss of a micro-batch, term by term, and what is measured of it."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from learner.advantages import grpo
from learner.batch import Survey, Tokens, tokens_of
from learner.logprobs import TokenLogprobs, sampled_logprobs
from learner.objective import Objective
from learner.pack import MicroBatch, pack
from learner.policy import Policy
from schemas import recipe
from schemas.images import ImageInput

NONE = {"token": "none", "sequence": "none"}


def config(**learner) -> recipe.Recipe:
    tables = {"policy": {"model": "m", "max_tokens": 100}, "learner": learner}
    return msgspec.convert(tables, recipe.Recipe)


# Three trajectories of 2, 1 and 2 tokens.
BEHAVIOUR = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
RATIOS = torch.tensor([1.2, 0.9, 3.0, 1.1, 1.5])
ADVANTAGES = torch.tensor([1.0, 1.0, -2.0, 0.5, 0.5])


def tokens(**changes) -> Tokens:
    fields = {
        "behaviour_N": BEHAVIOUR,
        "ages_N": torch.tensor([0, 0, 2, 0, 1]),
        "sequences_N": torch.tensor([0, 0, 1, 2, 2]),
        "trained_N": torch.ones(5, dtype=torch.bool),
        "advantages_N": ADVANTAGES,
    }
    return Tokens(**fields | changes)


def batch_of(*places: int) -> MicroBatch:
    unread, found = np.zeros(1, np.int64), np.array(places, np.int64)
    return MicroBatch(*[unread] * 5, sources_K=found, targets_K=found, tokens_K=found)


def now_of(ratios=RATIOS, entropies=None, grad=False) -> TokenLogprobs:
    logprobs = (BEHAVIOUR + ratios.log()).requires_grad_(grad)
    entropies = torch.ones(len(BEHAVIOUR)) if entropies is None else entropies
    return TokenLogprobs(logprobs, entropies, torch.zeros(len(BEHAVIOUR), 4))


def loss(recipe_: recipe.Recipe, now=None, tokens_=None) -> float:
    """Of one micro-batch with all five tokens."""
    objective = Objective(recipe_, tokens_ or tokens(), (0, 1))
    return objective(batch_of(0, 1, 2, 3, 4), now or now_of()).loss.item() / objective.divisor


def test_the_default_by_hand() -> None:
    """Clip to [0.8, 1.28]: -1.2, -0.9, (3 is masked), -0.55, -0.64. The geometric mean of the third trajectory,

    sqrt(1.65) = 1.2845, is above 1.25: its two tokens are masked. Left: -2.1 over 5 tokens.
    """
    assert loss(config()) == pytest.approx(-2.1 / 5)


def test_without_correction_by_hand() -> None:
    """-1.2 - 0.9 + 3 * 2 - 0.55 - 0.64."""
    assert loss(config(correction=NONE)) == pytest.approx(2.71 / 5)


def test_token_mask_alone_by_hand() -> None:
    """The 3 is masked and stays in the divisor."""
    assert loss(config(correction={"sequence": "none"})) == pytest.approx(-3.29 / 5)


def test_product_gate_by_hand() -> None:
    """Products 1.08, 3, 1.65."""
    chosen = {"token": "none", "sequence": "product", "sequence_max": 1.5}
    assert loss(config(correction=chosen)) == pytest.approx(-2.1 / 5)


@pytest.mark.parametrize(
    ("token", "weights"),
    [
        ("none", [1, 1, 1, 1, 1]),
        ("truncate", [1.2, 0.9, 2.0, 1.1, 1.5]),  # TIS
        ("mask", [1.2, 0.9, 0.0, 1.1, 1.5]),  # IcePop
    ],
)
def test_reinforce_with_weights_by_hand(token: str, weights: list[float]) -> None:
    """-w A log p."""
    chosen = config(loss={"method": "reinforce"}, correction={"token": token, "sequence": "none"})
    logprobs = BEHAVIOUR + RATIOS.log()
    expected = -(torch.tensor(weights) * ADVANTAGES * logprobs).sum().item() / 5
    assert loss(chosen) == pytest.approx(expected, rel=1e-5)


def test_gspo_by_hand() -> None:
    """s = sqrt(1.08) = 1.0392, 3, sqrt(1.65) = 1.2845; clip to [0.8, 1.28]; means by trajectory."""
    chosen = config(loss={"method": "gspo", "aggregation": "sequence_mean"}, correction=NONE)
    assert loss(chosen) == pytest.approx((-(1.08**0.5) + 6 - 1.28 * 0.5) / 3, rel=1e-5)


def test_interpolated_proximal_by_hand() -> None:
    """Age 0: the engine's, w = 1 and rho the ratio. Age 2: w = 3^(2/3), rho = 3^(1/3); age 1: both sqrt(1.5)."""
    chosen = config(correction={"proximal": "interpolated", **NONE})
    third = 3 ** (2 / 3) * 3 ** (1 / 3) * 2  # worse and likelier: not clipped
    fifth = -(1.5**0.5) * min(1.5**0.5, 1.28) * 0.5
    assert loss(chosen) == pytest.approx((-1.2 - 0.9 + third - 0.55 + fifth) / 5, rel=1e-5)


def test_proximal_from_the_start_by_hand() -> None:
    """The start lies 0.1 above the engine: w = e^0.1 (below 2), rho = ratio / w."""
    chosen = config(
        updates_per_step=2,
        correction={"proximal": "start", "token": "truncate", "sequence": "none"},
    )
    weight = math.exp(0.1)
    rho = RATIOS / weight
    surrogate = torch.minimum(rho * ADVANTAGES, rho.clamp(0.8, 1.28) * ADVANTAGES)
    found = loss(chosen, tokens_=tokens(start_N=BEHAVIOUR + 0.1))
    assert found == pytest.approx(-(weight * surrogate).mean().item(), rel=1e-5)


def test_divergences_and_entropy_by_hand() -> None:
    """Nothing but the terms that are added: without advantages and corrections.

    The reference finds each token twice as likely as the policy: k3 = 2 - 1 - log 2. Entropy 1, weight 0.1. Against
    the engine ratio * k2, k2 = log(ratio)^2 / 2.
    """
    kl = {"coefficient": 0.5, "weighted": False}
    now = now_of()
    still = tokens(advantages_N=torch.zeros(5), reference_N=now.logprobs_K + math.log(2))
    chosen = config(kl=kl, loss={"entropy": 0.1}, correction=NONE)
    assert loss(chosen, now, still) == pytest.approx(0.5 * (1 - math.log(2)) - 0.1, rel=1e-5)
    still = tokens(advantages_N=torch.zeros(5))
    chosen = config(kl={"behaviour_coefficient": 2.0, "estimator": "k2"}, correction=NONE)
    weighted = RATIOS * RATIOS.log().square()
    assert loss(chosen, now, still) == pytest.approx(weighted.mean().item(), rel=1e-5)


def test_a_weighted_divergence_by_hand() -> None:
    """Each token's 1 - log 2 times its ratio, those that the default masks left out: 1.2 + 0.9 over 5."""
    now = now_of()
    still = tokens(advantages_N=torch.zeros(5), reference_N=now.logprobs_K + math.log(2))
    found = loss(config(kl={"coefficient": 0.5}), now, still)
    assert found == pytest.approx(0.5 * (1 - math.log(2)) * 2.1 / 5, rel=1e-5)


def test_values_by_hand() -> None:
    """Squares of the distance to the returns, halved, are added; and no advantage is touched."""
    chosen = config(advantage={"estimator": "gae"}, correction=NONE)
    objective = Objective(chosen, tokens(returns_N=torch.full((5,), 2.0)), (0, 1))
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    found = objective(batch_of(0, 1, 2, 3, 4), now_of(), values)
    assert found.sums["value_loss"].item() == (4 + 1 + 0 + 1 + 4) / 2
    assert found.loss.item() / 5 == pytest.approx((2.71 + 5) / 5, rel=1e-5)


def test_truncated_trajectories_are_only_comparedreplace() -> None:
    """Without the second: (-1.2 - 0.9 - 0.55 - 0.64) over the four tokens that are left."""
    trained = torch.tensor([True, True, False, True, True])
    found = loss(config(correction=NONE), tokens_=tokens(trained_N=trained))
    assert found == pytest.approx(-3.29 / 4)


@pytest.mark.parametrize("method", ["clip", "gspo", "cispo", "dppo", "reinforce"])
def test_a_vanished_probability_is_masked_without_a_trace(method: str) -> None:
    """Ratios of e^200 and e^-200 leave finite metrics, and a gradient of exactly 0."""
    aggregation = "sequence_mean" if method == "gspo" else "token_mean"
    chosen = config(loss={"method": method, "aggregation": aggregation})
    behaviour = torch.tensor([-201.0, -201.0, -1.0, -1.0, -1.0])
    objective = Objective(chosen, tokens(behaviour_N=behaviour), (0, 1))
    logprobs = torch.tensor([-1.0, -1.0, -201.0, -1.0, -1.0], requires_grad=True)
    now = TokenLogprobs(logprobs, torch.ones(5), torch.zeros(5, 4))
    found = objective(batch_of(0, 1, 2, 3, 4), now)
    found.loss.backward()
    assert logprobs.grad[:3].tolist() == [0.0, 0.0, 0.0]
    assert logprobs.grad[3:].abs().min() > 0
    assert all(torch.isfinite(value).all() for value in found.sums.values())
    assert all(math.isfinite(value) for value in objective.metrics().values())


def test_not_a_number_is_not_masked_away() -> None:
    """A log-probability that is not a number shows in the KL estimate, so that the step is given up."""
    ratios = torch.tensor([math.nan, 1, 1, 1, 1])
    objective = Objective(config(), tokens(), (0, 1))
    found = objective(batch_of(0, 1, 2, 3, 4), now_of(ratios))
    assert math.isnan(found.sums["kl_behaviour"].item())


def test_metrics_by_hand() -> None:
    """In two micro-batches, the second trajectory first.

    k3 under the engine is r - 1 - log r; the greatest is that of 3. The second and third trajectories are gated. The
    third has tokens of two versions.
    """
    objective = Objective(config(), tokens(), (0, 1))
    now = now_of()
    for places in ([2], [0, 1, 3, 4]):
        part = TokenLogprobs(now.logprobs_K[places], now.entropies_K[places], now.hidden_KH[places])
        objective(batch_of(*places), part)
    found = objective.metrics()
    kl = (RATIOS - 1 - RATIOS.log()).tolist()
    assert found.pop("kl_behaviour_max") == pytest.approx(2 - math.log(3), rel=1e-5)
    assert found.pop("gated_trajectory_fraction") == pytest.approx(2 / 3)
    assert found.pop("versions_per_trajectory") == pytest.approx(4 / 3)
    assert found.pop("versions_per_trajectory_max") == 2
    assert found == {
        "age_0_token_fraction": pytest.approx(3 / 5),
        "age_0_kl_behaviour": pytest.approx((kl[0] + kl[1] + kl[3]) / 3, rel=1e-4),
        "age_0_is_ratio_mean": pytest.approx(3.2 / 3, rel=1e-5),
        "age_0_masked_token_fraction": pytest.approx(1 / 3),
        "age_1_token_fraction": pytest.approx(1 / 5),
        "age_1_kl_behaviour": pytest.approx(kl[4], rel=1e-4),
        "age_1_is_ratio_mean": pytest.approx(1.5, rel=1e-5),
        "age_1_masked_token_fraction": 1,
        "age_2_token_fraction": pytest.approx(1 / 5),
        "age_2_kl_behaviour": pytest.approx(kl[2], rel=1e-4),
        "age_2_is_ratio_mean": pytest.approx(3, rel=1e-5),
        "age_2_masked_token_fraction": 1,
    }


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"correction": {"sequence": "product"}},
        {"loss": {"method": "gspo", "aggregation": "sequence_mean"}, "correction": NONE},
    ],
)
def test_a_micro_batch_without_tokens_adds_nothing(keys: dict[str, object]) -> None:
    """One of several ranks may get no trajectory; its backward pass goes through all the same."""
    objective = Objective(config(**keys), tokens(), (0, 1))
    logprobs = torch.zeros(0, requires_grad=True)
    nothing = TokenLogprobs(logprobs * 1, torch.zeros(0), torch.zeros(0, 4))
    found = objective(batch_of(), nothing)
    found.loss.backward()
    assert found.loss.item() == 0
    assert {float(value) for value in found.sums.values()} == {0.0}
    objective(batch_of(0, 1, 2, 3, 4), now_of())
    assert objective.metrics()["gated_trajectory_fraction"] < 1


# -- the arrays of a batch -------------------------------------------------------------------------


def two_turns(make_sample, reward: float, name: str, turn_rewards=(), seen: int = 50):
    """A prompt of 2, a turn of 2, an observation of 1, a turn of 1."""
    sample = make_sample([5, 6, 7, 8, seen, 9], [0, 0, 1, 1, 0, 1], reward, name=name)
    return replace(sample, turn_rewards=turn_rewards)


def advantages_of(groups, survey=None, **learner) -> list[float]:
    chosen = config(**learner)
    found = tokens_of(groups, 3, chosen, survey or Survey())
    return [round(value, 4) for value in found.advantages_N.tolist()]


def test_turn_rewards_by_hand(make_sample) -> None:
    """Discount 1/2. The first earns (1, 0) by turns and 1 at the end: returns (1.5, 1); the second (0, 0).

    By turn the means are 0.75 and 0.5; the two tokens of the first turn share its advantage.
    """
    group = [two_turns(make_sample, 1.0, "g0-0-0", (1.0,)), two_turns(make_sample, 0.0, "g0-1-0")]
    plan = {"credit": "turns", "discount": 0.5}
    assert advantages_of([group], advantage=plan) == [0.75, 0.75, 0.5, -0.75, -0.75, -0.5]


def test_turn_rewards_by_the_deviation_of_the_batch(make_sample) -> None:
    """Nothing at the end; first turns get 1 and 0, second turns of another group 1 and 0: returns 1 0, 0 0, 1 1, 0 0.

    Of these eight the mean is 3/8 and the deviation sqrt((3 - 9/8) / 7).
    """
    groups = [
        [two_turns(make_sample, 0.0, "g-0", (1.0,)), two_turns(make_sample, 0.0, "g-1")],
        [two_turns(make_sample, 0.0, "h-0", (0.0, 1.0)), two_turns(make_sample, 0.0, "h-1")],
    ]
    unit = round(0.5 / ((1.875 / 7) ** 0.5 + 1e-4), 4)
    found = advantages_of(groups, advantage={"credit": "turns", "scale": "batch"})
    assert found == [unit, unit, 0, -unit, -unit, 0, unit, unit, unit, -unit, -unit, -unit]


def test_anchors_of_turn_rewards_by_hand(make_sample) -> None:
    """The whole of a trajectory is what it got in all: here 1 and 0, by turn. First turns share a state, as do others.

    0.5 + 0.5 in the first turn; in the second, from where nothing follows, 0.5 + 0.
    """
    group = [two_turns(make_sample, 0.0, "g-0", (1.0,)), two_turns(make_sample, 0.0, "g-1")]
    assert advantages_of([group], advantage={"credit": "anchors"}) == [1, 1, 0.5, -1, -1, -0.5]


def test_anchors_by_hand_of_samples(make_sample) -> None:
    """Both begin from the same prompt; their observations differ, so that the second turns stand alone.

    A = (r - 1/2) + (R - mean R of the state): 0.5 + 0.5 and 0.5 + 0.
    """
    group = [
        two_turns(make_sample, 1.0, "g0-0-0", seen=50),
        two_turns(make_sample, 0.0, "g0-1-0", seen=51),
    ]
    assert advantages_of([group], advantage={"credit": "anchors"}) == [1, 1, 0.5, -1, -1, -0.5]
    same = [two_turns(make_sample, r, "g0-0-0") for r in (1.0, 0.0)]
    assert advantages_of([same], advantage={"credit": "anchors"}) == [1, 1, 1, -1, -1, -1]


def test_images_tell_states_apart(make_sample) -> None:
    """The same placeholder stands for each: turns that saw different pixels stand alone, as those of one image do not.

    Here the image is in the observation, so that the first turns share a state.
    """

    def advantages(*shown: bytes) -> list[float]:
        group = [
            replace(
                two_turns(make_sample, reward, f"g0-{member}-0"),
                images=(ImageInput(places=[4], pixels=pixels),),
            )
            for member, (reward, pixels) in enumerate(zip((1.0, 0.0), shown, strict=True))
        ]
        return advantages_of([group], advantage={"credit": "anchors"})

    assert advantages(b"red", b"red") == [1, 1, 1, -1, -1, -1]
    assert advantages(b"red", b"blue") == [1, 1, 0.5, -1, -1, -0.5]


def test_reinforce_plus_plus_by_hand(make_sample) -> None:
    """Rewards 1 and 0 in groups of one: returns 1, 1, 1, 0, 0, 0 by token; mean 1/2, deviation sqrt(1.5 / 5)."""
    groups = [[two_turns(make_sample, r, "g0-0-0")] for r in (1.0, 0.0)]
    value = round(0.5 / (0.3**0.5 + 1e-4), 4)
    found = advantages_of(groups, advantage={"estimator": "reinforce++"})
    assert found == [value] * 3 + [-value] * 3


def test_penalties_in_the_reward_by_hand(make_sample) -> None:
    """The engine gave each token -6, the reference -6.5: k1 = 0.5 a token, weight 0.1, 0.15 a trajectory.

    By group both lose the same. By token the later ones lose less: returns 0.85, 0.9, 0.95 for a reward of 1; the
    whitened ones are their distances to the mean over the deviation.
    """
    group = [two_turns(make_sample, r, "g0-0-0") for r in (1.0, 0.0)]
    survey = Survey(reference_N=torch.tensor([-6.5] * 3 + [-6.0] * 3))
    kl = {"coefficient": 0.1, "estimator": "k1", "place": "reward"}
    assert advantages_of([group], survey, kl=kl) == [0.425] * 3 + [-0.425] * 3
    returns = np.array([0.85, 0.9, 0.95, 0, 0, 0])
    expected = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-4)
    found = advantages_of([group], survey, kl=kl, advantage={"estimator": "reinforce++"})
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_gae_of_samples_by_hand(make_sample) -> None:
    """Reward 1 at the last token, 0.5 for the first turn at its end; values 0: the returns 1.5, 1.5, 1."""
    group = [two_turns(make_sample, 1.0, "g0-0-0", (0.5,))]
    found = tokens_of(
        [group], 3, config(advantage={"estimator": "gae"}), Survey(values_N=torch.zeros(3))
    )
    assert found.advantages_N.tolist() == found.returns_N.tolist() == [1.5, 1.5, 1.0]
    values = torch.tensor([1.0, 0.5, 0.5])
    found = tokens_of([group], 3, config(advantage={"estimator": "gae"}), Survey(values_N=values))
    assert found.advantages_N.tolist() == [0.5, 1.0, 0.5]
    assert found.returns_N.tolist() == [1.5, 1.5, 1.0]


def test_a_teacher_by_hand(make_sample) -> None:
    """log(teacher / engine) of each token, weighed; the reward plays no part."""
    group = [two_turns(make_sample, 1.0, "g0-0-0")]
    survey = Survey(teacher_N=torch.tensor([-5.0, -6.0, -8.0]))
    keys = {"advantage": {"estimator": "none"}, "teacher": {"folder": "t", "coefficient": 0.5}}
    assert advantages_of([group], survey, **keys) == [0.5, 0, -1.0]


def test_overlong_by_hand_of_samples(make_sample) -> None:
    """6 of 100 tokens, 96 of them in the buffer: (6 - 4) / 96 of the penalty 4.8 is 0.1, for one member only."""
    group = [two_turns(make_sample, 0.0, "g0-0-0"), make_sample([5, 6], [0, 1], 0.0)]
    plan = {"overlong_tokens": 96, "overlong_penalty": 4.8}
    assert advantages_of([group], advantage=plan) == [-0.05, -0.05, -0.05, 0.05]


def test_ages(make_sample) -> None:
    """Step 3 updates version 2: version 2 has age 0, version 0 age 2."""
    sample = make_sample([5, 6, 7], [0, 1, 1])
    sample = replace(sample, versions_T=np.array([-1, 0, 2], np.int32))
    assert tokens_of([[sample]], 3, config(), Survey()).ages_N.tolist() == [2, 0]


# -- the default is what it was --------------------------------------------------------------------


def test_the_default_is_to_the_bit_the_clipped_surrogate(folder: Path, make_groups) -> None:
    """Where no trajectory is gated: GRPO without deviation, one ratio for clip and mask, a mean over tokens.

    Below is that step written out; losses, gradient norm and weights are equal to the last bit.
    """
    chosen = config(learning_rate=1e-4, microbatch_tokens=100)
    ours, plain = (Policy.open(folder, chosen) for _ in range(2))
    groups = [[_engine_like(ours, sample) for sample in group] for group in make_groups()]
    for step in (1, 2):
        row = ours.train_step(groups, step)
        assert row["gated_trajectory_fraction"] == 0
        assert row["masked_token_fraction"] > 0
        assert row["clip_fraction"] > 0
        assert (row["loss"], row["grad_norm"]) == _plain_step(plain, groups)
    assert hashlib.sha256(ours.weights()).digest() == hashlib.sha256(plain.weights()).digest()


def _engine_like(policy: Policy, sample):
    """The learner's own log-probabilities, off to both sides, a third of them far."""
    ids_T = torch.from_numpy(sample.ids_T).long()
    with torch.no_grad():
        logits_TV = policy.model(input_ids=ids_T.unsqueeze(0)).logits[0]
    now_T = np.zeros(len(ids_T), np.float32)
    now_T[1:] = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
    places = np.flatnonzero(sample.mask_T)
    for k, place in enumerate(places[: len(places) // 2 * 2]):
        now_T[place] += (1 if k % 2 else -1) * (1.0 if k % 6 < 2 else 0.3)
    return replace(sample, logprobs_T=np.where(sample.mask_T, now_T, 0).astype(np.float32))


def _plain_step(policy: Policy, groups) -> tuple[float, float]:
    samples = [sample for group in groups for sample in group]
    rewards = [np.array([sample.reward for sample in group], np.float32) for group in groups]
    counts = [sample.sampled_count for sample in samples]
    advantages_N = torch.from_numpy(np.repeat(np.concatenate([grpo(r) for r in rewards]), counts))
    behaviour_N = torch.from_numpy(np.concatenate([s.logprobs_T[s.mask_T] for s in samples]))
    policy.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in pack(groups, 100):
        logprobs_K = sampled_logprobs(policy.model, batch, 1.0, torch.float32).logprobs_K
        places_K = torch.from_numpy(batch.tokens_K)
        log_ratio_K, advantages_K = logprobs_K - behaviour_N[places_K], advantages_N[places_K]
        seen_K = log_ratio_K.detach().exp()
        kept_K = (seen_K >= 0.5) & (seen_K <= 2.0)
        ratio_K = torch.where(kept_K, log_ratio_K, 0.0).exp()
        bounded_K = ratio_K.clamp(1.0 - 0.2, 1.0 + 0.28)
        surrogate_K = torch.minimum(ratio_K * advantages_K, bounded_K * advantages_K)
        loss = -torch.where(kept_K, surrogate_K, 0.0).sum()
        (loss / sum(counts)).backward()
        total += loss.item()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0))
    for parameters in policy.optimizer.param_groups:
        parameters["lr"] = 1e-4
    policy.optimizer.step()
    return total / sum(counts), norm
