"""Three steps on fixed batches, printed to the last bit; run by test_policy.py here and in a fresh process."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from learner.policy import Policy
from learner.samples import Sample
from schemas import algorithm, recipe

CONFIG = recipe.Recipe(
    policy=recipe.Policy(model="tiny", max_tokens=256),
    learner=recipe.Learner(
        microbatch_tokens=512,
        learning_rate=1e-3,
        correction=algorithm.Correction(token="none", sequence="none"),
    ),
)


def three_steps(folder: Path, threads: int) -> list[str]:
    """The losses in hexadecimal and the hash of the weights after them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    random = np.random.default_rng(5)
    policy = Policy.open(folder, CONFIG)
    losses = []
    for step in (1, 2, 3):
        groups = [[_sample(group, member, random) for member in range(4)] for group in range(6)]
        losses.append(policy.train_step(groups, step)["loss"].hex())
    torch.set_num_threads(before)
    return [*losses, hashlib.sha256(policy.weights()).hexdigest()]


def _sample(group: int, member: int, random: np.random.Generator) -> Sample:
    completion = random.integers(3, 300, 30)
    return Sample(
        trajectory=f"g{group}-{member}-0",
        group=f"g{group}",
        ids_T=np.concatenate([np.arange(9) + 40 * group, completion]).astype(np.int32),
        mask_T=np.arange(39) >= 9,
        logprobs_T=np.full(39, -5, np.float32),
        versions_T=np.zeros(39, np.int32),
        reward=float(member % 2),
    )


if __name__ == "__main__":
    print(json.dumps([three_steps(Path(sys.argv[1]), threads) for threads in (1, 2)]))
