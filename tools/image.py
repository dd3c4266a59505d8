"""The `image` tool: looks closer at the task's images and at those of earlier results.

They are numbered from 1: first those of `public.extra.images` (paths beginning at `root`, `data:` URIs, or bytes), then
those that the task's messages show, then those that results have shown.
"""

import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from schemas.images import PLACEHOLDER
from tools.errors import ToolError
from tools.function import tool
from tools.tool import Context, Image, Observation, Options, Place
from tools.workers import Late, Workers, open_workers

_DATA_URI = re.compile(r"data:[\w/+.-]*;base64,", re.IGNORECASE)

Finite = Annotated[float, Meta(ge=-1e6, le=1e6)]
Box = Annotated[list[Finite], Meta(min_length=4, max_length=4)]


class ImageOptions(Options, frozen=True):
    """Where images are, and their limits."""

    root: str = ""
    """The folder where a task's relative paths begin; by default the recipe's."""
    scale: Annotated[float, Meta(ge=0)] = 0.0
    """The right and lower end of a box's coordinates, as 1 or 1000; 0: they are pixels."""
    max_pixels: Annotated[int, Meta(ge=1)] = 40_000_000
    """A larger image is not opened."""
    max_side: Annotated[int, Meta(ge=1)] = 2048
    """A larger result is made smaller."""


def image_bytes(given: object, root: Path) -> bytes:
    """An image as a task gives it: a path beginning at `root`, a `data:` URI, or bytes. Raises ToolError."""
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str):
        raise ToolError("bad_image", f"a path, a data: URI or bytes, not {type(given).__name__}")
    try:
        if found := _DATA_URI.match(given):
            return base64.b64decode(given[found.end() :], validate=True)
        return (root / given).read_bytes()
    except (OSError, ValueError) as error:
        raise ToolError("bad_image", f"{given[:200]}: {error}") from error


class Pictures:
    """The children that work on images, and where these are."""

    def __init__(self, options: ImageOptions, recipe_dir: str, workers: Workers) -> None:
        self._options = options
        self._root = Path(recipe_dir, options.root)
        self._workers = workers

    def bytes_of(self, given: object) -> bytes:
        """An image of `public.extra.images`. Raises ToolError."""
        return image_bytes(given, self._root)

    async def work(
        self, data: bytes, action: str, arguments: dict[str, Any], wall_s: float
    ) -> dict[str, Any]:
        """See tools/pictures.py. Raises Late."""
        limits = {"max_pixels": self._options.max_pixels, "max_side": self._options.max_side}
        arguments = {**arguments, "scale": self._options.scale}
        made: dict[str, Any] = await self._workers.call(
            wall_s, data=data, action=action, arguments=arguments, limits=limits
        )
        return made


@asynccontextmanager
async def open_pictures(options: ImageOptions, place: Place) -> AsyncIterator[Pictures]:
    """Around all calls of a process."""
    async with open_workers("tools.pictures:work", count=2) as workers:
        yield Pictures(options, place.recipe_dir, workers)


Number = Annotated[int, Meta(ge=-100_000, le=100_000)]


@tool(options=ImageOptions, opens=open_pictures)
async def image(  # noqa: PLR0913 (one for each action)
    context: Context,
    action: Literal["show", "crop", "zoom", "rotate", "frame"],
    number: Number = 1,
    box: Box | None = None,
    factor: Annotated[float, Meta(ge=0.1, le=32)] = 2.0,
    degrees: Finite = 90.0,
    frame: Number = 1,
) -> Observation:
    """Look closer at an image. The result is a new image, with the next number.

    Args:
        action: show it as it is; crop a box of it; zoom into a box; rotate it; or show one frame of an animation.
        number: Which image, from 1 in the order in which they were shown.
        box: For crop and zoom: left, upper, right and lower edge.
        factor: For zoom: how many times larger.
        degrees: For rotate: how far, clockwise.
        frame: For frame: which one, from 1.
    """
    pictures: Pictures = context.opened
    given = context.task.get("images", [])
    sources = [*(given if isinstance(given, list) else [given]), *context.images]
    if not 1 <= number <= len(sources):
        return Observation(text=f"There is no image {number}: there are {len(sources)}.", ok=False)
    if box is None and action in ("crop", "zoom"):
        return Observation(text=f"To {action}, give a `box`.", ok=False)
    source = sources[number - 1]
    data = (await source()).data if callable(source) else pictures.bytes_of(source)
    arguments = {"box": box, "factor": factor, "degrees": degrees, "frame": frame}
    wall_s = context.limits.wall_s
    try:
        made = await pictures.work(data, action, arguments, wall_s)
    except Late:
        return Observation(text=f"Timed out after {wall_s:g} s.", ok=False)
    if "error" in made:
        return Observation(text=made["error"], ok=False)
    text = f"Image {len(sources) + 1}, {made['width']} by {made['height']} pixels:\n{PLACEHOLDER}"
    return Observation(text=text, images=[Image(data=made["image"], media_type=made["media_type"])])
