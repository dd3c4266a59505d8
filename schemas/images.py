"""Images: as the log names them, which models see them, and what engine and learner are given."""

import msgspec

SEEING_MODELS = ("llava", "idefics3")
"""Model types that may see images: each place has one position, and sees only what is before it. All are tested."""


def takes_images(kind: str, *, has_vision: bool) -> bool:
    """Whether a model of the type takes images. Raises ValueError where it could, and is none of those."""
    if has_vision and kind not in SEEING_MODELS:
        known = ", ".join(SEEING_MODELS)
        raise ValueError(f"policy.model is of type {kind}; of those that see images: {known}")
    return kind in SEEING_MODELS


PLACEHOLDER = "<image>"
"""Stands in a text where an image goes."""


class StoredImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of a message or an observation; its bytes are in the run's blobs, under their hash."""

    sha256: str
    media_type: str
    """`image/png`, …"""
    size_bytes: int
    width: int = 0
    height: int = 0
    """In pixels; 0 when its header does not say."""


class ImageInput(msgspec.Struct, frozen=True, kw_only=True):
    """One image that the policy sees."""

    places: list[int]
    """The indices of the tokens that stand for it, in order."""
    pixels: bytes
    """A safetensors file of what the model's vision tower takes (`pixel_values`, …)."""
