"""Images of a data row's own messages: parts, as Hugging Face writes them, become a text and what it shows.

    row   {"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Which animal?"}]}
    log   {"role": "user", "content": "<image>Which animal?", "images": [{"sha256": …}]}

The part of an image has `path` (relative to the recipe), `url` (a `data:` URI), `base64`, or `image`, which is any of
the first two or the file's bytes. A file is read when its row is admitted: all of them may be larger than the memory.
"""

import io
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import msgspec
from msgspec.structs import replace

from actors.errors import RecipeError
from schemas.images import PLACEHOLDER, StoredImage
from schemas.task import PublicPart, TaskRow
from tools.errors import ToolError
from tools.image import image_bytes
from tools.tool import Image

_KEYS = ("image", "path", "url", "base64")


class _Text(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class _Image(msgspec.Struct, tag_field="type", tag="image", forbid_unknown_fields=True):
    image: Any = None
    path: str = ""
    url: str = ""
    base64: str = ""


class RowImage(NamedTuple):
    """An image of a row that is not read yet."""

    message: int
    """The index of its message."""
    given: object
    where: str
    """The row and the part in it, for people."""


class PicturedRow(TaskRow, frozen=True, kw_only=True):
    """A row whose messages have images."""

    images: tuple[RowImage, ...]
    """In the order of their placeholders."""


def images_of(row: TaskRow) -> tuple[RowImage, ...]:
    """Those of its messages."""
    return row.images if isinstance(row, PicturedRow) else ()


def without_parts(
    row: dict[str, Any], where: str, recipe_dir: str
) -> tuple[dict[str, Any], tuple[RowImage, ...]]:
    """A row as it was read, with a text for each content that is a list of parts, and its images.

    What is no row it leaves as it is. Raises RecipeError.
    """
    messages = public.get("messages") if isinstance(public := row.get("public"), dict) else None
    if not isinstance(messages, list):
        return row, ()
    texts, images = [], []
    for index, message in enumerate(messages):
        if isinstance(message, dict) and "images" in message:
            why = 'give an image as a part of `content`: {"type": "image", "path": …}'
            raise RecipeError(where, f"public.messages[{index}].images", why)
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            at = f"public.messages[{index}].content"
            text, given = _read(message["content"], where, at)
            images += [RowImage(index, each, f"{where}: {place}") for place, each in given]
            message = message | {"content": text}
        texts.append(message)
    for image in images:
        if _is_path(image.given) and not isfile(Path(recipe_dir, image.given)):
            raise RecipeError(image.where, "", f"no file {image.given[:200]!r}")
    return row | {"public": {**row["public"], "messages": texts}}, tuple(images)


def _read(parts: list[Any], where: str, at: str) -> tuple[str, list[tuple[str, object]]]:
    """The text, and each image as it is given, with its place in the row."""
    bare = [
        {key: value for key, value in part.items() if value is not None}
        if isinstance(part, dict)
        else part
        for part in parts
    ]
    try:
        read = msgspec.convert(bare, list[_Text | _Image])
    except msgspec.ValidationError as error:
        raise RecipeError(where, "", str(error).replace("`$", f"`$.{at}")) from error
    images = [(f"{at}[{i}]", part) for i, part in enumerate(read) if isinstance(part, _Image)]
    for i, part in enumerate(read):
        if images and isinstance(part, _Text) and PLACEHOLDER in part.text:
            why = f"{PLACEHOLDER} stands where an image goes: write it otherwise"
            raise RecipeError(where, f"{at}[{i}].text", why)
    text = "".join(part.text if isinstance(part, _Text) else PLACEHOLDER for part in read)
    return text, [(place, _given(part, where, place)) for place, part in images]


def _is_path(given: object) -> TypeGuard[str]:
    return isinstance(given, str) and not given.startswith("data:")


def _given(part: _Image, where: str, place: str) -> object:
    if isinstance(part.image, dict):  # as the library `datasets` writes images into Parquet
        part.image = part.image.get("bytes") or part.image.get("path")
    given = [getattr(part, key) for key in _KEYS if getattr(part, key)]
    if len(given) != 1:
        raise RecipeError(where, place, f"an image needs one of {', '.join(_KEYS)}")
    if part.url and not part.url.startswith("data:"):
        raise RecipeError(where, f"{place}.url", "nothing is fetched: give a path or a data: URI")
    return f"data:;base64,{part.base64}" if part.base64 else given[0]


def load_row_image(image: RowImage, recipe_dir: str) -> Image:
    """Read it, and see that it is one. Raises RecipeError naming the row."""
    import PIL  # only who has such rows needs it
    import PIL.Image as pillow

    try:
        data = image_bytes(image.given, Path(recipe_dir))
        with pillow.open(io.BytesIO(data)) as picture:
            picture.load()
            media_type = picture.get_format_mimetype()
    except ToolError as error:
        raise RecipeError(image.where, "", error.detail) from error
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:  # Pillow's
        name = f"{image.given}: " if _is_path(image.given) else ""
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        why = "no image of a known format" if unknown else f"a broken image: {error}"
        raise RecipeError(image.where, "", f"{name}{why}") from error
    return Image(data=data, media_type=media_type or "")


def with_images(
    public: PublicPart, images: Sequence[RowImage], stored: Sequence[StoredImage]
) -> PublicPart:
    """A row's public part with what became of its images, in the same order."""
    messages = list(public.messages)
    for image, found in zip(images, stored, strict=True):
        message = messages[image.message]
        messages[image.message] = replace(message, images=[*message.images, found])
    return replace(public, messages=messages)
