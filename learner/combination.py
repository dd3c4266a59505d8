"""The loss that a recipe's keys amount to: whether they fit together, and as one line for people.

Known names, as keys of [learner]:

    GRPO               advantage.scale = "group", loss.aggregation = "sequence_mean"
    Dr. GRPO           loss.aggregation = "constant"
    DAPO               advantage.scale = "group", advantage.overlong_tokens = …; the rest is default
    RLOO, OPO          advantage.estimator = "rloo" | "opo", loss.method = "reinforce"
    REINFORCE++        advantage.estimator = "reinforce++", kl.coefficient = …, kl.place = "reward"
    GSPO               loss.method = "gspo", loss.aggregation = "sequence_mean", loss.clip_low = 3e-4
    CISPO              loss.method = "cispo"
    DPPO               loss.method = "dppo"
    PPO                advantage.estimator = "gae", advantage.scale = "batch"
    GiGPO              advantage.credit = "anchors", advantage.scale = "group"
    TIS, IcePop        loss.method = "reinforce", correction.token = "truncate" | "mask"
    decoupled PPO      correction.proximal = "start", updates_per_step = 2 or more; or "interpolated"
    distillation       teacher.folder = …, advantage.estimator = "none", filter.zero_variance = false

Knows no torch: the command line asks it before anything is started.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from schemas.recipe import Learner, Recipe


class Contradiction(NamedTuple):
    """A key that does not fit the others."""

    key: str
    """Within `learner`, e.g. `loss.dual_clip`."""
    fix: str


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """Everything in the learner's keys that is without effect or without meaning; nothing for a good recipe."""
    yield from _unread(recipe.learner)
    yield from _out_of_bounds(recipe)
    yield from _at_odds(recipe.learner)
    yield from _unscored(recipe)


def _unread(learner: Learner) -> Iterator[Contradiction]:
    """Keys that were set and that nothing reads, given the others."""
    advantage, loss, plan = learner.advantage, learner.loss, learner.correction
    by_group = advantage.estimator in ("grpo", "rloo", "opo")
    kl = bool(learner.kl.coefficient)
    conditions = {
        "advantage.scale": (by_group or advantage.estimator == "gae", "estimator grpo, rloo, opo"),
        "advantage.credit": (by_group, "estimator grpo, rloo or opo"),
        "advantage.discount": (
            advantage.credit != "trajectory" or advantage.estimator == "gae",
            "credit turns or anchors, or estimator gae",
        ),
        "advantage.gae_lambda": (advantage.estimator == "gae", "estimator gae"),
        "advantage.value_learning_rate": (advantage.estimator == "gae", "estimator gae"),
        "advantage.anchor_weight": (advantage.credit == "anchors", "credit anchors"),
        "advantage.overlong_penalty": (advantage.overlong_tokens > 0, "overlong_tokens above 0"),
        "advantage.overlong_tokens": (advantage.estimator != "none", "an estimator"),
        "loss.clip_low": (loss.method in ("clip", "gspo"), "method clip or gspo"),
        "loss.clip_high": (loss.method in ("clip", "gspo", "cispo"), "method clip, gspo or cispo"),
        "loss.dual_clip": (loss.method == "clip", "method clip"),
        "loss.divergence": (loss.method == "dppo", "method dppo"),
        "loss.divergence_max": (loss.method == "dppo", "method dppo"),
        "loss.clip_cov_min": (loss.clip_cov_fraction > 0, "clip_cov_fraction above 0"),
        "loss.clip_cov_max": (loss.clip_cov_fraction > 0, "clip_cov_fraction above 0"),
        "loss.constant_tokens": (loss.aggregation == "constant", "aggregation constant"),
        "correction.ratio_min": (plan.token == "mask", "token mask"),
        "correction.ratio_max": (plan.token != "none", "token mask or truncate"),
        "correction.sequence_min": (plan.sequence != "none", "sequence geometric or product"),
        "correction.sequence_max": (plan.sequence != "none", "sequence geometric or product"),
        "kl.reference": (kl, "kl.coefficient above 0"),
        "kl.place": (kl, "kl.coefficient above 0"),
        "kl.weighted": (
            (kl and learner.kl.place == "loss") or learner.kl.behaviour_coefficient > 0,
            'kl.coefficient with place = "loss", or kl.behaviour_coefficient',
        ),
        "kl.estimator": (
            kl or learner.kl.behaviour_coefficient > 0,
            "kl.coefficient or kl.behaviour_coefficient above 0",
        ),
        "teacher.coefficient": (bool(learner.teacher.folder), "teacher.folder"),
        "lora.alpha": (learner.lora.rank > 0, "lora.rank above 0"),
        "lora.dropout": (learner.lora.rank > 0, "lora.rank above 0"),
        "lora.target": (learner.lora.rank > 0, "lora.rank above 0"),
    }
    given, default = msgspec.to_builtins(learner), msgspec.to_builtins(Learner())
    for key, (read, condition) in conditions.items():
        section, _, name = key.partition(".")
        if not read and given[section][name] != default[section][name]:
            yield Contradiction(key, f"nothing reads it without {condition}; leave it out")


def _out_of_bounds(recipe: Recipe) -> Iterator[Contradiction]:
    """Numbers that mean nothing beside others."""
    learner = recipe.learner
    loss, plan, band = learner.loss, learner.correction, learner.filter.mean_reward
    if plan.ratio_min >= 1:
        yield Contradiction("correction.ratio_min", "must be below 1")
    if plan.sequence_min >= 1:
        yield Contradiction("correction.sequence_min", "must be below 1")
    if 0 < loss.dual_clip <= 1 + loss.clip_high:
        yield Contradiction("loss.dual_clip", "must be above 1 + loss.clip_high, or 0")
    if loss.clip_cov_min >= loss.clip_cov_max:
        yield Contradiction("loss.clip_cov_min", "must be below loss.clip_cov_max")
    if band and not (len(band) == 2 and band[0] <= band[1]):
        yield Contradiction("filter.mean_reward", "must be [least, most] or []")
    if learner.advantage.overlong_tokens >= recipe.policy.max_tokens:
        yield Contradiction("advantage.overlong_tokens", "must be below policy.max_tokens")
    if learner.updates_per_step > learner.groups_per_step:
        yield Contradiction("updates_per_step", "must not be above learner.groups_per_step")
    yield from _never_met(learner)
    yield from _several(learner)


def _never_met(learner: Learner) -> Iterator[Contradiction]:
    """Bounds of a token's ratio beyond those outside of which no token is kept."""
    loss, plan, default = learner.loss, learner.correction, Learner().loss
    if plan.token != "mask" or plan.proximal != "behaviour":
        return
    clips, caps = loss.method == "clip", loss.method in ("clip", "cispo")
    above = f"no token with a ratio above correction.ratio_max = {plan.ratio_max:g} is kept"
    below = f"no token with a ratio below correction.ratio_min = {plan.ratio_min:g} is kept"
    if clips and loss.dual_clip >= plan.ratio_max:
        yield Contradiction("loss.dual_clip", f"{above}: raise that, or leave it out")
    if caps and loss.clip_high != default.clip_high and 1 + loss.clip_high >= plan.ratio_max:
        yield Contradiction("loss.clip_high", f"{above}: raise that, or lower it")
    if clips and loss.clip_low != default.clip_low and 1 - loss.clip_low <= plan.ratio_min:
        yield Contradiction("loss.clip_low", f"{below}: lower that, or this")


def _several(learner: Learner) -> Iterator[Contradiction]:
    """Keys of a learner of several processes."""
    if not learner.deepspeed and learner.zero_stage > 1:
        yield Contradiction("zero_stage", "one rank divides nothing: leave it out, or raise ranks")
    if learner.hostfile and learner.ranks == 1:
        yield Contradiction("hostfile", "give the number of all its slots as learner.ranks")
    if learner.offload == "weights" and learner.zero_stage < 3:
        yield Contradiction("offload", "weights stay on the GPU below learner.zero_stage = 3")
    if learner.lora.rank and learner.zero_stage == 3:
        yield Contradiction("zero_stage", "adapters need it whole: write 1 or 2")


def _unscored(recipe: Recipe) -> Iterator[Contradiction]:
    """Checkpoints that are to be compared by what they do not have."""
    learner, held_out = recipe.learner, recipe.evaluation
    if learner.best_by != "evaluation":
        return
    if not (held_out.rows or held_out.path):
        yield Contradiction("best_by", "needs held-out tasks: give evaluation.rows or .path")
    elif held_out.every_steps % learner.checkpoint_every_steps:
        fix = f"must divide evaluation.every_steps = {held_out.every_steps}: only those versions are compared"
        yield Contradiction("checkpoint_every_steps", fix)


def _at_odds(learner: Learner) -> Iterator[Contradiction]:
    """Choices that exclude one another."""
    loss, plan = learner.loss, learner.correction
    if loss.method == "gspo" and loss.aggregation != "sequence_mean":
        yield Contradiction(
            "loss.aggregation", 'method gspo is by trajectory: write "sequence_mean"'
        )
    if plan.proximal != "behaviour" and loss.method != "clip":
        yield Contradiction(
            "correction.proximal",
            f'method {loss.method} has no proximal policy: write "behaviour", or loss.method = "clip"',
        )
    if plan.proximal == "start" and learner.updates_per_step == 1:
        yield Contradiction(
            "correction.proximal",
            "with one update the policy is still what it was at the start, and no ratio is clipped: "
            'raise learner.updates_per_step, or write "interpolated"',
        )
    if plan.token == "truncate" and loss.method != "reinforce" and plan.proximal == "behaviour":
        yield Contradiction(
            "correction.token",
            f"method {loss.method} weighs by the ratio itself, which would count twice: write "
            '"mask", or loss.method = "reinforce"',
        )
    yield from _without_reward(learner)
    if learner.kl.estimator == "k1" and learner.kl.behaviour_coefficient:
        yield Contradiction("kl.estimator", _K1)
    elif learner.kl.estimator == "k1" and learner.kl.coefficient and learner.kl.place == "loss":
        yield Contradiction("kl.estimator", _K1 + ', or place = "reward"')


def _without_reward(learner: Learner) -> Iterator[Contradiction]:
    """Estimators that do not take a part of the reward."""
    advantage = learner.advantage
    if advantage.estimator == "gae" and advantage.scale == "group":
        yield Contradiction("advantage.scale", 'gae knows no groups: write "batch" or "none"')
    if advantage.estimator != "none":
        return
    if not learner.teacher.folder:
        yield Contradiction("advantage.estimator", "without it there must be a teacher.folder")
    if learner.filter.zero_variance:
        yield Contradiction(
            "filter.zero_variance", "the reward plays no part: groups with equal ones count too"
        )
    if learner.kl.coefficient and learner.kl.place == "reward":
        yield Contradiction("kl.place", 'the reward plays no part: write "loss"')


_K1 = 'as a loss k1 has a gradient of mean 0: write "k2" or "k3"'


# -- one line for people ---------------------------------------------------------------------------


def formula(recipe: Recipe) -> str:
    """The loss as one line, e.g. `loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A) …`."""
    learner = recipe.learner
    terms = [_surrogate(learner) + _masks(learner)]
    weight = "(learner / engine) " if learner.kl.weighted else ""
    if learner.kl.coefficient and learner.kl.place == "loss":
        terms.append(
            f"+ {learner.kl.coefficient:g} {weight}{learner.kl.estimator}(policy || {_reference(learner)})"
        )
    if learner.kl.behaviour_coefficient:
        terms.append(
            f"+ {learner.kl.behaviour_coefficient:g} {weight}{learner.kl.estimator}(policy || engine)"
        )
    if learner.loss.entropy:
        terms.append(f"- {learner.loss.entropy:g} entropy")
    where = [_ratio(learner), f"A = {_advantage(learner)}", f"R = {_reward(recipe)}"]
    if learner.advantage.estimator == "none":
        where.pop()
    if learner.advantage.estimator == "gae":
        where.append("V: a value head's, (V - A - V_before)^2 / 2")
    return (
        f"loss = {_mean(recipe)} of {' '.join(terms)}; {'; '.join(part for part in where if part)}"
    )


def _mean(recipe: Recipe) -> str:
    loss = recipe.learner.loss
    constant = loss.constant_tokens or recipe.policy.max_tokens
    names = {
        "token_mean": "mean over tokens",
        "sequence_mean": "mean over trajectories of the mean over tokens",
        "constant": f"mean over trajectories of 1/{constant} the sum over tokens",
    }
    untruncated = " (truncated ones masked)" if loss.mask_truncated else ""
    return names[loss.aggregation] + untruncated


def _surrogate(learner: Learner) -> str:
    loss = learner.loss
    bounds = f"{1 - loss.clip_low:g}, {1 + loss.clip_high:g}"
    forms = {
        "clip": f"-min(rho A, clip(rho, {bounds}) A)",
        "gspo": f"-min(s A, clip(s, {bounds}) A)",
        "cispo": f"-sg(min(rho, {1 + loss.clip_high:g})) A log p",
        "dppo": f"-rho A [not moved away by {loss.divergence} > {loss.divergence_max:g}]",
        "reinforce": "-A log p",
    }
    form = forms[loss.method]
    if loss.method == "clip" and loss.dual_clip:
        form = f"-max(min(rho A, clip(rho, {bounds}) A), {loss.dual_clip:g} A if A < 0)"
    if loss.clip_cov_fraction:
        form += (
            f" [but {loss.clip_cov_fraction:g} of the tokens, of those with"
            f" {loss.clip_cov_min:g} < cov(log p, A) < {loss.clip_cov_max:g}]"
        )
    return form


def _masks(learner: Learner) -> str:
    """The correction's factors."""
    plan = learner.correction
    weighs = learner.loss.method == "reinforce" or plan.proximal != "behaviour"
    gap = "w" if weighs else "rho"
    found = ""
    if weighs and plan.token == "truncate":
        found += f" min(w, {plan.ratio_max:g})"
    elif weighs and (plan.token == "mask" or plan.proximal != "behaviour"):
        found += " w"
    if plan.token == "mask":
        found += f" [{plan.ratio_min:g} <= {gap} <= {plan.ratio_max:g}]"
    if plan.sequence != "none":
        kind = "geometric mean" if plan.sequence == "geometric" else "product"
        found += f" [{plan.sequence_min:g} <= {kind} of {gap} over the trajectory <= {plan.sequence_max:g}]"
    return found


def _ratio(learner: Learner) -> str:
    """What the letters of the surrogate and of the masks are."""
    plan, method = learner.correction, learner.loss.method
    if method == "reinforce":
        used = plan.token != "none" or plan.sequence != "none"
        return "w = sg(learner / engine)" if used else ""
    if plan.proximal == "behaviour":
        found = "rho = learner / engine"
        return (
            found + "; s = geometric mean of rho over the trajectory" if method == "gspo" else found
        )
    between = {
        "start": "proximal = the learner as the step begins",
        "interpolated": "proximal = engine^(1/(age+1)) learner^(age/(age+1))",
    }[plan.proximal]
    return f"rho = learner / proximal; w = proximal / engine; {between}"


def _advantage(learner: Learner) -> str:
    plan = learner.advantage
    forms = {
        "grpo": "R - mean(R of the group)",
        "rloo": "R - mean(R of the group's others)",
        "opo": "R - mean(R of the group, weighted by length)",
        "reinforce++": "R whitened over the batch's tokens",
        "reinforce++_baseline": "R - mean(R of the group), whitened over the batch's tokens",
        "gae": f"GAE(R - V, discount {plan.discount:g}, lambda {plan.gae_lambda:g})",
        "none": "",
    }
    form = forms[plan.estimator]
    if plan.scale != "none" and plan.estimator == "gae":
        form += ", whitened over the batch's tokens"
    elif plan.scale != "none":
        form = f"({form}) / std(R of the {plan.scale})"
    if plan.credit == "turns":
        form = form.replace("R", "R_turn")
    elif plan.credit == "anchors":
        deviation = " / std of the same" if plan.scale == "group" else ""
        form += f" + {plan.anchor_weight:g} (R_turn - mean(R_turn of turns from the same state)){deviation}"
    if plan.credit != "trajectory":
        form += f", R_turn = the return from the turn on, discount {plan.discount:g}"
    if learner.teacher.folder:
        weight = "" if learner.teacher.coefficient == 1 else f"{learner.teacher.coefficient:g} "
        form = f"{form} + {weight}log(teacher / engine)".removeprefix(" + ")
    return form


def _reward(recipe: Recipe) -> str:
    learner, plan = recipe.learner, recipe.learner.advantage
    form = "reward"
    if plan.overlong_tokens:
        limit = recipe.policy.max_tokens
        form += (
            f" - {plan.overlong_penalty:g} ramp(length, {limit - plan.overlong_tokens}, {limit})"
        )
    if learner.kl.coefficient and learner.kl.place == "reward":
        form += (
            f" - {learner.kl.coefficient:g} {learner.kl.estimator}(engine || {_reference(learner)})"
        )
    return form


def _reference(learner: Learner) -> str:
    return learner.kl.reference or "version 0"
