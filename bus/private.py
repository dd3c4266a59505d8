"""The part of a task that only scorers may read: answers, tests, rubrics."""

from typing import Any

from bus import store
from bus.codec import decode, encode
from bus.connection import Bus
from bus.errors import Missing


async def put_private(bus: Bus, run: str, key: str, private: dict[str, Any]) -> None:
    """Put a group's answers away."""
    await store.put(bus, "private", f"{run}.{key}", encode(private))


async def get_private(bus: Bus, run: str, key: str) -> dict[str, Any]:
    """A group's answers. Raises Missing."""
    value = await store.get(bus, "private", f"{run}.{key}")
    if value is None:
        raise Missing(f"private part {key} of {run}")
    return decode(value.data, dict[str, Any])
