"""The `image` tool: crops, zooms, rotates and chooses frames; hostile pictures harm nothing."""

import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from tools.errors import ToolError
from tools.pictures import work
from tools.registry import load_tools, open_tools
from tools.sandbox.sandbox import Limits, Outcome
from tools.tool import Context, Image, Observation, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

Look = Callable[..., Awaitable[Observation]]

LIMITS = {"max_pixels": 10_000, "max_side": 64}
ARGUMENTS: dict[str, Any] = {
    "box": [0, 0, 1, 1],
    "factor": 1.0,
    "degrees": 0.0,
    "frame": 1,
    "scale": 0,
}


def picture(width: int, height: int, kind: str = "PNG", **how: Any) -> bytes:
    """Red on the left, blue on the right, white below."""
    made = Pillow.new("RGB", (width, height), "blue")
    made.paste("red", (0, 0, width // 2, height))
    made.paste("white", (0, height - height // 4, width, height))
    file = io.BytesIO()
    made.save(file, kind, **how)
    return file.getvalue()


def colours(image: Image) -> list[Any]:
    """At the upper left, the upper right and the lower left corner."""
    made = Pillow.open(io.BytesIO(image.data)).convert("RGB")
    right, bottom = made.width - 1, made.height - 1
    return [made.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom))]


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


async def no_sandbox(code: str, **_: Any) -> Outcome:
    raise AssertionError("image runs no code")


async def load(image: Image) -> Image:
    return image


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def look(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Look]:
    """`await look(task's images, arguments)`."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.png").write_bytes(picture(40, 40))
    options = {"max_pixels": 10_000, "max_side": 64}
    (tool,) = load_tools(["image"], options={"image": options}).values()

    async def call(images: Any, shown: list[Image] | None = None, **arguments: Any) -> Observation:
        loads = [partial(load, image) for image in shown or []]
        context = Context(
            run=no_sandbox, limits=Limits(wall_s=20), task={"images": images}, images=loads
        )
        return await tool(context, arguments)

    async with open_tools([tool], Place(recipe_dir=str(folder))):
        yield call


@pytest.mark.parametrize(
    ("arguments", "size", "expected"),
    [
        ({"action": "show"}, (40, 40), [RED, BLUE, WHITE]),
        ({"action": "crop", "box": [20, 0, 40, 10]}, (20, 10), [BLUE, BLUE, BLUE]),
        ({"action": "crop", "box": [-5, 30, 999, 999]}, (40, 10), [WHITE] * 3),
        ({"action": "zoom", "box": [0, 0, 10, 10], "factor": 3}, (30, 30), [RED] * 3),
        ({"action": "zoom", "box": [0, 0, 40, 10], "factor": 32}, (64, 16), [RED, BLUE, RED]),
        ({"action": "rotate"}, (40, 40), [WHITE, RED, WHITE]),
        ({"action": "rotate", "degrees": 180}, (40, 40), [WHITE, WHITE, BLUE]),
    ],
)
async def test_an_image_is_shown_otherwise(
    look: Look, arguments: dict[str, Any], size: tuple[int, int], expected: list[Any]
) -> None:
    """The result is an image with the next number; a box reaches no further than the image."""
    seen = await look(["a.png"], **arguments)
    assert seen.text == f"Image 2, {size[0]} by {size[1]} pixels:\n<image>"
    (made,) = seen.images
    assert made.media_type == "image/png"
    assert colours(made) == expected


async def test_images_come_from_task_and_results(look: Look) -> None:
    """As a path, a URI or bytes; then those that were shown; numbered on."""
    uri = "data:image/png;base64," + base64.b64encode(picture(8, 8)).decode()
    shown = [Image(data=picture(12, 12), media_type="image/png")]
    sizes = []
    for number in (1, 2, 3, 4):
        seen = await look(["a.png", uri, picture(10, 10)], shown, action="show", number=str(number))
        sizes.append(seen.text)
    assert sizes == [f"Image 5, {n} by {n} pixels:\n<image>" for n in (40, 8, 10, 12)]


async def test_frames_are_numbered_from_one(look: Look) -> None:
    """Of an animation; a still image has one."""
    frames = [Pillow.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    seen = await look([file.getvalue()], action="frame", frame=2)
    assert colours(seen.images[0])[0] == BLUE
    for frame in (0, 3):
        seen = await look([file.getvalue()], action="frame", frame=frame)
        assert seen == Observation(text=f"There is no frame {frame}: the image has 2.", ok=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"action": "crop"}, "give a `box`"),
        ({"action": "crop", "box": [1, 2, 3]}, "`box`"),
        ({"action": "crop", "box": [5, 5, 5, 9]}, "holds nothing of the image, which is 40 by 40"),
        ({"action": "paint"}, "`action`"),
        ({"action": "show", "number": 2}, "There is no image 2: there are 1."),
        ({"action": "zoom", "box": [0, 0, 9, 9], "factor": 1e9}, "`factor`"),
    ],
)
async def test_what_is_not_possible_is_told(
    look: Look, arguments: dict[str, Any], says: str
) -> None:
    seen = await look(["a.png"], **arguments)
    assert not seen.ok
    assert says in seen.text


async def test_an_image_that_is_not_there_is_nobodys_call(look: Look) -> None:
    """The task is wrong."""
    for given_image in ("gone.png", "data:image/png;base64,???", 7):
        with pytest.raises(ToolError, match="bad_image"):
            await look([given_image], action="show")


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims and holds many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    "data",
    [
        bomb(200, 200),
        bomb(30_000, 30_000),
        b"",
        b"junk",
        picture(40, 40)[:70],
        picture(4, 4, "BMP")[:60],
    ],
)
async def test_hostile_pictures_are_refused(look: Look, data: bytes) -> None:
    """Too many pixels, no picture, half a picture: told, and the next call works."""
    seen = await look([data], action="show")
    assert not seen.ok
    assert (await look(["a.png"], action="show")).ok


@given(
    st.binary(max_size=200), st.sampled_from([b"", picture(9, 9), picture(9, 9, "GIF")]), st.data()
)
async def test_any_bytes_are_answered(junk: bytes, real: bytes, data: st.DataObject) -> None:
    """Junk, or a real picture with junk in it."""
    at = data.draw(st.integers(0, len(real)))
    made = work(real[:at] + junk + real[at + len(junk) :], "show", ARGUMENTS, LIMITS)
    assert "error" in made or made["image"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "GIF"])
async def test_other_kinds_of_file(kind: str) -> None:
    """JPEG stays JPEG, everything else becomes PNG."""
    made = work(picture(16, 16, kind), "show", ARGUMENTS, LIMITS)
    assert made["media_type"] == ("image/jpeg" if kind == "JPEG" else "image/png")
    scaled = {**ARGUMENTS, "box": [0, 0, 500, 1000], "scale": 1000}
    cropped = work(picture(16, 16, kind), "crop", scaled, LIMITS)
    assert (cropped["width"], cropped["height"]) == (8, 16)
