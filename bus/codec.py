"""Messages to bytes and back: msgpack, typed at both ends, never pickle."""

from typing import Any, TypeVar

import msgspec

from bus.errors import BadMessage

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: object) -> bytes:
    """The message as plain msgpack, which any language reads."""
    return _encoder.encode(message)


def decode(data: bytes, message_type: type[T] | Any, subject: str = "") -> T:
    """Read a message of the given type or union.

    Raises BadMessage, with the path to what is wrong, for anything else.
    """
    decoder = _decoders.get(message_type)
    if decoder is None:
        decoder = _decoders[message_type] = msgspec.msgpack.Decoder(message_type)
    try:
        message: T = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadMessage(subject, str(error), data) from error
    return message
