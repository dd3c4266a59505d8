"""Two-digit products: the policy cannot know them, so it must learn to ask Python.

The cold start imitates a careless user of the tool, who guesses, mistakes the operator or miscopies more often than
not. Every skill that a right answer needs is in there; which of them pay is what reinforcement learning finds out.

A right conversation is about 30 tokens:

    <|user|>What is 47 * 86?<|end|><|assistant|><python>47*86</python><|end|><|tool|>4042<|end|><|assistant|>4042<|end|>
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from schemas.task import ChatMessage, PublicPart, TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPERANDS = range(32, 100)
"""From 32 on every product has four digits, so copying it is always looking the same distance back."""
HELD_OUT_SHARE = 0.1
"""Of the operand pairs, never trained on: neither as 47 * 86 nor as 86 * 47."""

PAD, USER, ASSISTANT, TOOL, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# -- tasks -----------------------------------------------------------------------------------------


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair, in either order, belongs to the evaluation."""
    return crc32(f"{min(a, b)}*{max(a, b)}".encode()) < HELD_OUT_SHARE * 2**32


def rows(seed: int) -> Iterator[TaskRow]:
    """Training problems without end; all of them once, in an order of their own, before any comes again."""
    rng = random.Random(f"rows {seed}")
    while True:
        yield from map(_row, _shuffled(rng, held_out=False))


def held_out(seed: int) -> Iterator[TaskRow]:
    """Each evaluation problem once; the seed gives the order."""
    yield from map(_row, _shuffled(random.Random(f"held out {seed}"), held_out=True))


def _shuffled(rng: random.Random, held_out: bool) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if is_held_out(a, b) == held_out]
    rng.shuffle(pairs)
    return pairs


def _row(pair: tuple[int, int]) -> TaskRow:
    a, b = pair
    return TaskRow(
        id=f"{a}x{b}",
        public=PublicPart(messages=[_question(a, b)]),
        private={"answer": str(a * b)},
    )


def _question(a: int, b: int) -> ChatMessage:
    return ChatMessage(role="user", content=f"What is {a} * {b}?")


# -- cold start ------------------------------------------------------------------------------------

GUESSES = 0.35
"""The share of demonstrations that answer without the tool, and so wrongly."""
WRONG_OPERATOR = 0.6
"""Of the calls: more than half, so that the likeliest turn of the cold-started policy is a wrong one."""
MISCOPIED = 0.1
"""Of the answers that follow a result."""


def demonstrations(seed: int) -> Iterator[list[ChatMessage]]:
    """Conversations about training problems without end; about a quarter of them answer rightly."""
    rng = random.Random(f"demonstrations {seed}")
    while True:
        yield from (_demonstration(rng, a, b) for a, b in _shuffled(rng, held_out=False))


def _demonstration(rng: random.Random, a: int, b: int) -> list[ChatMessage]:
    if rng.random() < GUESSES:
        guess = rng.randint(1000, 9998)
        guess += guess >= a * b  # any number of four digits but the answer
        return [_question(a, b), ChatMessage(role="assistant", content=str(guess))]
    operator = "+" if rng.random() < WRONG_OPERATOR else "*"
    result = a + b if operator == "+" else a * b
    answer = str(result)
    if rng.random() < MISCOPIED:
        answer = str(_other_than(result, rng))
    return [
        _question(a, b),
        ChatMessage(role="assistant", content=f"<python>{a}{operator}{b}</python>"),
        ChatMessage(role="tool", content=str(result)),
        ChatMessage(role="assistant", content=answer),
    ]


def _other_than(number: int, rng: random.Random) -> int:
    """A number of the same length that differs in the last digit."""
    return number - number % 10 + (number % 10 + rng.randint(1, 9)) % 10


# -- the model -------------------------------------------------------------------------------------

MODEL_SEED = 0


def model(folder: Path) -> None:
    """Write the untrained policy as a Hugging Face folder: a small Llama and a tokenizer for these conversations."""
    import torch  # seconds to import, and the rows need neither
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Copying digits is looking a few places back. With positions this sharp and initial weights this large
        # results are copied after 100 steps; with the defaults (10000 and 0.02) not after 150.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=192**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(MODEL_SEED)
        policy = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level, with each digit by itself and the words of the task merged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[PAD, USER, ASSISTANT, TOOL, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    bpe.train_from_iterator([_question(a, a).content for a in OPERANDS], trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in ("<python>", "</python>")])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
