"""Which of the figures that came out of a sandbox are figures: hostile code may have sent anything in their place.

What is let through can be opened by any reader, and is small when it is: no decompression bomb, nothing cut or mended.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence

from tools.sandbox.cell import MOST_FIGURES

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""By color type; palettes are not drawn by matplotlib."""
_BITS = 8
_MOST_PIXELS = 16_000_000
"""Of all of them together."""
_FILTERS = frozenset(range(5))


def whole_figures(images: Sequence[bytes]) -> list[bytes]:
    """The first of them that are whole PNG, as matplotlib writes them, while they are not too many or too large."""
    found: list[bytes] = []
    pixels_left = _MOST_PIXELS
    for data in images[:MOST_FIGURES]:
        pixels = _pixels(data, pixels_left)
        if pixels:
            found.append(data)
            pixels_left -= pixels
    return found


def _pixels(data: bytes, most: int) -> int:
    """How many pixels a whole PNG has; 0 if it is none, or has more than `most`."""
    if not data.startswith(_SIGNATURE):
        return 0
    try:
        chunks = list(_chunks(data))
        width, height, bits, color, *ways = struct.unpack(">IIBBBBB", chunks[0][1])
        row_bytes = 1 + width * _CHANNELS[color]
        packed = b"".join(content for kind, content in chunks if kind == b"IDAT")
        if chunks[0][0] != b"IHDR" or chunks[-1] != (b"IEND", b"") or bits != _BITS or any(ways):
            return 0
        if not 0 < width * height <= most:
            return 0
        unpacker = zlib.decompressobj()
        rows = unpacker.decompress(packed, row_bytes * height + 1)
    except (struct.error, zlib.error, ValueError, KeyError, IndexError):
        return 0
    whole = unpacker.eof and len(rows) == row_bytes * height
    return width * height if whole and _FILTERS.issuperset(rows[::row_bytes]) else 0


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each. Raises ValueError or struct.error where it is broken."""
    at = len(_SIGNATURE)
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + size)
        if checksum != zlib.crc32(content, zlib.crc32(kind)):
            raise ValueError(kind)
        yield kind, content
        at += 12 + size
