"""Images as a vision-language model takes them: the tokens that stand for one, and its pixels.

The processor of the model's folder says how an image is cut and scaled, and so how many tokens it is.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from safetensors.torch import save
from transformers import AutoConfig, AutoProcessor

from engines.errors import EngineError
from schemas.images import SEEING_MODELS

_PILLOW_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)


class Processed(NamedTuple):
    """One image."""

    ids: list[int]
    """What it is in a conversation: the tokens that stand for it, with those around and between them."""
    pixels: bytes
    """As in ImageInput."""


class Processor:
    """A folder's image processor."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineError (`unsupported_model`) for a folder without one."""
        try:
            processor: Any = AutoProcessor
            self._processor = processor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            why = f"its model sees images, and the folder has no processor for them: {error}"
            raise EngineError("unsupported_model", why) from error
        self.token: str = self._processor.image_token
        self.token_id = int(self._processor.image_token_id)
        """The token that stands for a part of an image."""

    def process(self, data: bytes) -> Processed:
        """A picture's file. Raises EngineError (`bad_image`) for what is none."""
        try:
            with Image.open(io.BytesIO(data)) as picture:
                coloured = picture.convert("RGB")
        except _PILLOW_ERRORS as error:
            raise EngineError("bad_image", str(error)) from error
        made = self._processor(
            images=[coloured], text=self.token, add_special_tokens=False, return_tensors="pt"
        )
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        return Processed(ids, save({name: part.contiguous() for name, part in made.items()}))


def open_processor(folder: Path) -> Processor | None:
    """The processor of a model that sees images; None for any other. Raises EngineError (`unsupported_model`)."""
    kind = AutoConfig.from_pretrained(folder).model_type
    return Processor(folder) if kind in SEEING_MODELS else None
