"""Which weights are current: objects by hash, a pointer per run, and a hint that it has moved."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress

from bus import store, subjects
from bus.codec import decode, encode
from bus.connection import Bus, Message, wait
from bus.errors import Conflict, Missing, Unavailable
from schemas.messages import ModelAssets, WeightsPointer

BUCKET = "weights"

_POLL_S = 2.0


async def publish_assets(bus: Bus, run: str, files: dict[str, bytes]) -> str:
    """Store a model's configuration and tokenizer; returns their name."""
    return await store.put_object(bus, BUCKET, run, encode(ModelAssets(files=files)))


async def publish_base(bus: Bus, run: str, weights: bytes) -> str:
    """Store the weights that adapters belong to; returns their name."""
    return await store.put_object(bus, BUCKET, run, weights)


async def publish_policy(bus: Bus, run: str, pointer: WeightsPointer, weights: bytes) -> None:
    """Store the weights, then the pointers to them, then tell everyone.

    The pointer to the newest never moves back, whoever wakes up late and publishes what he has.
    """
    await store.put_object(bus, BUCKET, run, weights)
    data = encode(pointer)
    await store.put(bus, "policy", f"{run}.v{pointer.policy_version}", data)
    while True:
        known = await store.get(bus, "policy", run)
        newest = -1 if known is None else decode(known.data, WeightsPointer).policy_version
        if newest >= pointer.policy_version:
            break
        with suppress(Conflict):  # another was faster, or this was stored and its confirmation lost
            await store.put(bus, "policy", run, data, expected_seq=known.seq if known else 0)
    await bus.publish(subjects.ready(run), b"")


async def current(bus: Bus, run: str) -> WeightsPointer | None:
    """The newest version; None before version 0."""
    value = await store.get(bus, "policy", run)
    return None if value is None else decode(value.data, WeightsPointer)


async def version(bus: Bus, run: str, policy_version: int) -> WeightsPointer | None:
    """A certain version; None when it was never made, or deleted."""
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


async def load_weights(bus: Bus, run: str, pointer: WeightsPointer) -> bytes:
    """A safetensors file's bytes. Raises Missing when they are deleted already: newer ones are there."""
    return await store.get_object(bus, BUCKET, run, pointer.weights_sha256)


async def load_base(bus: Bus, run: str, pointer: WeightsPointer) -> bytes:
    """The weights that a version's adapters belong to. Raises Missing."""
    return await store.get_object(bus, BUCKET, run, pointer.base_sha256)


async def load_newest(bus: Bus, run: str, pointer: WeightsPointer) -> tuple[WeightsPointer, bytes]:
    """A version's weights, or those of the newest when they are deleted meanwhile, with its pointer.

    Raises Missing when there is none newer.
    """
    while True:
        try:
            return pointer, await load_weights(bus, run, pointer)
        except Missing:
            newest = await current(bus, run)
            if newest is None or newest == pointer:
                raise
            pointer = newest


async def load_assets(bus: Bus, run: str, pointer: WeightsPointer) -> ModelAssets:
    """The model's other files."""
    return decode(await store.get_object(bus, BUCKET, run, pointer.assets_sha256), ModelAssets)


async def delete_versions(bus: Bus, run: str, keep: Collection[int]) -> list[int]:
    """Delete all versions but these, and the run's objects that none of these names; returns which.

    For the one who publishes, between two publications: what is not yet pointed to would go too. The newest of `keep`
    is the one that comes, or the one before it.
    """
    named: set[str] = set()
    deleted = []
    pointers: list[tuple[str, WeightsPointer]] = [
        (raw.subject, decode(raw.data, WeightsPointer, raw.subject))
        async for raw in store.messages(bus, "KV_policy", f"$KV.policy.{run}.*")
    ]
    newest = max((pointer.policy_version for _, pointer in pointers), default=-1)
    if newest + 1 < max(keep):
        return []  # who has answered is behind: what it does not know would seem to be named by nobody
    for subject, pointer in pointers:
        if pointer.policy_version in keep:
            named |= {pointer.weights_sha256, pointer.assets_sha256, pointer.base_sha256}
        else:
            await store.delete(bus, "policy", subject.removeprefix("$KV.policy."))
            deleted.append(pointer.policy_version)
    for found in await store.objects(bus, BUCKET, run) if deleted else ():
        if found.sha256 not in named:
            await store.delete_object(bus, BUCKET, found)
    return deleted
