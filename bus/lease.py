"""Who is the one that acts: a key that expires unless its holder renews it."""

import asyncio
import os
from contextlib import suppress

from bus import store
from bus.connection import Bus
from bus.errors import BusError, Conflict, Full, Unavailable

_TTL_S = 5
_RENEW_S = 1.0
_RELEASE_S = 2.0


class Lease:
    """One role's lease in one run."""

    def __init__(self, bus: Bus, run: str, role: str, replica: str) -> None:
        self._bus = bus
        self._key = f"{run}.{role}"
        self._replica = replica.encode()
        self._seq = 0

    async def acquire(self) -> None:
        """Wait until it is ours."""
        while True:
            try:
                held = await store.get(self._bus, "lease", self._key)
                if held is None or self._is_free(held.data):
                    self._seq = await store.put(
                        self._bus,
                        "lease",
                        self._key,
                        self._replica,
                        expected_seq=held.seq if held else None,
                        ttl_s=_TTL_S,
                    )
                    return
            except (Conflict, Full, Unavailable):
                pass  # somebody was faster, or no server or room: look again
            await asyncio.sleep(_RENEW_S)

    def _is_free(self, holder: bytes) -> bool:
        """Whether it was released, or is our own, or its holder has died: of another machine's only time can tell."""
        if holder in (b"", self._replica):
            return True
        name, _, pid = holder.decode().rpartition("-")
        if name != self._replica.decode().rpartition("-")[0] or not pid.isdecimal():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    async def keep(self) -> None:
        """Renew until it is lost; returns then."""
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                self._seq = await store.put(
                    self._bus,
                    "lease",
                    self._key,
                    self._replica,
                    expected_seq=self._seq,
                    ttl_s=_TTL_S,
                )
            except Conflict:
                with suppress(Unavailable):  # the next round asks again
                    held = await store.get(self._bus, "lease", self._key)
                    if held is None or held.data != self._replica:
                        return
                    self._seq = held.seq
            except (Full, Unavailable):
                # cut off for longer than it lasts, another has it, and the commit rule makes two of us harmless
                continue

    async def release(self) -> None:
        """Let a standby in at once; without a server it lasts until it expires."""
        with suppress(BusError, TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                await store.put(self._bus, "lease", self._key, b"", expected_seq=self._seq, ttl_s=1)
