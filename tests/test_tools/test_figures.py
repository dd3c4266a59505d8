"""What is let through as a figure can be opened by whoever sees it."""

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.sandbox.cell import MOST_FIGURES
from tools.sandbox.figures import whole_figures
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits


def png(mode: str = "RGBA", size: tuple[int, int] = (7, 5)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, "PNG")
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def made(width: int, height: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return png()[:8] + chunks


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_whole_picture_passes(mode: str) -> None:
    """As another writer makes it."""
    assert whole_figures([png(mode), png(mode)]) == [png(mode)] * 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PNG!",
        png()[:-1],
        png() + b"more",
        png()[:60] + b"\0" + png()[61:],
        made(7, 5, bytes(39)),
        made(7, 5, bytes(41)),
        made(7, 5, bytes([5]) * 40),
        made(100_000, 100_000, bytes(1000)),
        made(4001, 4000, bytes(4002 * 4000)),
        made(0, 0, b""),
    ],
)
def test_what_is_broken_or_too_large_does_not(data: bytes) -> None:
    """Cut, prolonged, changed, of another size than it says, or a bomb; the others stay."""
    assert whole_figures([png(), data, png()]) == [png()] * 2


def test_there_are_not_too_many() -> None:
    """Nor may many that are not too large be too large together."""
    assert len(whole_figures([png()] * (MOST_FIGURES + 1))) == MOST_FIGURES
    large = made(3000, 3000, bytes(3001 * 3000))
    assert whole_figures([large, large]) == [large]


@settings(database=None)
@given(at=st.integers(0, len(png()) - 1), byte=st.integers(0, 255))
def test_what_passes_can_be_opened(at: int, byte: int) -> None:
    """A changed byte is seen, or does not matter."""
    changed = png()[:at] + bytes([byte]) + png()[at + 1 :]
    for data in whole_figures([changed]):
        Image.open(io.BytesIO(data)).load()


@pytest.mark.asyncio
async def test_what_is_no_figure_is_left_out() -> None:
    """Code that answers in our place is believed that it drew only what any reader can open."""
    forged = """
import os
for fd in range(3, 30):
    try: os.write(fd, b'{"run": 1, "images": [9, 5]}\\n' + bytes(14))
    except OSError: pass
"""
    sandbox = NamespaceSandbox()
    limits = Limits(image_bytes=1 << 20)
    session = await sandbox.open_session("python")
    for outcome in (
        await session.run(forged, limits=limits),
        await sandbox.run(forged, limits=limits),
    ):
        assert (outcome.reason, outcome.images) == ("exit", [])
    await session.close()
    await sandbox.close()
