"""Versions of the policy as an engine takes them, whole: adapters are merged with their base, which is fetched once."""

import asyncio

from bus import policy
from bus.connection import Bus
from bus.errors import BusError
from schemas.messages import WeightsPointer


class Versions:
    """Fetches the versions of one run."""

    def __init__(self, bus: Bus, run: str) -> None:
        self._bus = bus
        self._run = run
        self._base = b""
        self._base_sha256 = ""

    async def newest(self, pointer: WeightsPointer) -> tuple[WeightsPointer, bytes]:
        """A version's weights, or the newest's when they are deleted meanwhile, with its pointer. Raises BusError."""
        found, weights = await policy.load_newest(self._bus, self._run, pointer)
        return found, await self._whole(found, weights)

    async def exactly(self, version: int) -> bytes:
        """A certain version's weights. Raises BusError."""
        found = await policy.version(self._bus, self._run, version)
        if found is None:
            why = f"version {version} of {self._run} was never published, or is deleted"
            raise BusError(why)
        weights = await policy.load_weights(self._bus, self._run, found)
        return await self._whole(found, weights)

    async def _whole(self, pointer: WeightsPointer, weights: bytes) -> bytes:
        if not pointer.base_sha256:
            return weights
        from engines.adapters import merge  # torch takes seconds to import

        if self._base_sha256 != pointer.base_sha256:
            self._base = await policy.load_base(self._bus, self._run, pointer)
            self._base_sha256 = pointer.base_sha256
        return await asyncio.to_thread(merge, self._base, weights)
