"""What becomes of a call whose child dies in it."""

import asyncio

import psutil
import pytest

from tools.errors import ToolError
from tools.workers import Crashed, open_workers


@pytest.mark.parametrize("function", ["_sigsegv", "_sigabrt", "_sigfpe"])
async def test_a_crash_is_told_from_a_kill(function: str) -> None:
    """What the child brought upon itself may be the doing of what it was given."""
    async with open_workers(f"faulthandler:{function}", count=1) as workers:
        for _ in range(2):  # the second has a new child
            with pytest.raises(Crashed, match="worker_died"):
                await workers.call(60.0)


async def test_a_kill_is_no_crash() -> None:
    """A child that is ended from outside is lost machinery; the next call works."""
    async with open_workers("time:monotonic_ns", count=1) as workers:
        await workers.call(60.0)
        (child,) = (
            c for c in psutil.Process().children() if "monotonic_ns" in " ".join(c.cmdline())
        )
        child.suspend()
        call = asyncio.ensure_future(workers.call(60.0))
        await asyncio.sleep(0.1)
        child.kill()
        with pytest.raises(ToolError, match="ended with -9") as caught:
            await call
        assert not isinstance(caught.value, Crashed)
        assert await workers.call(60.0) > 0
