"""Every key of [learner] changes something. A new key without a line here fails."""

from dataclasses import replace as replace_fields
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from actors import run_folder, training
from actors.cleaning import OldWeights
from actors.learner import Planner
from actors.scores import Scores
from learner.checkpoints import checkpoints, step_of
from learner.combination import contradictions
from learner.policy import Policy
from schemas import recipe
from schemas.events import Admitted, Evaluated, Scored, Stepped, Turn
from schemas.task import PublicPart
from schemas.tokens import Tokens

TRAINED = {
    # key: (what it needs, another value); the base is the default recipe with what it needs
    "updates_per_step": ({}, 2),
    "learning_rate": ({}, 3e-3),
    "weight_decay": ({}, 0.5),
    "max_grad_norm": ({}, 1e-4),
    "warmup_steps": ({}, 10),
    "microbatch_tokens": ({}, 40),
    "advantage.estimator": ({}, "opo"),
    "advantage.scale": ({}, "group"),
    "advantage.credit": ({}, "turns"),
    "advantage.discount": ({"advantage.credit": "turns"}, 0.5),
    "advantage.gae_lambda": ({"advantage.estimator": "gae"}, 0.5),
    "advantage.value_learning_rate": ({"advantage.estimator": "gae"}, 0.1),
    "advantage.anchor_weight": ({"advantage.credit": "anchors"}, 0.5),
    "advantage.overlong_tokens": ({}, 250),
    "advantage.overlong_penalty": ({"advantage.overlong_tokens": 250}, 3.0),
    "loss.method": ({}, "cispo"),
    "loss.clip_low": ({}, 0.01),
    "loss.clip_high": ({}, 0.01),
    "loss.dual_clip": ({}, 1.3),
    "loss.divergence": ({"loss.method": "dppo", "loss.divergence_max": 0.0005}, "kl"),
    "loss.divergence_max": ({"loss.method": "dppo"}, 0.0001),
    "loss.clip_cov_fraction": ({}, 0.3),
    "loss.clip_cov_min": ({"loss.clip_cov_fraction": 0.3, "loss.clip_cov_max": 9.0}, 0.01),
    "loss.clip_cov_max": ({"loss.clip_cov_fraction": 0.9, "loss.clip_cov_min": 0.01}, 0.02),
    "loss.aggregation": ({}, "sequence_mean"),
    "loss.constant_tokens": ({"loss.aggregation": "constant"}, 7),
    "loss.entropy": ({}, 0.1),
    "loss.mask_truncated": ({}, True),
    "correction.proximal": ({}, "interpolated"),
    "correction.token": ({}, "none"),
    "correction.ratio_min": ({}, 0.95),
    "correction.ratio_max": ({}, 1.05),
    "correction.sequence": ({}, "product"),
    "correction.sequence_min": ({}, 0.99),
    "correction.sequence_max": ({}, 1.01),
    "kl.coefficient": ({}, 0.5),
    "kl.reference": ({"kl.coefficient": 0.5}, "other"),
    "kl.estimator": ({"kl.coefficient": 0.5}, "k2"),
    "kl.weighted": ({"kl.coefficient": 0.5}, False),
    "kl.place": ({"kl.coefficient": 0.5}, "reward"),
    "kl.behaviour_coefficient": ({}, 0.5),
    "teacher.folder": ({}, "other"),
    "teacher.coefficient": ({"teacher.folder": "other"}, 0.2),
    "lora.rank": ({}, 2),
    "lora.alpha": ({"lora.rank": 2}, 99.0),
    "lora.dropout": ({"lora.rank": 2}, 0.5),
    "lora.target": ({"lora.rank": 2}, ["q_proj"]),
}
PLANNED = {
    "steps": 0,
    "groups_per_step": 1,
    "group_size": 3,
    "refill_limit": 1.0,
    "threads": 5,
    "filter.zero_variance": False,
    "filter.mean_reward": [0.6, 0.9],
}
KEPT = {
    "checkpoint_every_steps",  # test_actors/test_shadow.py sees at which steps there is one
    "weights_kept",
    "checkpoints_kept",
    "best_checkpoints_kept",
    "best_by",
}
DIVIDED = {"ranks", "hostfile", "zero_stage", "offload"}
"""Among processes: test_actors/test_ranks.py and test_deepspeed_policy.py see that, and that nothing else changes."""
RECOMPUTED = {"gradient_checkpointing"}
"""Changes nothing that is trained: test_models.py sees what it keeps."""


BASE = recipe.Recipe(policy=recipe.Policy(model="m"))


def keys(table: type = recipe.Learner, path: str = "") -> set[str]:
    """The keys of a table and of those within it."""
    found = set()
    for field in msgspec.structs.fields(table):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found |= keys(field.type, f"{path}{field.name}.")
        else:
            found.add(path + field.name)
    return found


def with_keys(base: recipe.Recipe, changes: dict[str, object]) -> recipe.Recipe:
    tables = msgspec.to_builtins(base)
    for key, value in changes.items():
        table = tables["learner"]
        *sections, name = key.split(".")
        for section in sections:
            table = table[section]
        table[name] = value
    return msgspec.convert(tables, recipe.Recipe)


def test_every_key_is_here() -> None:
    """Once."""
    assert sorted([*TRAINED, *PLANNED, *KEPT, *RECOMPUTED, *DIVIDED]) == sorted(keys())


# -- what is trained -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same kind."""
    path = tmp_path_factory.mktemp("other-llama")
    policy = Policy.open(folder, recipe.Recipe(policy=recipe.Policy(model="m")))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.8)
    policy.export(path)
    return path


def near_policy(policy: Policy, groups):
    """The engine is the learner but for noise and age; one trajectory is truncated, turns have rewards."""
    random = np.random.default_rng(1)
    changed = []
    for g, group in enumerate(groups):
        members = []
        for m, sample in enumerate(group):
            ids_T = torch.from_numpy(sample.ids_T).long()
            with torch.no_grad():
                logits_TV = policy.model(input_ids=ids_T.unsqueeze(0)).logits[0]
            now_T = torch.zeros(len(ids_T))
            now_T[1:] = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
            noise = random.normal(0.0, 0.15, len(ids_T)) + 0.4 * (
                random.random(len(ids_T)) < 0.1
            ) * (g + 1)
            members.append(
                replace_fields(
                    sample,
                    logprobs_T=np.where(sample.mask_T, now_T + noise, 0).astype(np.float32),
                    versions_T=np.where(sample.mask_T, m % 3 - 2, -1).astype(np.int32),
                    truncated=(g, m) == (0, 1),
                    turn_rewards=(0.25 * m,),
                )
            )
        changed.append(members)
    return changed


def trained(folder: Path, other: Path, config: recipe.Recipe, make_groups) -> tuple[bytes, float]:
    """The weights after two steps, and the last one's places computed."""
    assert not list(contradictions(config))
    policy = Policy.open(folder, config)
    if config.learner.kl.coefficient:
        policy.hold_reference(other if config.learner.kl.reference else folder)
    if config.learner.teacher.folder:
        policy.hold_teacher(other)
    groups = near_policy(policy, make_groups())
    for step in (1, 2):
        row = policy.train_step(groups, step)
    return policy.weights(), row["computed_tokens"]


@pytest.mark.parametrize("key", TRAINED)
def test_a_key_changes_what_is_trained(folder: Path, other: Path, make_groups, key: str) -> None:
    """Two steps on the same batch with the key at its default, and changed: the weights differ.

    `microbatch_tokens` is the one key that must not change them beyond rounding: there the places computed differ.
    """
    needs, value = TRAINED[key]
    base = recipe.Recipe(
        policy=recipe.Policy(model="m", max_tokens=256),
        learner=recipe.Learner(learning_rate=1e-3),
    )
    changes = (needs, {**needs, key: value})
    found = [trained(folder, other, with_keys(base, change), make_groups) for change in changes]
    if key == "microbatch_tokens":
        assert found[0][1] < found[1][1]
    else:
        assert found[0][0] != found[1][0]


def test_the_temperature_changes_what_is_trained(folder: Path, other: Path, make_groups) -> None:
    """The log-probabilities are those of the distribution that was sampled."""
    found = [
        trained(
            folder, other, msgspec.structs.replace(BASE, sampling=recipe.Sampling(t)), make_groups
        )[0]
        for t in (1.0, 0.5)
    ]
    assert found[0] != found[1]


# -- what is planned -------------------------------------------------------------------------------


def plan(config: recipe.Recipe):
    """What a planner makes of three groups of two members, one of them without variance, and one of three."""
    planner = Planner(config, 0, "learner")
    events = []
    for name, rewards in {"g0": (1, 0), "g1": (1, 1), "g2": (0.5, 1), "g3": (1, 0, 0)}.items():
        for member, reward in enumerate(rewards):
            trajectory = f"{name}-{member}-0"
            tokens = Tokens.given([1]) + Tokens.sampled([2], [-0.5], [0])
            events += [
                Admitted(
                    trajectory=trajectory, task="t", public=PublicPart(messages=[]), private_key=""
                ),
                Turn(trajectory=trajectory, tokens=tokens, text="", last=True),
                Scored(trajectory=trajectory, reward=float(reward)),
            ]
    for seq, event in enumerate(events, start=1):
        planner.observe(event, seq, float(seq))
    found = planner.filters(0)
    for seq, event in enumerate(found, start=1000):
        planner.observe(event, seq, float(seq))
    return found, planner.plan(0)


@pytest.mark.parametrize("key", PLANNED)
def test_a_key_changes_what_is_planned(key: str) -> None:
    """Which groups are filtered, or which step is planned."""
    base = recipe.Recipe(
        policy=recipe.Policy(model="m"),
        learner=recipe.Learner(group_size=2, groups_per_step=4, refill_limit=3.0, threads=1),
    )
    if key in ("steps", "groups_per_step", "threads", "filter.zero_variance", "filter.mean_reward"):
        base = with_keys(base, {"groups_per_step": 2})
    assert plan(base) != plan(with_keys(base, {key: PLANNED[key]}))


def test_which_weights_are_kept() -> None:
    """The newest few, so many as the recipe says."""
    kept = [
        OldWeights(None, "run", with_keys(BASE, {"weights_kept": count})).keep(9)
        for count in (2, 4)
    ]
    assert kept == [{0, 8, 9}, {0, 6, 7, 8, 9}]


def test_which_checkpoints_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of step 0, the newest few, and the best few by what the recipe says is best."""
    scores = Scores()
    for step, reward in enumerate((0.9, 0.1, 0.2, 0.8, 0.3, 0.4), start=1):
        row = {"step": step, "reward_mean": reward}
        scores.observe(Stepped(step=step, policy_version=step, weights_sha256="", metrics=row))
        scores.observe(Evaluated(trajectory=f"e{step}x0-0-0", reward=1.0 - reward))
    assert _kept(tmp_path / "a", monkeypatch, scores) == [0, 1, 5, 6]
    assert _kept(tmp_path / "b", monkeypatch, scores, checkpoints_kept=1) == [0, 1, 6]
    assert _kept(tmp_path / "c", monkeypatch, scores, best_checkpoints_kept=2) == [0, 1, 4, 5, 6]
    assert _kept(tmp_path / "d", monkeypatch, scores, best_by="evaluation") == [0, 2, 5, 6]


def _kept(
    runs: Path, monkeypatch: pytest.MonkeyPatch, scores: Scores, **changes: object
) -> list[int]:
    """The checkpoints of a learner with these keys that has written one after each step."""
    monkeypatch.setattr(run_folder, "RUNS", runs)
    config = with_keys(BASE, changes)
    process = SimpleNamespace(run="run", recipe=config, bus=None)
    writer = training.Training(process)._checkpoints
    for step in range(7):
        writer.write(step, [("file", b"")], scores.by_step(config.learner))
    writer.wait()
    return [step_of(path) for path in checkpoints(runs / "run" / "checkpoints")]
