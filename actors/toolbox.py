"""The toolbox: runs the first call of the last turn that has no result yet."""

import time
from collections.abc import Mapping
from typing import ClassVar

from actors.actor import HopFailed
from bus.subjects import Stage
from schemas.events import Event, Result
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory
from tools.errors import ToolError
from tools.observation import shorten
from tools.sandbox.sandbox import Limits, Sandbox
from tools.tool import Context, Tool


class Toolbox:
    """Runs tool calls in a sandbox; several at once."""

    stage: ClassVar[Stage] = "tool"
    produces: ClassVar[tuple[type[Event], ...]] = (Result,)

    def __init__(
        self, recipe: Recipe, tools: Mapping[str, Tool], sandbox: Sandbox, replica: str
    ) -> None:
        self._tools = tools
        self._sandbox = sandbox
        self._limits = Limits(wall_s=recipe.tools.timeout_s)
        self._observation_chars = recipe.tools.observation_chars
        self._replica = replica

    async def handle(self, state: Trajectory) -> Result:
        """Run one call."""
        pending = state.next_call
        assert pending is not None, "a tool's queue holds only trajectories with a pending call"
        index, call = pending
        tool = self._tools.get(call.tool)
        if tool is None:
            raise HopFailed("recipe", "unknown_tool", f"no tool {call.tool!r} here")
        context = Context(
            run=self._sandbox.run, limits=self._limits, task=state.admitted.public.extra
        )
        begun = time.monotonic()
        try:
            observation = await tool(context, call.arguments)
        except ToolError as error:
            raise HopFailed(error.boundary, error.code, error.detail) from error
        return Result(
            trajectory=state.id,
            replica=self._replica,
            turn=len(state.turns) - 1,
            call=index,
            text=shorten(observation.text, self._observation_chars),
            ok=observation.ok,
            duration_ms=(time.monotonic() - begun) * 1e3,
            tier=self._sandbox.tier,
        )

    async def drain(self) -> None:
        """Nothing: a running call ends within its own limits."""

    async def close(self) -> None:
        """Kill what still runs."""
        await self._sandbox.close()
