"""Images of messages and observations: their bytes go to the store, the log names them by their hash."""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from bus import blobs
from bus.connection import Bus
from schemas.images import StoredImage
from tools.tool import Image

StoreImages = Callable[[Sequence[Image]], Awaitable[list[StoredImage]]]
"""Puts images away, in order."""
LoadImage = Callable[[StoredImage], Awaitable[Image]]
"""Gets one again."""


class Images(NamedTuple):
    """Where a toolbox puts images, and has them from."""

    store: StoreImages
    load: LoadImage


_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's markers of a frame's header."""


async def store_images(bus: Bus, run: str, images: Sequence[Image]) -> list[StoredImage]:
    """Put images away, in order. One at a time: they may be large. Raises BusError."""
    stored = []
    for image in images:
        width, height = image_size(image.data)
        stored.append(
            StoredImage(
                sha256=await blobs.put_blob(bus, run, image.data),
                media_type=image.media_type,
                size_bytes=len(image.data),
                width=width,
                height=height,
            )
        )
    return stored


async def load_image(bus: Bus, run: str, stored: StoredImage) -> Image:
    """An image that was put away. Raises BusError."""
    data = await blobs.get_blob(bus, run, stored.sha256)
    return Image(data=data, media_type=stored.media_type)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of a PNG or JPEG, read from its header; (0, 0) for anything else."""
    if data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    at = 2 if data.startswith(_JPEG) else len(data)
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _JPEG_SIZES:
            height, width = data[at + 5 : at + 7], data[at + 7 : at + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0
