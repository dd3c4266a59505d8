"""How each role is put together: what it loads, and what it is given. In flow order.

dispatcher → generator → toolbox → scorer → learner, recorder, gateway
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from actors import metrics
from actors.errors import RecipeError
from actors.process import Hops, Process
from actors.weights import Versions
from bus import policy, private, subjects
from bus.connection import Message
from bus.errors import BusError
from engines.errors import EngineError
from schemas.events import TERMINAL, AnyEvent, Scored, ToolAdded
from schemas.messages import RoleName, WeightsPointer
from schemas.recipe import Recipe

if TYPE_CHECKING:  # these take seconds to import
    from actors.calling import Toolset
    from actors.generator import Generator
    from engines.chat import Chat
    from tools.tool import Place, Tool

log = structlog.get_logger()

T = TypeVar("T")

_AGAIN_S = 1.0


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
    from actors.calling import run_events
    from actors.generator import Generator, Policies
    from actors.pictures import open_pictures
    from engines.open import open_engine

    pointer = await first_policy(process)
    if pointer is None:
        return
    recipe, bus, run = process.recipe, process.bus, process.run
    with tempfile.TemporaryDirectory(prefix="actors-model-") as name:
        folder = Path(name)
        for file, data in (await policy.load_assets(bus, run, pointer)).files.items():
            (folder / file).write_bytes(data)

        open_one = partial(open_engine, recipe.generator, recipe.policy, folder, process.recipe_dir)
        make = partial(asyncio.to_thread, open_one)
        versions = Versions(bus, run)
        process.vitals.phase = "loading the model"
        pointer, weights = await versions.newest(pointer)
        policies = Policies(await make(), make, versions.exactly)
        await policies.update(weights, pointer.policy_version)
        process.vitals.policy_version = pointer.policy_version
        chat, toolset = _open_chat(recipe, folder, process.recipe_dir)
        events = run_events(process.log)
        await toolset.catch_up(events)
        actor = Generator(recipe, policies, chat, toolset.calling, process.replica)
        actor.pictures = open_pictures(folder, bus, run)
        try:
            async with asyncio.TaskGroup() as group:  # without new weights no hop can be taken
                beside = [
                    group.create_task(_follow_tools(actor, toolset, events)),
                    group.create_task(_follow_policy(process, versions, policies.update)),
                ]
                await Hops(process, actor).serve([""], recipe.generator.slots)
                for task in beside:
                    task.cancel()
        finally:
            await actor.close()


async def _follow_tools(
    actor: "Generator", toolset: "Toolset", events: AsyncIterator[AnyEvent | None]
) -> None:
    """Let each turn that ends from now on call the tools that there are."""
    async for event in events:
        toolset.take(event)
        actor.calling = toolset.calling


def _open_chat(recipe: Recipe, folder: Path, recipe_dir: str) -> "tuple[Chat, Toolset]":
    """How to speak with the model, and how it calls tools. Raises RecipeError for what its chat template cannot say."""
    from actors.calling import Toolset
    from engines.chat import Chat
    from engines.errors import ChatError
    from tools.errors import ToolError
    from tools.formats import open_format
    from tools.remote import all_tools

    config = recipe.tools
    tools = all_tools(config, recipe_dir)
    try:
        chat = Chat(folder)
        chat.observation_ids([""], recipe.policy.observation_role, ended=False)
        toolset = Toolset(
            tools, lambda tools: open_format(config.format, tools, config.tags, chat.write_calls)
        )
        if "template" in (config.format, config.show) and tools and not chat.shows_tools():
            raise ChatError('the chat template shows no tools: use tools.show = "system"')
    except ChatError as error:
        raise RecipeError("recipe", "policy.model", str(error)) from error
    except ToolError as error:
        raise RecipeError("recipe", "tools.format", error.detail) from error
    return chat, toolset


async def _follow_policy(
    process: Process, versions: Versions, update: Callable[[bytes, int], Awaitable[None]]
) -> None:
    """Take each newer version as it comes. Raises EngineError: what the engine raises, or `weights_not_taken`."""
    limit_s = 2 * process.recipe.deadlines.gen_s  # it may wait for running turns first
    async for pointer in policy.follow(process.bus, process.run):
        while pointer.policy_version > process.vitals.policy_version:
            try:
                pointer, weights = await versions.newest(pointer)
                async with asyncio.timeout(limit_s):
                    await update(weights, pointer.policy_version)
                process.vitals.policy_version = pointer.policy_version
            except BusError as error:
                # perhaps the last version there will be: nobody would tell us of it again
                version = pointer.policy_version
                log.warning("weights not loaded; trying again", version=version, error=str(error))
                await asyncio.sleep(_AGAIN_S)
            except TimeoutError as error:
                why = f"version {pointer.policy_version}: not within {limit_s:g} s"
                raise EngineError("weights_not_taken", why) from error


async def serve_toolbox(process: Process) -> None:
    """Run tool calls."""
    from actors.images import Images, load_image, store_images
    from actors.routing import Routing
    from actors.toolbox import Toolbox
    from bus.holders import Holders
    from tools.registry import load_tools, open_tools
    from tools.sandbox.room import make_room
    from tools.sandbox.select import open_sandbox
    from tools.tool import Place

    recipe = process.recipe
    tools = load_tools(recipe.tools.use, process.recipe_dir, recipe.tools.options)
    process.vitals.phase = "testing the sandbox"
    if (room := make_room(recipe.toolbox.sessions)) < recipe.toolbox.sessions:
        log.warning(
            "the limit of open files (ulimit -Hn) is too low for toolbox.sessions", room=room
        )
    sandbox = await open_sandbox(recipe.tools.tier, imports=recipe.toolbox.imports)
    log.info("sandbox", tier=sandbox.tier)
    metrics.SANDBOX.labels(sandbox.tier).set(1)
    images = Images(
        partial(store_images, process.bus, process.run),
        partial(load_image, process.bus, process.run),
    )
    toolbox = Toolbox(recipe, tools, sandbox, images, process.replica)
    actor = Routing(
        recipe,
        toolbox,
        Holders(process.bus, process.run, process.replica),
        process.log.trajectory,
        process.replica,
    )
    try:
        place = Place(recipe_dir=process.recipe_dir, encoder=open_encoder)
        for tool in tools.values():
            if tool.options.imports:  # what cannot be imported is told now, not by the first call
                await sandbox.importing(tool.options.imports).run("")
        async with open_tools(tools.values(), place):
            await _close_sessions(process, actor.forget)
            hops = Hops(process, actor)
            async with asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(_serve_added(process, tools, place, hops)),
                    group.create_task(toolbox.sessions.watch_memory()),
                ]
                await hops.serve(list(tools), recipe.toolbox.slots)
                for task in beside:
                    task.cancel()
    finally:
        await actor.close()


async def _serve_added(
    process: Process, tools: "dict[str, Tool]", place: "Place", hops: Hops
) -> None:
    """Serve what is added to the run too, each version by its queue, until the process ends.

    What cannot be made here, for whatever reason, fails its calls with that reason, and nothing else.
    """
    from actors.adding import load_added
    from actors.calling import run_events
    from tools.remote import ShownTool

    async with AsyncExitStack() as stack:

        async def make(event: ToolAdded) -> "Tool":
            tool = await asyncio.to_thread(load_added, event, process.recipe_dir)
            await stack.enter_async_context(tool.open(place))
            return tool

        async for event in run_events(process.log):
            if isinstance(event, ToolAdded) and event.use and event.queue not in tools:
                made = asyncio.ensure_future(make(event))
                await asyncio.wait({made})
                if error := made.exception():
                    log.error("tool cannot be made", tool=event.queue, error=repr(error))
                    tools[event.queue] = ShownTool(event.tool, [], f"cannot be made: {error!r}")
                else:
                    tools[event.queue] = made.result()
                hops.add(event.queue)


async def _close_sessions(process: Process, forget: Callable[[str], Awaitable[None]]) -> None:
    """Close what is kept for a trajectory when it ends; one that is missed is closed for lack of room, later."""

    async def on_end(message: Message) -> None:
        await forget(message.subject.split(".")[3])

    for kind in (Scored, *TERMINAL):
        subject = subjects.trajectory(process.run, "*", kind.__name__.lower())
        await process.bus.subscribe(subject, on_end)


def open_encoder(name: str) -> Callable[[list[str]], Any]:
    """A text encoder, for search by meaning; torch is imported only now."""
    from engines import encoder

    return encoder.open_encoder(name)


async def serve_scorer(process: Process) -> None:
    """Score finished trajectories."""
    from actors.scorer import Scorer
    from rewards.registry import load_reward
    from tools.repo import repo
    from tools.sandbox.select import open_sandbox

    recipe = process.recipe
    reward = load_reward(recipe.scorer.reward, process.recipe_dir)

    async def load_private(key: str) -> dict[str, Any]:
        return await private.get_private(process.bus, process.run, key)

    process.vitals.phase = "testing the sandbox"
    async with AsyncExitStack() as stack:
        sandbox = await open_sandbox(recipe.tools.tier, imports=getattr(reward, "imports", ()))
        stack.push_async_callback(sandbox.close)
        metrics.SANDBOX.labels(sandbox.tier).set(1)
        tool = repo.configured(dict(recipe.tools.options.get("repo", {})))
        repositories = stack.enter_context(tool.repositories(process.recipe_dir))
        actor = Scorer(reward, load_private, sandbox, process.replica, repositories)
        await Hops(process, actor).serve([""], recipe.scorer.slots)


async def serve_learner(process: Process) -> None:
    """Train on complete groups and publish weights."""
    from actors.training import Training

    await Training(process).serve()


async def serve_recorder(process: Process) -> None:
    """Write the archive for analytics."""
    from actors.recording import Recording

    await Recording(process).serve()


async def serve_gateway(process: Process) -> None:
    """Answer other trainers' policies over HTTP."""
    from actors.gateway_http import serve

    await serve(process)


def slow_imports(role: RoleName, recipe: Recipe) -> list[str]:
    """The modules of a role that take seconds to import."""
    if role == "generator" and recipe.generator.engine == "transformers":
        return ["engines.transformers_engine"]
    alone = role == "learner" and not recipe.learner.deepspeed  # ranks are no forks
    adapters = ["learner.lora"] if recipe.learner.lora.rank else []
    return ["actors.training", *adapters] if alone else []


ROLES: dict[RoleName, Callable[[Process], Awaitable[None]]] = {
    "dispatcher": serve_dispatcher,
    "generator": serve_generator,
    "toolbox": serve_toolbox,
    "scorer": serve_scorer,
    "learner": serve_learner,
    "recorder": serve_recorder,
    "gateway": serve_gateway,
}
