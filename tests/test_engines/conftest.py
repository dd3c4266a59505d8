"""A tiny folder as a model hub would have it: random weights, a real tokenizer, a chat template."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from engines.engine import Engine
from engines.errors import EngineError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "You are a helpful assistant that may run python code.",
    "<python>print(12 * 34)</python> gives 408, so the answer is 408.",
    "What is 12 + 7? Compute the sum of the squares of 3 and 5.",
    "user assistant system tool",
] * 4
VOCABULARY = 320

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from uniform, so that an error in attention shows in the logits
}

_CONFIGS: dict[str, Any] = {
    "llama": partial(LlamaConfig, head_dim=32),  # the least that vLLM has
    "tied": LlamaConfig,
    "endless": partial(LlamaConfig, head_dim=32),
    "qwen2": Qwen2Config,
    "qwen3": partial(Qwen3Config, head_dim=8),
    "gemma": partial(GemmaConfig, head_dim=8),
    "phi": PhiConfig,
}


def make_tokenizer(chat_template: str | None = CHATML, *, endless: bool = False) -> Any:
    """A byte-level BPE in ChatML's style; `endless`: its end of turn is a token that the models lack."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = chat_template
    if endless:
        fast.add_special_tokens({"eos_token": "<|never|>"})
        assert fast.eos_token_id == VOCABULARY
    return fast


def make_model(family: str, seed: int = 0) -> Any:
    """A random model in float32."""
    torch.manual_seed(seed)
    if family == "gpt2":
        model = AutoModelForCausalLM.from_config(
            GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                vocab_size=VOCABULARY,
                eos_token_id=2,
                bos_token_id=1,
                initializer_range=0.3,
            )
        )
    else:
        config = _CONFIGS[family](**_SMALL)
        config.tie_word_embeddings = family != "llama"
        model = AutoModelForCausalLM.from_config(config)
    if family == "endless":
        model.generation_config.eos_token_id = model.config.eos_token_id = VOCABULARY
    return model.eval()


MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Write a family's folder, once per session for each family and seed."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str = "llama", seed: int = 0) -> Path:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            make_model(family, seed).save_pretrained(folder)
            make_tokenizer(endless=family == "endless").save_pretrained(folder)
            made[family, seed] = folder
        return made[family, seed]

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


OpenVllm = Callable[..., Awaitable[Engine]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def open_vllm() -> AsyncIterator[OpenVllm]:
    """Open vLLM on a folder, whose weights are version -1. One that is open is used again: each takes half a minute."""
    engines: dict[Path, Engine] = {}

    async def reopen(folder: Path, weight_swap: str = "token") -> Engine:
        if find_spec("vllm") is None:
            pytest.skip("vLLM IS NOT INSTALLED HERE: `make test-vllm` has an environment with it")
        from engines.vllm_engine import VllmEngine

        weights = (folder / "model.safetensors").read_bytes()
        try:
            await engines[folder].load(weights, -1)
        except (KeyError, EngineError):  # not opened yet, or closed by a test
            engines[folder] = await asyncio.to_thread(
                VllmEngine.open,
                folder,
                dtype="float32",
                slots=4,
                threads=1,
                context=128,
                weight_swap=weight_swap,
            )
        return engines[folder]

    yield reopen
    for engine in engines.values():
        await engine.close()
