"""One process of bench.learner: a model takes steps on a batch whenever it is told to, in one of several ways.

python -m bench.learner_step KIND WORKLOAD FOLDER STEPS THREADS
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from learner.samples import Sample
from schemas import recipe

TOKENS = (10, 250)
"""The least and one more than the most: in every vocabulary, and not special."""
NEVER = 1e9
"""A gradient's norm at which it is clipped: clipping costs, but changes nothing."""


@dataclass(frozen=True)
class Workload:
    """A model and a batch for it."""

    model: str
    dtype: str
    groups: int
    group_size: int
    prompt_tokens: tuple[int, int]
    """Least and most; the same within a group."""
    completion_tokens: tuple[int, int]
    microbatch_tokens: int

    @property
    def max_tokens(self) -> int:
        return self.prompt_tokens[1] + self.completion_tokens[1]

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids_T) for group in self.samples() for sample in group)

    def samples(self) -> list[list[Sample]]:
        """Tokens at random, the same each time."""
        random = np.random.default_rng(0)
        groups = []
        for group in range(self.groups):
            prompt = random.integers(*TOKENS, random.integers(*self.prompt_tokens))
            members = []
            for member in range(self.group_size):
                count = random.integers(*self.completion_tokens)
                ids_T = np.concatenate([prompt, random.integers(*TOKENS, count)])
                mask_T = np.arange(len(ids_T)) >= len(prompt)
                members.append(
                    Sample(
                        trajectory=f"g{group}-{member}-0",
                        group=f"g{group}",
                        ids_T=ids_T.astype(np.int32),
                        mask_T=mask_T,
                        logprobs_T=np.zeros(len(ids_T), np.float32),
                        versions_T=np.where(mask_T, 0, -1).astype(np.int32),
                        reward=float(member % 2),
                    )
                )
            groups.append(members)
        return groups

    def recipe(self, **learner: Any) -> recipe.Recipe:
        return recipe.Recipe(
            policy=recipe.Policy(model=self.model, dtype=self.dtype, max_tokens=self.max_tokens),  # type: ignore[arg-type]
            learner=recipe.Learner(
                learning_rate=1e-6,
                max_grad_norm=NEVER,
                microbatch_tokens=self.microbatch_tokens,
                **learner,
            ),
        )


WORKLOADS = {
    "tiny": Workload("recipes.arithmetic:model", "float32", 16, 8, (8, 48), (8, 128), 8192),
    "smollm2": Workload("recipes.smollm2:model", "bfloat16", 2, 8, (48, 160), (16, 96), 2048),
}
WORKLOADS["quick"] = replace(WORKLOADS["tiny"], groups=2, microbatch_tokens=1024)


# -- steps -----------------------------------------------------------------------------------------


class Turns:
    """This process takes a step whenever it is told to, and says how long it took."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whoever prints does not answer
        self._imported_bytes = psutil.Process().memory_info().rss
        self._begun = 0.0

    def begin(self) -> None:
        self._answer({})
        sys.stdin.readline()
        self._begun = time.perf_counter()

    def end(self, grad_norm: float | None) -> None:
        """Of the step's gradient, where it is known."""
        self._answer({"seconds": time.perf_counter() - self._begun, "grad_norm": grad_norm})

    def close(self) -> None:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._answer({"peak_mb": (peak_bytes - self._imported_bytes) / 1e6})

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def ours(work: Workload, folder: Path, steps: int, kind: str) -> None:
    import torch

    from learner.logprobs import sampled_logprobs
    from learner.models import fastest_dtype
    from learner.pack import pack
    from learner.policy import Policy

    turns = Turns()
    policy = Policy.open(
        folder, work.recipe(gradient_checkpointing=kind == "recomputed"), device="cpu"
    )
    groups = work.samples()
    if kind == "unshared":
        for group in groups:
            for member, sample in enumerate(group):
                sample.ids_T[0] = 3 + member
    # The engine is the learner, so that no token is masked.
    samples = [sample for group in groups for sample in group]
    logprobs_N = np.zeros(sum(sample.sampled_count for sample in samples), np.float32)
    dtype = fastest_dtype(policy.dtype, policy.model.device)
    with torch.no_grad():
        for batch in pack(groups, work.microbatch_tokens):
            now = sampled_logprobs(policy.model, batch, 1.0, dtype)
            logprobs_N[batch.tokens_K] = now.logprobs_K.numpy()
    first = 0
    for sample in samples:
        sample.logprobs_T[sample.mask_T] = logprobs_N[first : first + sample.sampled_count]
        first += sample.sampled_count
    for step in range(1, steps + 1):
        turns.begin()
        row = policy.train_step(groups, step)
        turns.end(row["grad_norm"])
    turns.close()


def floor(work: Workload, folder: Path, steps: int, _: str) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from learner.models import fastest_dtype

    turns = Turns()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dtype = fastest_dtype(getattr(torch, work.dtype), model.device)
    samples = [sample for group in work.samples() for sample in group]
    length = round(sum(len(sample.ids_T) for sample in samples) / len(samples))
    sampled = round(sum(sample.sampled_count for sample in samples) / len(samples))
    ids_BT = torch.randint(*TOKENS, (len(samples), length))
    for _ in range(steps):
        turns.begin()
        for ids_RT in ids_BT.split(max(1, work.microbatch_tokens // length)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits_RTV = model(ids_RT, use_cache=False, logits_to_keep=sampled).logits
            cross_entropy(
                logits_RTV.flatten(0, 1).float(), ids_RT[:, -sampled:].flatten()
            ).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        turns.end(None)
    turns.close()


def trl(work: Workload, folder: Path, steps: int, _: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from learner.models import fastest_dtype

    turns = Turns()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = [sample for group in work.samples() for sample in group]
    padded = max(s.prompt_length for s in samples) + max(s.sampled_count for s in samples)
    most = max(1, work.microbatch_tokens // padded)
    sequences = max(n for n in range(1, most + 1) if len(samples) % n == 0)

    class Given(GRPOTrainer):  # type: ignore[misc]
        """The batch's completions in the place of sampled ones; they are scored once."""

        scored: dict[str, Any] | None = None

        def _generate(self, _prompts: list[Any]) -> tuple[Any, ...]:
            prompts = [sample.ids_T[: sample.prompt_length].tolist() for sample in samples]
            completions = [sample.ids_T[sample.prompt_length :].tolist() for sample in samples]
            whole = [[1] * len(completion) for completion in completions]
            texts = ["" for _ in samples]
            return prompts, completions, whole, texts, None, {}, None, [[] for _ in samples]

        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
            self.scored = self.scored or super()._generate_and_score_completions(inputs)
            return self.scored

    class Timed(TrainerCallback):  # type: ignore[misc]
        """The first step, in which it scores, warms up."""

        grad_norm: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if self.grad_norm is None:
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(self.grad_norm)

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=fastest_dtype(getattr(torch, work.dtype), model.device) == torch.bfloat16,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=len(samples) // sequences,
        num_generations=work.group_size,
        max_completion_length=work.completion_tokens[1],
        loss_type="dapo",
        scale_rewards="none",
        learning_rate=1e-6,
        max_grad_norm=NEVER,
        max_steps=steps,
        gradient_checkpointing=False,  # its default would cost it a third more
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Given(
        model,
        lambda **_: [sample.reward for sample in samples],
        settings,
        Dataset.from_list([{"prompt": "1"}] * len(samples)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Timed()],
    ).train()
    turns.close()


KINDS: dict[str, Callable[[Workload, Path, int, str], None]] = {
    "ours": ours,
    "unshared": ours,
    "recomputed": ours,
    "floor": floor,
    "trl": trl,
}
"""`unshared`: ours where no two prompts begin alike; `recomputed`: with `learner.gradient_checkpointing`."""


def main() -> None:
    import torch

    kind, workload, folder, steps, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    KINDS[kind](WORKLOADS[workload], Path(folder), int(steps), kind)


if __name__ == "__main__":
    main()
