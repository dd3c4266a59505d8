"""Who is the one that acts: a key that expires unless its holder renews it."""

import asyncio
import os
from contextlib import suppress

from bus import store
from bus.connection import Bus
from bus.errors import BusError, Conflict, Full, Unavailable

_TTL_S = 5
_RENEW_S = 1.0


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
                if held is None or held.data == self._replica or self._has_died(held.data):
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

    def _has_died(self, holder: bytes) -> bool:
        """Whether a process of this machine held it and is no more; of another machine only time can tell."""
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
                held = await store.get(self._bus, "lease", self._key)
                if held is None or held.data != self._replica:
                    return
                self._seq = held.seq
            except (Full, Unavailable):
                continue  # nobody else can have it either

    async def release(self) -> None:
        """Let a standby in at once."""
        with suppress(BusError):
            await store.put(self._bus, "lease", self._key, b"", expected_seq=self._seq, ttl_s=1)
