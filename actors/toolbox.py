"""The toolbox: runs the first call of the last turn that has no result yet."""

import time
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from msgspec.structs import replace

from actors.actor import HopFailed
from actors.images import Images
from actors.sessions import Key, Sessions, committed_calls
from bus.subjects import Stage
from schemas.events import Call, Event, Result
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory
from tools.errors import ToolError
from tools.observation import shorten_observation
from tools.sandbox.sandbox import Limits, Sandbox
from tools.tool import Context, Observation, OpenSession, Tool


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
        self._sessions = Sessions(sandbox, self._limits, recipe.toolbox.sessions)
        self._replica = replica

    async def handle(self, state: Trajectory) -> Result:
        """Run one call."""
        pending = state.next_call
        assert pending is not None, "a tool's queue holds only trajectories with a pending call"
        index, call = pending
        tool = self._tools.get(call.tool)
        if tool is None:
            raise HopFailed("recipe", "unknown_tool", f"no tool {call.tool!r} here")
        begun = time.monotonic()
        try:
            if tool.session:
                observation = await self._in_session(state, tool, call)
            else:
                observation = await self._call(state, tool, call, None)
        except ToolError as error:
            raise HopFailed(error.boundary, error.code, error.detail) from error
        duration_ms = (time.monotonic() - begun) * 1e3
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

    async def _call(
        self, state: Trajectory, tool: Tool, call: Call, session: OpenSession | None
    ) -> Observation:
        shown = [image for result in state.results for image in result.images]
        context = Context(
            run=self._sandbox.run,
            limits=self._limits_of(tool),
            task=state.admitted.public.extra,
            session=session,
            images=[partial(self._images.load, image) for image in shown],
        )
        return self._shorten(await tool(context, call.arguments), tool)

    async def _in_session(self, state: Trajectory, tool: Tool, call: Call) -> Observation:
        """Run the call in the trajectory's session, which is made anew first if it is not what the log says."""
        before = committed_calls(state, tool.name)
        async with self._sessions.use(Key(state.id, tool.name)) as kept:
            ours = not before or before[-1][1].replica == self._replica
            if kept.calls != len(before) or not ours:
                await kept.close()
                for number, (old, result) in enumerate(before):
                    again = await self._call(state, tool, old, kept.open)
                    if again.text != result.text:
                        what = f"call {number} of {tool.name} gave another result when run again"
                        raise HopFailed("tool", "replay_diverged", what)
                kept.calls = len(before)
            observation = await self._call(state, tool, call, kept.open)
            kept.calls += 1
        return observation

    async def forget(self, trajectory: str) -> None:
        """Close what is kept for a trajectory that has ended."""
        await self._sessions.forget(trajectory)

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
        await self._sessions.close()
        await self._sandbox.close()
