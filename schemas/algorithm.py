"""The part of a recipe that says what the loss is: `[learner.advantage]`, `[learner.loss]` and their like."""

from typing import Annotated, Literal

from msgspec import Meta

from schemas.section import Fraction, NonNegative, NonNegativeFloat, Section


class Advantage(Section, frozen=True):
    """How rewards become advantages; the formulas are in learner/advantages.py and learner/credit.py."""

    estimator: Literal[
        "grpo", "rloo", "opo", "reinforce++", "reinforce++_baseline", "gae", "none"
    ] = "grpo"
    """`none`: the reward plays no part, a teacher does."""
    scale: Literal["none", "group", "batch"] = "none"
    """Divide by the standard deviation of the group's, or of the whole batch's, rewards."""
    credit: Literal["trajectory", "turns", "anchors"] = "trajectory"
    """What an advantage is of: the whole trajectory; each turn, from `turn_<index>` among the reward's parts; or each
    turn among all turns of the group that began from the same observation."""
    discount: Fraction = 1.0
    """Of a later reward, by turn; with `gae` by token."""
    gae_lambda: Fraction = 1.0
    value_learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    """Of the value head that `gae` trains beside the policy."""
    anchor_weight: NonNegativeFloat = 1.0
    overlong_tokens: NonNegative = 0
    """Below `policy.max_tokens` the reward falls over so many tokens, linearly; 0: not at all."""
    overlong_penalty: NonNegativeFloat = 1.0
    """What it has lost at the limit."""


class Loss(Section, frozen=True):
    """What is minimised; the formulas are in learner/losses.py. `actors train --dry-run` prints the whole as a line."""

    method: Literal["clip", "gspo", "cispo", "dppo", "reinforce"] = "clip"
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.28
    """The ratio is held within [1 - clip_low, 1 + clip_high]."""
    dual_clip: NonNegativeFloat = 0.0
    """The largest ratio of a token with a negative advantage; 0: none."""
    divergence: Literal["tv", "kl"] = "tv"
    divergence_max: Annotated[float, Meta(gt=0)] = 0.15
    """For `dppo`: a token that has moved further takes no step away."""
    clip_cov_fraction: Fraction = 0.0
    """The share of all tokens, of those with a covariance within the bounds, that get no gradient; 0: none."""
    clip_cov_min: float = 1.0
    clip_cov_max: float = 5.0
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant_tokens: NonNegative = 0
    """What `constant` divides each trajectory's sum by; 0: `policy.max_tokens`."""
    entropy: NonNegativeFloat = 0.0
    """The weight of the entropy bonus."""
    mask_truncated: bool = False
    """Trajectories cut off at a limit are compared with, but not trained."""


class Correction(Section, frozen=True):
    """What is done about the distance between the engine and the learner; learner/corrections.py."""

    proximal: Literal["behaviour", "start", "interpolated"] = "behaviour"
    """The centre of the trust region: the engine's policy; the learner's as the step begins, computed once more; or one
    in between, the nearer to the learner's the older a token is."""
    token: Literal["mask", "truncate", "none"] = "mask"
    """A token whose ratio learner/engine lies outside [ratio_min, ratio_max] is masked; or weights end at ratio_max."""
    ratio_min: NonNegativeFloat = 0.5
    ratio_max: Annotated[float, Meta(gt=1)] = 2.0
    sequence: Literal["geometric", "product", "none"] = "geometric"
    """A trajectory is masked whole when the geometric mean, or the product, of its tokens' ratios lies outside
    [sequence_min, sequence_max]."""
    sequence_min: NonNegativeFloat = 0.8
    sequence_max: Annotated[float, Meta(gt=1)] = 1.25


class Kl(Section, frozen=True):
    """What the policy is held near to."""

    coefficient: NonNegativeFloat = 0.0
    """The weight of the divergence from the reference; 0: there is none."""
    reference: str = ""
    """A Hugging Face folder; empty: version 0."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"
    weighted: bool = True
    """In the loss: times learner/engine, since the engine sampled the tokens; masked tokens take no part."""
    behaviour_coefficient: NonNegativeFloat = 0.0
    """The weight, in the loss, of the divergence from the engine's policy."""


class Teacher(Section, frozen=True):
    """On-policy distillation: a stronger model says of each sampled token how likely it was."""

    folder: str = ""
    """A Hugging Face folder with the same vocabulary; empty: no teacher."""
    coefficient: Annotated[float, Meta(gt=0)] = 1.0


class Filter(Section, frozen=True):
    """Which complete groups are not trained; others take their place."""

    zero_variance: bool = True
    """Those whose rewards are all equal; where turns are compared, what those got as well. (With gae and reinforce++,
    whose baseline is not the group's, such a group would teach something too.)"""
    mean_reward: list[float] = []
    """[least, most]: those whose mean reward is not within; empty: none."""
