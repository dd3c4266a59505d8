"""How each role is put together: what it loads, and what it is given. In flow order.

dispatcher → generator → toolbox → scorer → learner
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import structlog

from actors.errors import RecipeError
from actors.process import Hops, Process
from bus import policy, private
from bus.errors import BusError
from schemas.messages import RoleName, WeightsPointer

log = structlog.get_logger()

T = TypeVar("T")


async def serve_dispatcher(process: Process) -> None:
    """Hold the lease, fold the log, act on it."""
    from actors.dispatching import Dispatching

    await Dispatching(process).serve()


async def first_policy(process: Process) -> WeightsPointer | None:
    """The current policy, once there is one; None when told to stop before."""
    process.vitals.phase = "waiting for version 0"
    async for pointer in until_stopping(process, policy.follow(process.bus, process.run)):
        return pointer
    return None


async def until_stopping(process: Process, source: AsyncIterator[T]) -> AsyncIterator[T]:
    """What the source gives, until the process is told to stop."""
    stop = asyncio.ensure_future(process.stopping.wait())
    try:
        while True:
            step = asyncio.ensure_future(anext(source, None))
            await asyncio.wait({step, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                step.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await step
                return
            if (item := step.result()) is None:
                return
            yield item
    finally:
        stop.cancel()


async def serve_generator(process: Process) -> None:
    """Sample turns, following the newest weights."""
    from actors.generator import Generator, Policies
    from engines.chat import Chat
    from engines.engine import Engine
    from engines.errors import ChatError
    from engines.open import open_engine
    from tools.formats import open_format
    from tools.registry import load_tools

    pointer = await first_policy(process)
    if pointer is None:
        return
    recipe, bus, run = process.recipe, process.bus, process.run
    with tempfile.TemporaryDirectory(prefix="actors-model-") as name:
        folder = Path(name)
        for file, data in (await policy.load_assets(bus, pointer)).files.items():
            (folder / file).write_bytes(data)

        async def open_with(found: WeightsPointer) -> Engine:
            engine = await asyncio.to_thread(
                open_engine, recipe.generator, recipe.policy, folder, process.recipe_dir
            )
            await engine.load(await policy.load_weights(bus, found), found.policy_version)
            return engine

        async def open_pinned(version: int) -> Engine:
            found = await policy.version(bus, run, version)
            if found is None:
                raise BusError(f"version {version} of {run} was never published")
            return await open_with(found)

        process.vitals.phase = "loading the model"
        policies = Policies(await open_with(pointer), open_pinned)
        process.vitals.policy_version = pointer.policy_version
        tools = load_tools(recipe.tools.use, process.recipe_dir)
        formats = open_format(recipe.tools.format, tools, recipe.tools.tags)
        try:
            chat = Chat(folder)
            chat.observation_ids([""], recipe.policy.observation_role, ended=False)
        except ChatError as error:
            raise RecipeError("recipe", "policy.model", str(error)) from error
        actor = Generator(recipe, policies, chat, formats, process.replica)
        follower = asyncio.create_task(_follow_policy(process, policies.update))
        try:
            await Hops(process, actor).serve([""], recipe.generator.slots)
        finally:
            follower.cancel()
            await asyncio.wait({follower})
            await actor.close()


async def _follow_policy(process: Process, update: Callable[[bytes, int], Awaitable[None]]) -> None:
    """Take each newer version as it comes."""
    async for pointer in policy.follow(process.bus, process.run):
        if pointer.policy_version <= process.vitals.policy_version:
            continue
        try:
            await update(await policy.load_weights(process.bus, pointer), pointer.policy_version)
            process.vitals.policy_version = pointer.policy_version
        except BusError as error:
            log.warning("weights not loaded", version=pointer.policy_version, error=str(error))


async def serve_toolbox(process: Process) -> None:
    """Run tool calls."""
    from actors.toolbox import Toolbox
    from tools.registry import load_tools
    from tools.sandbox.select import open_sandbox

    recipe = process.recipe
    tools = load_tools(recipe.tools.use, process.recipe_dir)
    process.vitals.phase = "testing the sandbox"
    sandbox = await open_sandbox(recipe.tools.tier)
    log.info("sandbox", tier=sandbox.tier)
    actor = Toolbox(recipe, tools, sandbox, process.replica)
    try:
        await Hops(process, actor).serve(list(tools), recipe.toolbox.slots)
    finally:
        await actor.close()


async def serve_scorer(process: Process) -> None:
    """Score finished trajectories."""
    from actors.scorer import Scorer
    from rewards.registry import load_reward
    from tools.sandbox.select import open_sandbox

    recipe = process.recipe
    reward = load_reward(recipe.scorer.reward, process.recipe_dir)

    async def load_private(key: str) -> dict[str, Any]:
        return await private.get_private(process.bus, process.run, key)

    process.vitals.phase = "testing the sandbox"
    async with AsyncExitStack() as stack:
        sandbox = await open_sandbox(recipe.tools.tier, imports=getattr(reward, "imports", ()))
        stack.push_async_callback(sandbox.close)
        actor = Scorer(reward, load_private, sandbox, process.replica)
        await Hops(process, actor).serve([""], recipe.scorer.slots)


async def serve_learner(process: Process) -> None:
    """Train on complete groups and publish weights."""
    from actors.training import Training

    await Training(process).serve()


ROLES: dict[RoleName, Callable[[Process], Awaitable[None]]] = {
    "dispatcher": serve_dispatcher,
    "generator": serve_generator,
    "toolbox": serve_toolbox,
    "scorer": serve_scorer,
    "learner": serve_learner,
}
