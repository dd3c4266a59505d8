"""The toolbox: runs the first call of the last turn that has no result yet."""

import time
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from msgspec.structs import replace

from actors.actor import HopFailed
from actors.images import Images
from bus.subjects import Stage
from schemas.events import Event, Result
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory
from tools.errors import ToolError
from tools.observation import shorten_observation
from tools.sandbox.sandbox import Limits, Sandbox
from tools.tool import Context, Observation, Tool


class Toolbox:
    """Runs tool calls in a sandbox; several at once."""

    stage: ClassVar[Stage] = "tool"
    produces: ClassVar[tuple[type[Event], ...]] = (Result,)

    def __init__(
        self,
        recipe: Recipe,
        tools: Mapping[str, Tool],
        sandbox: Sandbox,
        images: Images,
        replica: str,
    ) -> None:
        self._tools = tools
        self._sandbox = sandbox
        self._images = images
        self._recipe = recipe.tools
        self._limits = Limits()
        self._replica = replica

    async def handle(self, state: Trajectory) -> Result:
        """Run one call."""
        pending = state.next_call
        assert pending is not None, "a tool's queue holds only trajectories with a pending call"
        index, call = pending
        tool = self._tools.get(call.tool)
        if tool is None:
            raise HopFailed("recipe", "unknown_tool", f"no tool {call.tool!r} here")
        shown = [image for result in state.results for image in result.images]
        context = Context(
            run=self._sandbox.run,
            limits=self._limits_of(tool),
            task=state.admitted.public.extra,
            images=[partial(self._images.load, image) for image in shown],
        )
        begun = time.monotonic()
        try:
            observation = await tool(context, call.arguments)
        except ToolError as error:
            raise HopFailed(error.boundary, error.code, error.detail) from error
        duration_ms = (time.monotonic() - begun) * 1e3
        observation = self._shorten(observation, tool)
        return Result(
            trajectory=state.id,
            replica=self._replica,
            turn=len(state.turns) - 1,
            call=index,
            text=observation.text,
            ok=observation.ok,
            duration_ms=duration_ms,
            tier=self._sandbox.tier,
            images=await self._images.store(observation.images),
        )

    def _limits_of(self, tool: Tool) -> Limits:
        return replace(self._limits, wall_s=tool.options.timeout_s or self._recipe.timeout_s)

    def _shorten(self, observation: Observation, tool: Tool) -> Observation:
        max_chars = tool.options.observation_chars or self._recipe.observation_chars
        general = tool.keep if self._recipe.keep == "auto" else self._recipe.keep
        keep = tool.options.keep or general
        return shorten_observation(observation, max_chars, keep)

    async def drain(self) -> None:
        """Nothing: a running call ends within its own limits."""

    async def close(self) -> None:
        """Kill what still runs."""
        await self._sandbox.close()
