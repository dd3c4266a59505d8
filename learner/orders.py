"""What rank 0 of a learner tells the others: each is a method of Policy that all ranks carry out together.

They travel as msgpack; an array is its bytes, little-endian, of the dtype that its field names. A step's images travel
once each, however many trajectories saw them.
"""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from learner.conversations import Conversation
from learner.samples import Sample
from schemas.recipe import Recipe

Other = Literal["reference", "teacher"]
"""A model beside the policy."""


class Order(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The base."""


class Open(Order, frozen=True):
    """`DeepSpeedPolicy.lead`, again with another model; rank 0 alone reads it."""

    config_json: str
    """The model's configuration."""
    recipe: Recipe


class Train(Order, frozen=True):
    """`Policy.train_step`."""

    groups: list[list[Sample]]
    step: int
    pixels: dict[bytes, bytes] = {}
    """Only on the way: by their SHA-256, which stands in their place in the groups."""


class Teach(Order, frozen=True):
    """`Policy.supervised_step`."""

    conversations: list[Conversation]
    step: int
    learning_rate: float


class Restart(Order, frozen=True):
    """`Policy.restart_optimizer`."""


class Hold(Order, frozen=True):
    """`Policy.hold_reference` or `hold_teacher`; rank 0 alone reads it."""

    what: Other
    config_json: str


class GatherState(Order, frozen=True):
    """Rank 0 wants all weights."""


class GatherMoments(Order, frozen=True):
    """Rank 0 wants the optimizer's whole state."""


class Become(Order, frozen=True):
    """Take over weights and moments that rank 0 has."""

    moments: list[str]
    """`<parameter>/<moment>`: those that there are, but for the steps."""
    updates: int
    """How often they were updated."""


AnyOrder = Open | Train | Teach | Restart | Hold | GatherState | GatherMoments | Become


def encode(order: AnyOrder) -> bytes:
    """As it travels."""
    if isinstance(order, Train):
        pixels: dict[bytes, bytes] = {}

        def put_aside(image: bytes) -> bytes:
            name = sha256(image).digest()
            pixels[name] = image
            return name

        order = Train(groups=_exchanged(order.groups, put_aside), step=order.step, pixels=pixels)
    return msgspec.msgpack.encode(order, enc_hook=_bytes)


def decode(data: bytes) -> AnyOrder:
    """As it was said."""
    order: AnyOrder = _DECODER.decode(data)
    if isinstance(order, Train):
        order = Train(groups=_exchanged(order.groups, order.pixels.__getitem__), step=order.step)
    return order


def _exchanged(
    groups: list[list[Sample]], exchange: Callable[[bytes], bytes]
) -> list[list[Sample]]:
    """The same with something else for the pixels of each image."""
    return [
        [
            replace(
                sample,
                images=tuple(
                    msgspec.structs.replace(image, pixels=exchange(image.pixels))
                    for image in sample.images
                ),
            )
            for sample in group
        ]
        for group in groups
    ]


def _bytes(array: np.ndarray[Any, Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _array(kind: Any, data: bytes) -> np.ndarray[Any, Any]:
    """`kind` is an NDArray of a dtype."""
    dtype = np.dtype(get_args(get_args(kind)[1])[0])
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)


_DECODER = msgspec.msgpack.Decoder(AnyOrder, dec_hook=_array)
