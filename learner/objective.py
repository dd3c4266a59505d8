"""The loss that a recipe amounts to, micro-batch by micro-batch, and what is measured of it.

    log-probabilities now ─┐
    those of the engine ───┼─► gap ──► which tokens are kept, what they weigh       corrections.py
                           ├─► ratio ► the surrogate of each token                  losses.py
    advantages ────────────┘           + divergences - entropy
                                       summed with the weights of                   aggregation.py

Shapes: K sampled tokens of a micro-batch, S trajectories of it, N sampled tokens of the update.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from learner import corrections, losses
from learner.aggregation import aggregation
from learner.batch import Tokens
from learner.logprobs import TokenLogprobs
from learner.pack import MicroBatch
from schemas import recipe

Summed = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Adds tensors up, name by name, over the processes of a learner."""


def alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of a learner of one process."""
    return tensors


class MicroLoss(NamedTuple):
    """Of one micro-batch."""

    loss: torch.Tensor
    """The weighted sum over its tokens; has the gradient."""
    sums: dict[str, torch.Tensor]
    """Of metrics over its tokens; detached."""


@dataclass(frozen=True, slots=True, eq=False)
class _Micro:
    """What is known of a micro-batch's tokens, on the model's device."""

    now: TokenLogprobs
    behaviour_K: torch.Tensor
    proximal_K: torch.Tensor
    """The old policy of the ratio; where that is the policy itself, as it is now."""
    advantages_K: torch.Tensor
    lengths_S: torch.Tensor
    gap_K: torch.Tensor
    """log(proximal / engine), or where the engine itself is the old policy log(learner / engine); limited, detached."""


class Objective:
    """The loss of one optimizer update."""

    def __init__(self, config: recipe.Recipe, tokens: Tokens, seed: tuple[int, int]) -> None:
        """`seed` is the run's and the step's; only Clip-Cov draws."""
        self._config = config.learner
        self._tokens = tokens
        self._weights_N, self.divisor = aggregation(
            tokens.sequences_N,
            tokens.trained_N,
            self._config.loss.aggregation,
            self._config.loss.constant_tokens or config.policy.max_tokens,
        )
        self._stopped_N = self._clip_cov(seed)
        self._seen: list[dict[str, torch.Tensor]] = []

    def _clip_cov(self, seed: tuple[int, int]) -> torch.Tensor | None:
        loss = self._config.loss
        if not loss.clip_cov_fraction:
            return None
        (state,) = np.random.SeedSequence(seed).generate_state(1)
        return losses.clip_cov(
            self._tokens.behaviour_N,
            self._tokens.advantages_N,
            (loss.clip_cov_min, loss.clip_cov_max),
            loss.clip_cov_fraction,
            torch.Generator().manual_seed(int(state)),
        )

    # -- the loss ----------------------------------------------------------------------------------

    def __call__(
        self, batch: MicroBatch, now: TokenLogprobs, values_K: torch.Tensor | None = None
    ) -> MicroLoss:
        """The loss of a micro-batch; `values_K` are the value head's, with gradient."""
        config = self._config
        places_K = torch.from_numpy(batch.tokens_K)
        micro = self._micro(places_K, now)
        kept_K, gated_K = self._kept(micro)
        surrogate = self._surrogate(micro, kept_K)
        loss_K = torch.where(kept_K, surrogate.loss_K, 0.0)
        if self._stopped_N is not None:
            loss_K = torch.where(self._of(self._stopped_N, places_K, now), 0.0, loss_K)
        sums = {"entropy": now.entropies_K.detach().sum()}
        if config.kl.behaviour_coefficient:
            behaviour_kl_K = losses.kl(micro.behaviour_K - now.logprobs_K, config.kl.estimator)
            behaviour_kl_K = self._weighted(behaviour_kl_K, micro, kept_K)
            loss_K = loss_K + config.kl.behaviour_coefficient * torch.where(
                kept_K, behaviour_kl_K, 0.0
            )
        if self._tokens.reference_N is not None:
            reference_K = self._of(self._tokens.reference_N, places_K, now)
            kl_K = losses.kl(reference_K - now.logprobs_K, config.kl.estimator)
            sums["kl_reference"] = kl_K.detach().sum()
            if config.kl.place == "loss":
                loss_K = loss_K + config.kl.coefficient * self._weighted(kl_K, micro, kept_K)
        if config.loss.entropy:
            loss_K = loss_K - config.loss.entropy * now.entropies_K
        if values_K is not None and self._tokens.returns_N is not None:
            errors_K = (values_K - self._of(self._tokens.returns_N, places_K, now)).square() / 2
            sums["value_loss"] = errors_K.detach().sum()
            loss_K = loss_K + errors_K
        sums |= self._measure(places_K, micro, kept_K, gated_K)
        sums["clip_fraction"] = (kept_K & surrogate.clipped_K).sum()
        return MicroLoss((loss_K * self._of(self._weights_N, places_K, now)).sum(), sums)

    def _of(
        self, array_N: torch.Tensor, places_K: torch.Tensor, now: TokenLogprobs
    ) -> torch.Tensor:
        return array_N[places_K].to(now.logprobs_K.device)

    def _micro(self, places_K: torch.Tensor, now: TokenLogprobs) -> _Micro:
        tokens, proximal = self._tokens, self._config.correction.proximal
        behaviour_K = self._of(tokens.behaviour_N, places_K, now)
        now_K = now.logprobs_K.detach()
        proximal_K = behaviour_K
        if proximal == "start":
            assert tokens.start_N is not None  # Policy surveys it for this key
            proximal_K = self._of(tokens.start_N, places_K, now)
        elif proximal == "interpolated":
            ages_K = self._of(tokens.ages_N, places_K, now)
            proximal_K = corrections.interpolated_proximal(behaviour_K, now_K, ages_K)
        gap_K = (now_K if proximal == "behaviour" else proximal_K) - behaviour_K
        limit = losses.LOG_RATIO_LIMIT
        # The tokens of a trajectory lie side by side, in pack's order of trajectories.
        edges = np.flatnonzero(np.diff(tokens.sequences_N[places_K].numpy(), prepend=-1))
        lengths_S = torch.from_numpy(np.diff(edges, append=len(places_K)))
        return _Micro(
            now,
            behaviour_K,
            proximal_K,
            self._of(tokens.advantages_N, places_K, now),
            lengths_S.to(now_K.device),
            gap_K.clamp(-limit, limit),
        )

    def _kept(self, micro: _Micro) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens the correction keeps, and which it masks with their whole trajectory."""
        plan = self._config.correction
        kept_K = torch.ones_like(micro.gap_K, dtype=torch.bool)
        if plan.token == "mask":
            kept_K = corrections.token_mask(micro.gap_K, plan.ratio_min, plan.ratio_max)
        if plan.sequence == "none":
            return kept_K, torch.zeros_like(kept_K)
        gate = {
            "geometric": corrections.geometric_gate,
            "product": corrections.product_gate,
        }[plan.sequence]
        passed_K = gate(micro.gap_K, micro.lengths_S, plan.sequence_min, plan.sequence_max)
        return kept_K & passed_K, ~passed_K

    def _surrogate(self, micro: _Micro, kept_K: torch.Tensor) -> losses.TokenLosses:
        """The recipe's loss of each token, times what the token weighs."""
        loss, plan = self._config.loss, self._config.correction
        logprobs_K, advantages_K = micro.now.logprobs_K, micro.advantages_K
        # Masked before the exponential: infinity times 0 in the backward pass would not be 0.
        log_ratio_K = torch.where(kept_K, logprobs_K - micro.proximal_K, 0.0)
        if loss.method == "clip":
            found = losses.clip(
                log_ratio_K, advantages_K, loss.clip_low, loss.clip_high, loss.dual_clip
            )
        elif loss.method == "gspo":
            whole_K = losses.sequence_log_ratio(logprobs_K - micro.proximal_K, micro.lengths_S)
            whole_K = torch.where(kept_K, whole_K, 0.0)
            found = losses.clip(whole_K, advantages_K, loss.clip_low, loss.clip_high)
        elif loss.method == "cispo":
            found = losses.cispo(log_ratio_K, logprobs_K, advantages_K, loss.clip_high)
        elif loss.method == "dppo":
            found = losses.dppo(
                log_ratio_K, micro.proximal_K, advantages_K, loss.divergence, loss.divergence_max
            )
        else:
            found = losses.reinforce(logprobs_K, advantages_K)
        if plan.proximal == "behaviour" and loss.method != "reinforce":
            return found  # the ratio itself is the weight
        if plan.token == "truncate":
            return found._replace(
                loss_K=corrections.truncated(micro.gap_K, plan.ratio_max) * found.loss_K
            )
        if plan.token == "mask" or plan.proximal != "behaviour":
            return found._replace(loss_K=micro.gap_K.exp() * found.loss_K)
        return found

    def _weighted(self, kl_K: torch.Tensor, micro: _Micro, kept_K: torch.Tensor) -> torch.Tensor:
        """A divergence in the loss: the engine sampled its tokens."""
        plan = self._config.kl
        if not plan.weighted:
            return kl_K
        # masked before the exponential, as above
        log_weight_K = torch.where(kept_K, micro.now.logprobs_K - micro.behaviour_K, 0.0)
        return torch.where(kept_K, losses.weighted_kl(kl_K, log_weight_K, plan.estimator), 0.0)

    # -- what is measured --------------------------------------------------------------------------

    def _measure(
        self, places_K: torch.Tensor, micro: _Micro, kept_K: torch.Tensor, gated_K: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """How far the engine is from the learner; `kl` is k3 under the engine, without bias and never below 0."""
        with torch.no_grad():
            limit = losses.LOG_RATIO_LIMIT
            limited_K = (micro.now.logprobs_K - micro.behaviour_K).clamp(-limit, limit)
            ratio_K = limited_K.exp()
            kl_K = ratio_K - 1.0 - limited_K
        seen = {"kl": kl_K, "ratio": ratio_K, "masked": ~kept_K, "gated": gated_K}
        self._seen.append({"places": places_K, **{name: a.cpu() for name, a in seen.items()}})
        return {
            "kl_behaviour": kl_K.sum(),
            "is_ratio_mean": ratio_K.sum(),
            "masked_token_fraction": (~kept_K).sum(),
        }

    def metrics(self, summed: Summed = alone) -> dict[str, float]:
        """What is not a mean over tokens, of all micro-batches; by age, what staleness does.

        kl_behaviour_max, gated_trajectory_fraction, versions_per_trajectory (mean and `_max`), and for each age of
        token `age_<a>_`: token_fraction, kl_behaviour, is_ratio_mean, masked_token_fraction. `summed` adds up what the
        processes of a learner have seen, each of its own micro-batches.
        """
        count = len(self._tokens.ages_N)
        found_N = {name: torch.zeros(count) for name in ("kl", "ratio", "masked", "gated")}
        for part in self._seen:
            for name, array_N in found_N.items():
                array_N[part["places"]] = part[name].float()
        seen = {name: array_N.double().numpy() for name, array_N in summed(found_N).items()}
        ages, sequences = (
            array_N.numpy() for array_N in (self._tokens.ages_N, self._tokens.sequences_N)
        )
        pairs = np.unique(np.stack([sequences, ages]), axis=1)
        versions = np.unique(pairs[0], return_counts=True)[1]
        gated = np.unique(sequences[seen["gated"] > 0])
        found = {
            "kl_behaviour_max": seen["kl"].max(),
            "gated_trajectory_fraction": len(gated) / len(versions),
            "versions_per_trajectory": versions.mean(),
            "versions_per_trajectory_max": versions.max(),
        }
        for age in np.unique(ages):
            of_age = ages == age
            found |= {
                f"age_{age}_token_fraction": of_age.mean(),
                f"age_{age}_kl_behaviour": seen["kl"][of_age].mean(),
                f"age_{age}_is_ratio_mean": seen["ratio"][of_age].mean(),
                f"age_{age}_masked_token_fraction": seen["masked"][of_age].mean(),
            }
        return {name: float(value) for name, value in found.items()}


def of_updates(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row of a step's updates: tokens are summed, of maxima the largest is taken, of the rest the mean."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if name in ("train_tokens", "computed_tokens"):
            found[name] = sum(values)
        else:
            found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return found
