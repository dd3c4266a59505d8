"""Works on pictures, blocking: runs in the children of tools/workers.py, since pictures come from anywhere."""

import io
import warnings
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_FRAMES = 10_000


class PictureError(Exception):
    """What was asked of the picture is not possible: for the policy to read."""


def work(
    data: bytes, action: str, arguments: dict[str, Any], limits: dict[str, int]
) -> dict[str, Any]:
    """`image`, `media_type`, `width`, `height`; or `error`, for the policy.

    `limits`: `max_pixels` of what is read, `max_side` of what is made. `arguments`: `box` in pixels, `factor`,
    `degrees`, `frame`.
    """
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = limits["max_pixels"]
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            kept = "JPEG" if picture.format == "JPEG" else "PNG"
            made = _act(picture, action, arguments, limits)
        made.thumbnail((limits["max_side"], limits["max_side"]), Image.Resampling.LANCZOS)
        if made.mode not in ("L", "RGB") and (kept == "JPEG" or made.mode not in ("LA", "RGBA")):
            made = made.convert("RGB" if kept == "JPEG" else "RGBA")
        file = io.BytesIO()
        made.save(file, kept, quality=90)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        return {"error": f"The image has more than {limits['max_pixels']} pixels."}
    except UnidentifiedImageError:
        return {"error": f"The image is none of {', '.join(_FORMATS)}."}
    except PictureError as error:
        return {"error": str(error)}
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
    ) as error:  # what Pillow raises for broken files
        return {"error": f"The image is broken: {error}"}
    return {
        "image": file.getvalue(),
        "media_type": f"image/{kept.lower()}",
        "width": made.width,
        "height": made.height,
    }


def _act(
    picture: Image.Image, action: str, arguments: dict[str, Any], limits: dict[str, int]
) -> Image.Image:
    if action == "frame":
        count = min(getattr(picture, "n_frames", 1), _MAX_FRAMES)
        frame = arguments["frame"]
        if not 1 <= frame <= count:
            raise PictureError(f"There is no frame {frame}: the image has {count}.")
        picture.seek(frame - 1)
    upright = ImageOps.exif_transpose(picture)
    match action:
        case "crop":
            return upright.crop(_box(arguments["box"], arguments["scale"], upright))
        case "zoom":
            part = upright.crop(_box(arguments["box"], arguments["scale"], upright))
            factor = min(arguments["factor"], limits["max_side"] / max(part.size))
            width, height = (max(1, round(side * factor)) for side in part.size)
            return part.resize((width, height), Image.Resampling.LANCZOS)
        case "rotate":
            return upright.rotate(
                -arguments["degrees"], expand=True, resample=Image.Resampling.BICUBIC
            )
    return upright.copy()


def _box(box: list[float], scale: float, picture: Image.Image) -> tuple[int, int, int, int]:
    """The part of the box that lies in the picture, in pixels."""
    width, height = picture.size
    across, down = (width / scale, height / scale) if scale else (1.0, 1.0)
    left, top = max(0, round(box[0] * across)), max(0, round(box[1] * down))
    right, bottom = min(width, round(box[2] * across)), min(height, round(box[3] * down))
    if left >= right or top >= bottom:
        size = f"{scale:g} by {scale:g}" if scale else f"{width} by {height}"
        raise PictureError(f"The box {box} holds nothing of the image, which is {size}.")
    return left, top, right, bottom
