"""TRL's trainers on our tensors: a real trainer with a real model, whose completions are given and not sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from learner.batch import Survey, tokens_of
from learner.logprobs import sampled_logprobs
from learner.objective import Objective
from learner.pack import pack
from learner.policy import Policy
from learner.samples import Sample
from schemas import recipe

VOCABULARY = 64
END = 1
GROUPS, SIZE = 2, 4

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, and a tokenizer of numbered words."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("peer")
    LlamaForCausalLM(config).save_pretrained(path)
    words = {"<pad>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Batch:
    """Two groups of four: a prompt, a turn, an observation, a turn; the engine is the learner but for some noise."""

    groups: list[list[Sample]] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]

    def padded(self, values: Sequence[np.ndarray]) -> torch.Tensor:
        """What each completion's tokens have, as TRL lays them out: padded on the right."""
        rows = [
            torch.from_numpy(row[s.prompt_length :].astype(np.float32))
            for s, row in zip(self.samples, values, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @property
    def behaviour(self) -> torch.Tensor:
        return self.padded([sample.logprobs_T for sample in self.samples])


@pytest.fixture
def batch(folder: Path) -> Batch:
    return make_batch(folder)


@pytest.fixture
def whole(folder: Path) -> Batch:
    """The same without observations, and the engine is the learner."""
    return make_batch(folder, noise=0.0, observations=False)


def make_batch(folder: Path, noise: float = 0.4, observations: bool = True) -> Batch:
    random = np.random.default_rng(0)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    batch = Batch()
    for g in range(GROUPS):
        prompt = random.integers(2, VOCABULARY, 3 + g)
        group = []
        for m in range(SIZE):
            parts = [random.integers(2, VOCABULARY, n) for n in random.integers(1, 7, 3)]
            truncated = (g, m) == (0, 2)
            if not truncated:
                parts[2][-1] = END
            ids_T = np.concatenate([prompt, *parts]).astype(np.int32)
            mask_T = np.repeat(
                [False, True, not observations, True], [len(prompt), *map(len, parts)]
            )
            with torch.no_grad():
                logits_TV = model(torch.from_numpy(ids_T).long()[None]).logits[0]
            now_T = np.zeros(len(ids_T))
            targets = torch.from_numpy(ids_T[1:]).long()[:, None]
            now_T[1:] = logits_TV[:-1].log_softmax(-1).gather(1, targets).squeeze(1).numpy()
            noisy_T = now_T + noise * random.normal(size=len(ids_T))
            group.append(
                Sample(
                    trajectory=f"g{g}-{m}-0",
                    group=f"g{g}",
                    ids_T=ids_T,
                    mask_T=mask_T,
                    logprobs_T=np.where(mask_T, noisy_T, 0).astype(np.float32),
                    versions_T=np.where(mask_T, 0, -1).astype(np.int32),
                    reward=float(np.float32(random.normal())),
                    truncated=truncated,
                )
            )
        batch.groups.append(group)
    return batch


# -- theirs ----------------------------------------------------------------------------------------


def _dataset() -> Dataset:
    return Dataset.from_list([{"prompt": "w2"}] * (GROUPS * SIZE))


def _settings(tmp_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": GROUPS * SIZE,
        "num_generations": SIZE,
        "gradient_checkpointing": False,
        "beta": 0.0,
        **settings,
    }


def _rewards_of(batch: Batch) -> Any:
    def reward(**_: Any) -> list[float]:
        return [sample.reward for sample in batch.samples]

    return reward


class Grpo(GRPOTrainer):
    """TRL's GRPO, with the batch's completions in the place of sampled ones."""

    given: Batch

    def _generate(self, _prompts: list[Any]) -> tuple[Any, ...]:
        samples = self.given.samples
        starts = [sample.prompt_length for sample in samples]
        return (
            [s.ids_T[:n].tolist() for s, n in zip(samples, starts, strict=True)],
            [s.ids_T[n:].tolist() for s, n in zip(samples, starts, strict=True)],
            [s.mask_T[n:].astype(int).tolist() for s, n in zip(samples, starts, strict=True)],
            ["" for _ in samples],
            [s.logprobs_T[n:].tolist() for s, n in zip(samples, starts, strict=True)],
            {},
            None,
            [[] for _ in samples],
        )


class Rloo(RLOOTrainer):
    """TRL's RLOO; it knows no observations within a completion, so that all of its tokens are the policy's."""

    given: Batch

    def _generate(self, _prompts: list[Any]) -> tuple[Any, ...]:
        samples = self.given.samples
        starts = [sample.prompt_length for sample in samples]
        return (
            [s.ids_T[:n].tolist() for s, n in zip(samples, starts, strict=True)],
            [s.ids_T[n:].tolist() for s, n in zip(samples, starts, strict=True)],
            ["" for _ in samples],
        )


@dataclass
class Theirs:
    """What TRL makes of a batch."""

    trainer: Any
    inputs: dict[str, Any]

    def loss(self) -> tuple[float, dict[str, torch.Tensor]]:
        """And its gradient, by parameter."""
        self.trainer.model.zero_grad()
        loss = self.trainer._compute_loss(self.trainer.model, self.inputs)
        loss.backward()
        named = self.trainer.model.named_parameters()
        return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.fixture
def grpo(folder: Path, tmp_path: Path):
    """A function of TRL's settings: its inputs of the loss, of a batch."""

    def make(batch: Batch, *, engine: bool = False, **settings: Any) -> Theirs:
        args = GRPOConfig(**_settings(tmp_path, {"max_completion_length": 20, **settings}))
        model = LlamaForCausalLM.from_pretrained(folder)
        trainer = Grpo(
            model, _rewards_of(batch), args, _dataset(), processing_class=_tokenizer(folder)
        )
        return _scored(trainer, batch, engine)

    return make


@pytest.fixture
def rloo(folder: Path, tmp_path: Path):
    """The same for RLOO."""

    def make(batch: Batch, **settings: Any) -> Theirs:
        args = RLOOConfig(**_settings(tmp_path, settings))
        model = LlamaForCausalLM.from_pretrained(folder)
        trainer = Rloo(
            model, _rewards_of(batch), args, _dataset(), processing_class=_tokenizer(folder)
        )
        return _scored(trainer, batch, engine=False)

    return make


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _scored(trainer: Any, batch: Batch, engine: bool) -> Theirs:
    trainer.given = batch
    trainer.use_vllm = engine  # whether to correct for an engine; nothing is sampled either way
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return Theirs(
        trainer, trainer._generate_and_score_completions([{"prompt": "w2"}] * GROUPS * SIZE)
    )


# -- ours ------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """What we make of a batch, with every micro-batch's gradient."""

    loss: float
    gradients: dict[str, torch.Tensor]
    advantages_B: torch.Tensor
    """Of each trajectory's first sampled token."""


@pytest.fixture
def learn(folder: Path):
    """A function of a batch and a recipe: the loss of one update, before the optimizer."""
    return partial(_learn, folder)


def _learn(folder: Path, batch: Batch, config: recipe.Recipe, survey: Survey | None = None) -> Ours:
    policy = Policy.open(folder, config, "cpu")
    tokens = tokens_of(batch.groups, 1, config, survey or Survey())
    objective = Objective(config, tokens, (0, 1))
    total = 0.0
    for micro in pack(batch.groups, 64):
        gradient = config.learner.loss.entropy > 0
        now = sampled_logprobs(policy.model, micro, 1.0, torch.float32, gradient)
        loss = objective(micro, now).loss / objective.divisor
        loss.backward()
        total += loss.item()
    _, firsts = np.unique(tokens.sequences_N.numpy(), return_index=True)
    named = policy.model.named_parameters()
    return Ours(
        total,
        {name: p.grad.clone() for name, p in named if p.grad is not None},
        tokens.advantages_N[firsts],
    )
