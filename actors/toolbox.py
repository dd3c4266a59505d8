"""The toolbox: runs the first call of the last turn that has no result yet, here. See routing.py for where."""

import asyncio
import re
import time
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import structlog
from msgspec.structs import replace

from actors.actor import HopFailed
from actors.images import Images
from actors.sessions import Kept, Sessions, committed_calls
from bus.holders import Key
from bus.subjects import Stage
from schemas.events import Call, Event, Result
from schemas.recipe import Recipe
from schemas.trajectory import Trajectory
from tools.errors import ToolError
from tools.observation import shorten_observation
from tools.sandbox.sandbox import Limits, Sandbox
from tools.tool import Context, Observation, Tool

log = structlog.get_logger()

_PASSING = re.compile(r"\d+(?:\.\d+)? ?(?:ns|us|µs|ms|s|seconds?)\b|0x[0-9a-f]{6,}")
"""Durations and addresses: a test run says others when it is run again, and has done the same."""


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
        self._rebuild_s = recipe.toolbox.rebuild_s
        self._replica = replica
        self.sessions = Sessions(
            self._limits, recipe.toolbox.sessions, recipe.toolbox.sessions_mb << 20
        )
        self.made_anew = 0
        """How many sessions were, with calls to run again."""

    def tool(self, state: Trajectory) -> Tool:
        """The tool of the pending call. Raises HopFailed for one that is not here."""
        _, call = _pending(state)
        tool = self._tools.get(call.queue)
        if tool is None:
            raise HopFailed("recipe", "unknown_tool", f"no tool {call.queue!r} here")
        return tool

    async def handle(self, state: Trajectory) -> Result:
        """Run one call; one that was run at this sequence of the log already, in the session, is not run again."""
        tool = self.tool(state)
        try:
            if tool.session:
                return await self._in_session(state, tool)
            return await self._result(state, tool, None)
        except ToolError as error:
            raise HopFailed(error.boundary, error.code, error.detail) from error

    async def _result(self, state: Trajectory, tool: Tool, kept: Kept | None) -> Result:
        index, call = _pending(state)
        begun = time.monotonic()
        observation = await self._call(state, tool, call, kept)
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
            handed_in=observation.handed_in,
            last=observation.last and state.admitted.purpose != "external",
        )

    async def _call(
        self, state: Trajectory, tool: Tool, call: Call, kept: Kept | None
    ) -> Observation:
        context = Context(
            run=self._sandbox_of(tool).run,
            limits=self._limits_of(tool),
            task=state.admitted.public.extra,
            session=kept.open if kept else None,
            keep=kept.keep if kept else None,
            images=[partial(self._images.load, image) for image in state.images],
        )
        return self._shorten(await tool(context, call.arguments), tool)

    # -- sessions ------------------------------------------------------------------------------------------

    def holds(self, state: Trajectory) -> bool:
        """Whether the session of the pending call is here: it stands where the log does, or has run the call."""
        key = key_of(state)
        kept = self.sessions.find(key)
        return kept is not None and (
            kept.asked_seq == state.seq or kept.last == _last_result(state, key.tool)
        )

    async def known(self, state: Trajectory) -> Result | None:
        """What came of the pending call, if it was run here, in the session; waits for one that runs."""
        kept = self.sessions.find(key_of(state))
        if kept is None or kept.asked_seq != state.seq:
            return None
        async with kept.one_at_a_time:
            return kept.last if kept.asked_seq == state.seq else None

    async def _in_session(self, state: Trajectory, tool: Tool) -> Result:
        """Run the call in the trajectory's session, which is made anew first if it is not what the log says."""
        key = key_of(state)
        async with self.sessions.use(key, self._sandbox_of(tool)) as kept:
            if kept.asked_seq == state.seq and kept.last is not None:
                return kept.last
            if kept.last != _last_result(state, key.tool):
                await self._make_anew(state, tool, kept)
            kept.asked_seq, kept.last = state.seq, None
            result = await self._result(state, tool, kept)
            kept.last = result
        return result

    async def _make_anew(self, state: Trajectory, tool: Tool, kept: Kept) -> None:
        """Run the calls of the log again. Raises HopFailed when they may not be, take too long or end otherwise."""
        before = committed_calls(state, key_of(state).tool)
        await kept.close()
        if not before:
            return
        if not tool.replay:
            why = "its replica died, or toolbox.sessions or sessions_mb are too few"
            what = f"the session of {tool.name} is gone ({why})"
            raise HopFailed(
                "tool", "session_lost", f"{what}; its calls may not run again", final=True
            )
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._rebuild_s):
                for number, (old, result) in enumerate(before):
                    again = await self._call(state, tool, old, kept)
                    if _PASSING.sub("", again.text) != _PASSING.sub("", result.text):
                        what = f"call {number} of {tool.name} gave another result when run again"
                        raise HopFailed("tool", "replay_diverged", what)
        except TimeoutError as error:
            what = f"{len(before)} calls of {tool.name} took longer than toolbox.rebuild_s to run again"
            raise HopFailed("tool", "rebuild_late", what) from error
        kept.last = before[-1][1]
        self.made_anew += 1
        took_s = time.monotonic() - begun
        log.info("session made anew", trajectory=state.id, calls=len(before), took_s=took_s)

    async def forget(self, trajectory: str) -> None:
        """Close what is kept for a trajectory that has ended."""
        await self.sessions.forget(trajectory)

    def _sandbox_of(self, tool: Tool) -> Sandbox:
        modules = tool.options.imports
        return self._sandbox if modules is None else self._sandbox.importing(modules)

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
        try:
            await self.sessions.close()
        finally:
            await self._sandbox.close()


def key_of(state: Trajectory) -> Key:
    """What the pending call's tool keeps for the trajectory goes by this."""
    _, call = _pending(state)
    return Key(state.id, call.queue)


def _pending(state: Trajectory) -> tuple[int, Call]:
    pending = state.next_call
    assert pending is not None, "a tool's queue holds only trajectories with a pending call"
    return pending


def _last_result(state: Trajectory, queue: str) -> Result | None:
    before = committed_calls(state, queue)
    return before[-1][1] if before else None
