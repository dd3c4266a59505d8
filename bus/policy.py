"""Which weights are current: objects by hash, a pointer per run, and a hint that it has moved."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from bus import store, subjects
from bus.codec import decode, encode
from bus.connection import Bus, Message, wait
from bus.errors import Unavailable
from schemas.messages import ModelAssets, WeightsPointer

_POLL_S = 2.0


async def publish_assets(bus: Bus, files: dict[str, bytes]) -> str:
    """Store a model's configuration and tokenizer; returns their name."""
    return await store.put_object(bus, "weights", encode(ModelAssets(files=files)))


async def publish_policy(bus: Bus, run: str, pointer: WeightsPointer, weights: bytes) -> None:
    """Store the weights, then the pointers to them, then tell everyone."""
    await store.put_object(bus, "weights", weights)
    data = encode(pointer)
    await store.put(bus, "policy", f"{run}.v{pointer.policy_version}", data)
    await store.put(bus, "policy", run, data)
    await bus.publish(subjects.ready(run), b"")


async def current(bus: Bus, run: str) -> WeightsPointer | None:
    """The newest version; None before version 0."""
    value = await store.get(bus, "policy", run)
    return None if value is None else decode(value.data, WeightsPointer)


async def version(bus: Bus, run: str, policy_version: int) -> WeightsPointer | None:
    """A certain version; None when it was never made."""
    value = await store.get(bus, "policy", f"{run}.v{policy_version}")
    return None if value is None else decode(value.data, WeightsPointer)


async def follow(bus: Bus, run: str) -> AsyncIterator[WeightsPointer]:
    """The newest version, and each newer one as it comes; versions in between may be skipped."""
    hint = asyncio.Event()

    async def wake(_: Message) -> None:
        hint.set()

    await bus.subscribe(subjects.ready(run), wake)
    seen = -1
    while not bus.closed.is_set():
        hint.clear()
        with suppress(Unavailable):
            pointer = await current(bus, run)
            if pointer is not None and pointer.policy_version > seen:
                seen = pointer.policy_version
                yield pointer
        await wait(hint, _POLL_S)


async def load_weights(bus: Bus, pointer: WeightsPointer) -> bytes:
    """A safetensors file's bytes."""
    return await store.get_object(bus, "weights", pointer.weights_sha256)


async def load_assets(bus: Bus, pointer: WeightsPointer) -> ModelAssets:
    """The model's other files."""
    return decode(await store.get_object(bus, "weights", pointer.assets_sha256), ModelAssets)
