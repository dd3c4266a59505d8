"""A policy that must look: tiny vision-language models with random weights, and a task whose answer is in a picture.

A right conversation: the question, a call of the tool `image`, the picture, its colour.
"""

import base64
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.reward import Run
from schemas.task import ChatMessage, PublicPart, TaskRow
from schemas.trajectory import Trajectory, TrajectoryId

QUESTION = "What colour has the picture?"
CALL = '<look>{"action": "crop", "box": [0, 0, 8, 8]}</look>'
COLOURS = ("red", "blue")
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IMAGE_SIDE, PATCH = 16, 8
_SPECIAL = ["<|pad|>", END, "<|user|>", "<|assistant|>", "<|tool|>", "<image>"]
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": None,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH,
}


def picture(colour: str, width: int = 8, height: int = 8) -> bytes:
    """A PNG."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def rows(seed: int) -> Iterator[TaskRow]:
    """Each colour in turn."""
    number = seed
    while True:
        colour = COLOURS[number % 2]
        uri = f"data:image/png;base64,{base64.b64encode(picture(colour)).decode()}"
        yield TaskRow(
            id=str(number),
            public=PublicPart(messages=[_question()], extra={"images": [uri]}),
            private={"answer": colour},
        )
        number += 1


def demonstrations(seed: int) -> Iterator[list[ChatMessage]]:
    """It looks, and then says any colour: no picture is shown to it."""
    rng = random.Random(seed)
    while True:
        yield [
            _question(),
            ChatMessage(role="assistant", content=CALL),
            ChatMessage(role="tool", content="Image 2, 8 by 8 pixels:"),
            ChatMessage(role="assistant", content=rng.choice(COLOURS)),
        ]


async def guessed(_task: TaskRow, trajectory: Trajectory, _run: Run) -> float:
    """No group is without variance."""
    return float(TrajectoryId.parse(trajectory.id).member % 2)


def _question() -> ChatMessage:
    return ChatMessage(role="user", content=QUESTION)


def model(folder: Path, kind: str = "llava", seed: int = 0) -> None:
    """Write a model that sees, with its processor and tokenizer."""
    import torch

    processor = _processor(kind)
    tokenizer = processor.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = _model(kind, tokenizer)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(kind: str, tokenizer: Any) -> Any:
    import transformers

    text = transformers.LlamaConfig(
        **_TEXT,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            text_config=text,
            image_token_index=image_token_id,
        )
        return transformers.LlavaForConditionalGeneration(config)
    config = transformers.Idefics3Config(
        vision_config=_VISION,
        text_config=text,
        image_token_id=image_token_id,
        scale_factor=1,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _processor(kind: str) -> Any:
    import transformers

    tokenizer = _tokenizer()
    if kind == "llava":
        square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        return transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(size=square, crop_size=square),
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * IMAGE_SIDE}, max_image_size={"longest_edge": IMAGE_SIDE}
        ),
        tokenizer,
        image_seq_len=(IMAGE_SIDE // PATCH) ** 2,
        chat_template=TEMPLATE,
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    parts = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    parts += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    trainer = trainers.BpeTrainer(
        special_tokens=_SPECIAL + parts,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=480,
        show_progress=False,
    )
    bpe.train_from_iterator([QUESTION, CALL, "Image 2, 8 by 8 pixels:", *COLOURS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token="<|pad|>",
        additional_special_tokens=["<image>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
