"""The images of trajectories, as a vision-language model takes them; others read `<image>` in the place of a result's.

message, result: text "Image 2:\n<image>", images by their hashes
    → generator: the tokens of the text, with those of the image in it, once
    → generator's engine and learner: the same pixels at those tokens
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from actors.actor import HopFailed
from actors.images import load_image
from bus.connection import Bus
from engines.chat import Content
from engines.errors import EngineError
from engines.images import Processed, Processor, open_processor
from schemas.events import Result
from schemas.images import PLACEHOLDER, ImageInput, StoredImage
from schemas.tokens import Tokens
from tools.tool import Image

_KEPT_BYTES = 256 << 20


def open_pictures(folder: Path, bus: Bus, run: str) -> "Pictures | None":
    """Those of a run, for the model in a Hugging Face folder; None if it sees no images. Raises EngineError."""
    processor = open_processor(folder)
    return Pictures(processor, partial(load_image, bus, run)) if processor else None


class Pictures:
    """Loads images and keeps those last used."""

    def __init__(
        self, processor: Processor, load: Callable[[StoredImage], Awaitable[Image]]
    ) -> None:
        self._processor = processor
        self._load = load
        self._kept: OrderedDict[str, Processed] = OrderedDict()
        self._kept_bytes = 0

    async def content(self, result: Result) -> Content:
        """A result as the policy sees it. Raises HopFailed, BusError."""
        if not result.images:
            return result.text
        texts = result.text.split(PLACEHOLDER, len(result.images))
        parts: list[str | list[int]] = [texts[0]]
        for index, stored in enumerate(result.images, start=1):
            parts.append((await self._processed(stored)).ids)
            parts += texts[index : index + 1]
        return parts

    async def prompt(self, ids: Sequence[int], images: Sequence[StoredImage]) -> list[int]:
        """A prompt with one token for each image, with all of them for each. Raises HopFailed, BusError."""
        count = ids.count(self._processor.token_id)
        if count != len(images):
            why = (
                f"public.messages have {len(images)} images, and the prompt {count} times {self._processor.token!r}: "
                'give each as a part of the content, {"type": "image", "path": …}, and none as text'
            )
            raise HopFailed("recipe", "image_in_messages", why)
        found: list[int] = []
        following = iter(images)
        for id_ in ids:
            is_image = id_ == self._processor.token_id
            found += (await self._processed(next(following))).ids if is_image else [id_]
        return found

    async def inputs(self, images: Sequence[StoredImage], tokens: Tokens) -> list[ImageInput]:
        """The images at their places among all tokens of a trajectory. Raises HopFailed, BusError.

        Those of results that the policy has not seen have no places, and are left out.
        """
        shown_T = np.frombuffer(tokens.ids, "<i4") == self._processor.token_id
        # a policy may write the token too: then it is a word of its own
        places = np.flatnonzero(shown_T & (np.frombuffer(tokens.mask, np.uint8) == 0)).tolist()
        found: list[ImageInput] = []
        for stored in images:
            if not places:
                break
            processed = await self._processed(stored)
            count = processed.ids.count(self._processor.token_id)
            found.append(ImageInput(places=places[:count], pixels=processed.pixels))
            places = places[count:]
        if places:
            what = f"{len(places)} tokens stand for images that it does not have"
            raise HopFailed("recipe", "image_in_messages", what)
        return found

    async def _processed(self, stored: StoredImage) -> Processed:
        if stored.sha256 in self._kept:
            self._kept.move_to_end(stored.sha256)
            return self._kept[stored.sha256]
        image = await self._load(stored)
        try:
            processed = await asyncio.to_thread(self._processor.process, image.data)
        except EngineError as error:
            raise HopFailed("tool", error.code, error.detail) from error
        if self._kept.setdefault(stored.sha256, processed) is processed:
            self._kept_bytes += len(processed.pixels)
        while self._kept_bytes > _KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.pixels)
        return processed
