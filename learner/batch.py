"""A step's groups as one array per quantity, by sampled token: what the objective compares the policy with.

    rewards → shaped (length, divergence) → advantages of members, turns or tokens → advantages_N

Shapes: G members of a group, B of the batch, U turns of a member, T sampled tokens of a member, N of the batch, in the
order of the samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from learner import advantages, credit
from learner.losses import kl
from learner.samples import FloatArray, Sample
from schemas import algorithm, recipe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What models say of the batch's tokens as the step begins; made by Policy, None where no key asks for it."""

    start_N: torch.Tensor | None = None
    """The policy's own log-probabilities."""
    reference_N: torch.Tensor | None = None
    teacher_N: torch.Tensor | None = None
    values_N: torch.Tensor | None = None
    """The value head's, of the state in which each token was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """What is known of each sampled token; made by `tokens_of`, read by Objective."""

    behaviour_N: torch.Tensor
    """The engine's log-probabilities."""
    ages_N: torch.Tensor
    """How many versions older than the one being updated the sampler was."""
    sequences_N: torch.Tensor
    """The index of the token's trajectory."""
    trained_N: torch.Tensor
    """False where the trajectory is only compared with."""
    advantages_N: torch.Tensor
    returns_N: torch.Tensor | None = None
    """What the values are to learn."""
    start_N: torch.Tensor | None = None
    reference_N: torch.Tensor | None = None

    def part(self, first: int, end: int) -> "Tokens":
        """The tokens [first, end), which are whole trajectories."""

        def cut(array_N: torch.Tensor | None) -> torch.Tensor | None:
            return None if array_N is None else array_N[first:end]

        return Tokens(
            behaviour_N=self.behaviour_N[first:end],
            ages_N=self.ages_N[first:end],
            sequences_N=self.sequences_N[first:end],
            trained_N=self.trained_N[first:end],
            advantages_N=self.advantages_N[first:end],
            returns_N=cut(self.returns_N),
            start_N=cut(self.start_N),
            reference_N=cut(self.reference_N),
        )


def tokens_of(
    groups: Sequence[Sequence[Sample]], step: int, config: recipe.Recipe, survey: Survey
) -> Tokens:
    """Lay a step's groups out by token; `step` is the version that the step makes."""
    learner = config.learner
    samples = [sample for group in groups for sample in group]
    counts = [sample.sampled_count for sample in samples]
    behaviour_N = torch.from_numpy(_sampled(samples, "logprobs_T"))
    penalties_N: FloatArray = np.zeros(sum(counts), np.float32)
    if survey.reference_N is not None and learner.kl.place == "reward":
        kl_N = kl(survey.reference_N - behaviour_N, learner.kl.estimator)
        penalties_N = (learner.kl.coefficient * kl_N).numpy()
    values_N = None if survey.values_N is None else survey.values_N.numpy()
    rewards_B = np.array([_reward(sample, config) for sample in samples], np.float32)
    shaped = _Shaped(groups, rewards_B, penalties_N, values_N)
    advantages_N = torch.from_numpy(_advantages(shaped, learner.advantage))
    returns_N = None if survey.values_N is None else advantages_N + survey.values_N
    if values_N is not None and learner.advantage.scale == "batch":
        advantages_N = torch.from_numpy(advantages.whitened(advantages_N.numpy()))
    if survey.teacher_N is not None:
        # Its reward for a token is minus the reverse KL's k1, under the distribution that sampled it.
        advantages_N = advantages_N + learner.teacher.coefficient * (survey.teacher_N - behaviour_N)
    trained = [not (learner.loss.mask_truncated and sample.truncated) for sample in samples]
    return Tokens(
        behaviour_N=behaviour_N,
        ages_N=torch.from_numpy(np.maximum(0, step - 1 - _sampled(samples, "versions_T"))),
        sequences_N=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        trained_N=torch.from_numpy(np.repeat(np.array(trained, np.bool_), counts)),
        advantages_N=advantages_N,
        returns_N=returns_N,
        start_N=survey.start_N,
        reference_N=survey.reference_N,
    )


def _sampled(samples: Sequence[Sample], name: str) -> FloatArray:
    return np.concatenate([getattr(sample, name)[sample.mask_T] for sample in samples])


def _reward(sample: Sample, config: recipe.Recipe) -> float:
    plan = config.learner.advantage
    length = advantages.overlong_penalty(
        len(sample.ids_T), config.policy.max_tokens, plan.overlong_tokens
    )
    return sample.reward - plan.overlong_penalty * length


@dataclass(frozen=True, slots=True, eq=False)
class _Shaped:
    """The batch with its rewards and, by token, what the divergence from a reference takes off them."""

    groups: Sequence[Sequence[Sample]]
    rewards_B: FloatArray
    penalties_N: FloatArray
    values_N: FloatArray | None

    def members(self) -> Iterator[tuple[Sample, float, slice]]:
        """Each sample, its reward, and where its tokens are."""
        first, index = 0, 0
        for group in self.groups:
            for sample in group:
                yield (
                    sample,
                    float(self.rewards_B[index]),
                    slice(first, first + sample.sampled_count),
                )
                first, index = first + sample.sampled_count, index + 1


def _advantages(shaped: _Shaped, plan: algorithm.Advantage) -> FloatArray:
    """The estimator that the recipe names, by token."""
    if plan.estimator == "none":
        return np.zeros(len(shaped.penalties_N), np.float32)
    if plan.estimator == "gae":
        return _by_token(shaped, plan)
    if plan.estimator == "reinforce++":
        returns_N = _by_token(shaped, plan)
        return advantages.whitened(returns_N)
    advantages_N = _by_group(shaped, plan)
    if plan.estimator == "reinforce++_baseline":
        return advantages.whitened(advantages_N)
    return advantages_N


def _by_token(shaped: _Shaped, plan: algorithm.Advantage) -> FloatArray:
    """The reward at the last token, less each token's penalty, as returns; above the values where there are any.

    REINFORCE++ (arXiv:2501.03262) is gae with values of 0, a discount of 1 and a trace of 1.
    """
    found = []
    for sample, reward, places in shaped.members():
        rewards_T = -shaped.penalties_N[places]
        if not len(rewards_T):
            continue
        rewards_T[_turn_ends(sample)] += _turn_rewards(sample, reward)
        if shaped.values_N is None:
            found.append(advantages.gae(rewards_T, np.zeros_like(rewards_T), 1.0, 1.0))
        else:
            values_T = shaped.values_N[places]
            found.append(advantages.gae(rewards_T, values_T, plan.discount, plan.gae_lambda))
    return np.concatenate(found)


def _turn_ends(sample: Sample) -> list[int]:
    """Where, among its sampled tokens, each turn ends."""
    lengths = [end - first for first, end in sample.turn_spans]
    return [int(end) - 1 for end in np.cumsum(lengths)]


def _turn_rewards(sample: Sample, reward: float) -> FloatArray:
    """What each turn earned by itself; the last one also the reward of the whole."""
    rewards_U = np.zeros(len(sample.turn_spans), np.float32)
    for turn, value in enumerate(sample.turn_rewards):
        rewards_U[min(turn, len(rewards_U) - 1)] += value
    rewards_U[-1] += reward
    return rewards_U


def _by_group(shaped: _Shaped, plan: algorithm.Advantage) -> FloatArray:
    """Estimators that compare the members of a group."""
    found, first = [], 0
    penalised_B = np.array(
        [reward - shaped.penalties_N[places].sum() for _, reward, places in shaped.members()],
        np.float32,
    )
    samples = [sample for group in shaped.groups for sample in group]
    compared = penalised_B
    if plan.credit == "turns":
        compared = np.concatenate(_returns(samples, penalised_B, plan.discount) or [compared])
    elif plan.credit == "anchors":
        compared = _whole(samples, penalised_B)
    estimator = _estimator(plan, compared)
    for group in shaped.groups:
        rewards_G = penalised_B[first : first + len(group)]
        first += len(group)
        lengths_G = np.array([sample.sampled_count for sample in group])
        if plan.credit == "trajectory":
            found.append(np.repeat(estimator(rewards_G, lengths_G), lengths_G))
            continue
        spoke = [i for i, sample in enumerate(group) if lengths_G[i]]
        members = [group[i] for i in spoke]
        turns = _by_turn(members, rewards_G[spoke], plan, estimator)
        for sample, advantages_U in zip(members, turns, strict=True):
            found.append(np.repeat(advantages_U, [end - begin for begin, end in sample.turn_spans]))
    return np.concatenate(found)


def _returns(members: Sequence[Sample], rewards_G: FloatArray, discount: float) -> list[FloatArray]:
    """Of each member, by turn."""
    return [
        credit.turn_returns(_turn_rewards(sample, float(reward)), discount)
        for sample, reward in zip(members, rewards_G, strict=True)
        if sample.turn_spans
    ]


def _whole(members: Sequence[Sample], rewards_G: FloatArray) -> FloatArray:
    """Of each member, what it got in all."""
    earned = [sum(sample.turn_rewards) for sample in members]
    whole_G: FloatArray = rewards_G + np.array(earned, np.float32)
    return whole_G


def _estimator(plan: algorithm.Advantage, rewards_B: FloatArray) -> credit.Estimator:
    def estimate(rewards_G: FloatArray, lengths_G: FloatArray) -> FloatArray:
        if plan.estimator == "rloo":
            advantages_G = advantages.rloo(rewards_G)
        elif plan.estimator == "opo":
            advantages_G = advantages.opo(rewards_G, lengths_G)
        else:
            advantages_G = advantages.grpo(rewards_G)
        if plan.scale == "none":
            return advantages_G
        return advantages.scaled(advantages_G, rewards_G if plan.scale == "group" else rewards_B)

    return estimate


def _by_turn(
    members: Sequence[Sample],
    rewards_G: FloatArray,
    plan: algorithm.Advantage,
    estimator: credit.Estimator,
) -> list[FloatArray]:
    """By turn of each member, as `plan.credit` says."""
    returns_GU = _returns(members, rewards_G, plan.discount)
    lengths_G = np.array([sample.sampled_count for sample in members])
    if plan.credit == "turns":
        return credit.by_turn(returns_GU, lengths_G, estimator)
    whole_G = estimator(_whole(members, rewards_G), lengths_G)
    states_GU = [list(_states(sample)) for sample in members]
    steps_GU = credit.by_anchor(returns_GU, states_GU, scale=plan.scale == "group")
    return [
        whole + plan.anchor_weight * steps_U
        for whole, steps_U in zip(whole_G, steps_GU, strict=True)
    ]


def _states(sample: Sample) -> Iterator[bytes]:
    """What was given before each turn: its tokens, and what the images among them show."""
    before = 0
    for first, end in sample.turn_spans:
        seen = [image.pixels for image in sample.images if before <= image.places[0] < first]
        hashes = [sha256(pixels).digest() for pixels in seen]
        yield b"".join([sample.ids_T[before:first].tobytes(), *hashes])
        before = end
