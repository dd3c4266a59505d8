"""A tiny Llama with random weights and a byte-level tokenizer, on disk as any Hugging Face model is."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learner.policy import Policy
from learner.samples import Sample
from schemas import algorithm, recipe

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["What is 12 * 34?", "<python>print(12 * 34)</python>", "The answer is 408.", "Add 5 and 7."]
VOCABULARY = 300


def build_model(tie: bool = True) -> LlamaForCausalLM:
    """A float32 Llama of two layers with grouped heads; the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.2,  # distributions far from uniform, so that mistakes show
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; trained here, on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    return fast


transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    build_model().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path) -> recipe.Recipe:
    return recipe.Recipe(
        policy=recipe.Policy(model=str(folder), max_tokens=256),
        # Made-up engine log-probabilities must not all be masked, or no step would move anything.
        learner=recipe.Learner(
            learning_rate=1e-3,
            microbatch_tokens=256,
            correction=algorithm.Correction(token="none", sequence="none"),
        ),
    )


@pytest.fixture
def policy(folder: Path, config: recipe.Recipe) -> Policy:
    return Policy.open(folder, config)


def build_sample(
    ids: Sequence[int],
    mask: Sequence[int],
    reward: float = 0.0,
    logprobs: Sequence[float] | None = None,
    name: str = "g0-0-0",
) -> Sample:
    """A sample from plain lists; without `logprobs` the engine gave -6 to every sampled token."""
    mask_T = np.array(mask, np.bool_)
    behaviour_T = np.where(mask_T, -6.0, 0.0) if logprobs is None else np.array(logprobs)
    return Sample(
        trajectory=name,
        group=name.partition("-")[0],
        ids_T=np.array(ids, np.int32),
        mask_T=mask_T,
        logprobs_T=behaviour_T.astype(np.float32),
        versions_T=np.where(mask_T, 0, -1).astype(np.int32),
        reward=reward,
    )


def build_groups(count: int = 3, size: int = 4, seed: int = 0) -> list[list[Sample]]:
    """Groups that share a prompt each, with completions of several lengths, one tool observation and rewards 0, 1."""
    random = np.random.default_rng(seed)
    groups = []
    for group in range(count):
        prompt = random.integers(3, VOCABULARY, random.integers(4, 20)).tolist()
        members = []
        for member in range(size):
            parts = [random.integers(3, VOCABULARY, n).tolist() for n in random.integers(1, 12, 3)]
            ids = [*prompt, *parts[0], *parts[1], *parts[2]]
            mask = (
                [0] * len(prompt) + [1] * len(parts[0]) + [0] * len(parts[1]) + [1] * len(parts[2])
            )
            name = f"g{group}-{member}-0"
            members.append(build_sample(ids, mask, reward=float(member % 2), name=name))
        groups.append(members)
    return groups


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    return build_model


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    return build_sample


@pytest.fixture
def make_groups() -> Callable[..., list[list[Sample]]]:
    return build_groups
