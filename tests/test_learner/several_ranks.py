"""One rank of a learner that trains in every way; run by test_deepspeed_policy.py, as many as it likes at once.

Rank 0 writes what it found into a folder: by way, rows of metrics, weights, checkpoints.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch

from learner.checkpoints import write_folder
from learner.samples import Sample
from schemas import algorithm, recipe

WAYS: dict[str, dict[str, object]] = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {"zero_stage": 3},
    "stage 2, offloaded": {"zero_stage": 2, "offload": "optimizer"},
    "stage 3, offloaded": {"zero_stage": 3, "offload": "weights"},
}
BASE = recipe.Recipe(
    policy=recipe.Policy(model="tiny", max_tokens=256),
    learner=recipe.Learner(
        microbatch_tokens=128,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        advantage=algorithm.Advantage(estimator="gae"),
        kl=algorithm.Kl(coefficient=0.1),
        correction=algorithm.Correction(token="none", sequence_min=1e-8, sequence_max=1e8),
    ),
)


def on_two_ranks(way: str) -> recipe.Recipe:
    learner = msgspec.structs.replace(BASE.learner, ranks=2, **WAYS[way])
    return msgspec.structs.replace(BASE, learner=learner)


def batch(step: int) -> list[list[Sample]]:
    """Trajectories of many lengths; at step 3 fewer than there are ranks."""
    random = np.random.default_rng(step)
    shape = (5, 4) if step < 3 else (1, 1)
    return [
        [_sample(group, member, random) for member in range(shape[1])] for group in range(shape[0])
    ]


def _sample(group: int, member: int, random: np.random.Generator) -> Sample:
    length = int(random.integers(1, 40))
    return Sample(
        trajectory=f"g{group}-{member}-0",
        group=f"g{group}",
        ids_T=np.concatenate([np.arange(9) + 40 * group, random.integers(3, 300, length)]).astype(
            np.int32
        ),
        mask_T=np.arange(9 + length) >= 9,
        logprobs_T=np.full(9 + length, -5, np.float32),
        versions_T=np.zeros(9 + length, np.int32),
        reward=float(random.random()),
    )


SEEING = ["stage 1", "stage 3"]


def seeing(way: str = "") -> recipe.Recipe:
    """Micro-batches with more and with fewer images; `way`: on two ranks."""
    learner = msgspec.structs.replace(
        BASE.learner, microbatch_tokens=48, weight_decay=0.0, advantage=algorithm.Advantage()
    )
    if way:
        learner = msgspec.structs.replace(learner, ranks=2, **WAYS[way])
    return msgspec.structs.replace(BASE, learner=learner)


def seen(folder: Path) -> list[list[Sample]]:
    """Groups whose members were shown an image, or two."""
    found: list[list[Sample]] = runpy.run_path(str(Path(__file__).with_name("test_images.py")))[
        "samples"
    ](folder)
    return found


def main(folder: Path, one_rank: Path, out: Path, sees: Path) -> None:
    """`one_rank`: a checkpoint after step 2."""
    from learner.deepspeed_policy import DeepSpeedPolicy, follow
    from learner.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks()
    if ranks.rank:
        follow(ranks)
    for way in WAYS:
        policy = DeepSpeedPolicy.lead(ranks, folder, on_two_ranks(way))
        policy.hold_reference(folder)
        rows = [policy.train_step(batch(step), step) for step in (1, 2)]
        write_folder(out / way / "checkpoint", policy.checkpoint_files(2))
        rows.append(policy.train_step(batch(3), 3))
        (out / way / "weights.safetensors").write_bytes(policy.weights())
        policy.load_checkpoint(one_rank)
        resumed = policy.train_step(batch(3), 3)
        (out / way / "resumed.safetensors").write_bytes(policy.weights())
        policy.restart_optimizer()
        restarted = policy.train_step(batch(4), 4)
        taught = policy.supervised_step(batch(5)[0], 5, 1e-3)
        found = {"rows": rows, "resumed": resumed, "restarted": restarted, "taught": taught}
        engine = policy._engine
        given = [engine.zero_offload_optimizer(), engine.zero_offload_param()]
        found |= {"stage": engine.zero_optimization_stage(), "offload": given.count(None)}
        (out / way / "found.json").write_text(json.dumps(found))
    for way in SEEING:
        policy = DeepSpeedPolicy.lead(ranks, sees, seeing(way))
        policy.hold_reference(sees)
        rows = [policy.train_step(seen(sees), step) for step in (1, 2)]
        (out / way / "seeing.safetensors").write_bytes(policy.weights())
        (out / way / "seeing.json").write_text(json.dumps(rows))
    ranks.leave()
    os._exit(0)  # as a learner does; gloo takes its time


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
