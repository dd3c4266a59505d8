"""`actors replay`: reward → advantage → loss → gradient norm → weights again, from the log, on a CPU.

Starts from a checkpoint and generates nothing. Reads the log, the answers and the checkpoints; writes nowhere.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from actors.actor import HopFailed
from actors.errors import UserError
from actors.joining import reach
from actors.learner import NAME, step_metrics
from actors.pictures import Pictures, open_pictures
from actors.process import opened
from actors.reopening import reopened
from actors.replaying import (
    Difference,
    Rebuilding,
    Recorded,
    StepRange,
    compare_batch,
    compare_metrics,
    compare_reward,
    compare_weights,
    of_several_ranks,
)
from actors.run_folder import RunFolder
from actors.scorer import Scorer
from actors.training import hold_models, optimize, samples_of
from bus import private
from bus.connection import Bus
from bus.log import Log
from learner.checkpoints import checkpoints, latest_checkpoint, step_of
from learner.errors import LearnerError, NotFinite
from learner.policy import Policy
from learner.samples import batch_sha256
from rewards.errors import RewardError
from rewards.registry import load_reward
from schemas.events import Opened, Scored
from schemas.trajectory import Trajectory
from tools.errors import ToolError
from tools.repo import repo
from tools.sandbox.select import open_sandbox

DIFFERENT = 1
"""Exit status when a recomputed value is not the recorded one."""


async def replay(run: str | None, nats_url: str, steps: str) -> int:
    """Do a run's steps again and print how each compares; returns the exit status."""
    wanted = StepRange.parse(steps)
    async with reach(run, nats_url) as (bus, log):
        event = await opened(log)
        if event is None:
            raise UserError(f"run {log.run!r} has no recipe in its log: it was never begun")
        checkpoint = _checkpoint(RunFolder(log.run), wanted.first)
        async with (
            reopened(bus, log.run, event.recipe, checkpoint) as model,
            _open_rewards(bus, log.run, event) as rewards,
        ):
            await _hold_models(model, event, checkpoint)
            replaying = Replaying(model, rewards, open_pictures(model.folder, bus, log.run))
            async for recorded in _steps(log, step_of(checkpoint), wanted.last):
                differences = await replaying.do_again(recorded)
                if differences:
                    for difference in differences:
                        click.echo(f"DIFFERENT {difference}")
                    return DIFFERENT
    click.echo(replaying.summary(checkpoint.name))
    return 0


async def _steps(log: Log, checkpoint_step: int, last: int | None) -> AsyncIterator[Recorded]:
    """The finished steps after a checkpoint, in order."""
    rebuilding = Rebuilding(checkpoint_step)
    async for stored in log.read():
        recorded = rebuilding.observe(stored.event, stored.seq, stored.learner or NAME)
        if recorded is not None:
            yield recorded
            if recorded.stepped.step == last:
                return


def _checkpoint(folder: RunFolder, first: int) -> Path:
    """Where to begin, to reach step `first`. Raises UserError."""
    found = latest_checkpoint(folder.checkpoints, first - 1)
    if found is not None:
        return found
    later = [step_of(path) for path in checkpoints(folder.checkpoints)]
    if not later:
        raise UserError(
            f"no checkpoint of run {folder.run!r} on this machine (looked in {folder.checkpoints}/):"
            " replay where its learner ran"
        )
    raise UserError(f"no checkpoint before step {first}: try --steps {later[0] + 1}:")


async def _hold_models(model: Policy, event: Opened, checkpoint: Path) -> None:
    """The other models that the recipe's loss asks. Raises UserError."""
    run_path = checkpoint.parent.parent
    try:
        await asyncio.to_thread(hold_models, model, event.recipe_dir, run_path)
    except LearnerError as error:
        raise UserError(str(error)) from error


class Rewards:
    """Scores trajectories once more, as the run's scorers did."""

    def __init__(self, scorer: Scorer, slots: int, *, deterministic: bool) -> None:
        self._scorer = scorer
        self._slots = asyncio.Semaphore(slots)
        self.deterministic = deterministic

    async def again(self, state: Trajectory) -> Scored | str:
        """The score of a trajectory as its scorer saw it, or why there is none."""
        async with self._slots:
            try:
                scored = await self._scorer.handle(replace(state, scored=None))
            except HopFailed as error:
                return str(error)
        assert isinstance(scored, Scored), "only training trajectories are trained or filtered"
        return scored


@asynccontextmanager
async def _open_rewards(bus: Bus, run: str, event: Opened) -> AsyncIterator[Rewards]:
    """The run's scorer, with a sandbox of its own. Raises UserError."""
    recipe = event.recipe

    async def load_private(key: str) -> dict[str, Any]:
        return await private.get_private(bus, run, key)

    try:
        reward = load_reward(recipe.scorer.reward, event.recipe_dir)
        sandbox = await open_sandbox(recipe.tools.tier, imports=reward.imports)
    except (RewardError, ToolError) as error:
        raise UserError(str(error)) from error
    tool = repo.configured(dict(recipe.tools.options.get("repo", {})))
    with tool.repositories(event.recipe_dir) as repositories:
        scorer = Scorer(reward, load_private, sandbox, "replay", repositories)
        try:
            yield Rewards(scorer, recipe.scorer.slots, deterministic=reward.deterministic)
        finally:
            await scorer.close()


class Replaying:
    """Does recorded steps again, one after the other, and counts what was found equal."""

    def __init__(self, model: Policy, rewards: Rewards, pictures: Pictures | None) -> None:
        self._model = model
        self._pictures = pictures
        self._rewards = rewards
        self._equal: Counter[str] = Counter()

    async def do_again(self, recorded: Recorded) -> list[Difference]:
        """Everything of a step that came out otherwise; empty when all is equal. Prints a line when it is."""
        begun = time.monotonic()
        number, stepped = recorded.stepped.step, recorded.stepped
        groups = await samples_of(recorded.batch, self._pictures)
        found = list(compare_batch(recorded, batch_sha256(groups)))
        self._equal["batches"] += bool(stepped.batch_sha256)
        found += await self._score(number, recorded.scored)
        self._model.config = recorded.recipe
        try:
            trained = await asyncio.to_thread(optimize, self._model, groups, recorded.batch.step)
        except NotFinite as error:
            return [*found, Difference(number, "loss", stepped.metrics.get("loss"), str(error))]
        again = {**step_metrics(recorded.batch), **trained}
        found += compare_metrics(stepped, again)
        weights = await asyncio.to_thread(self._model.weights)
        found += compare_weights(stepped, hashlib.sha256(weights).hexdigest())
        self._equal["steps"] += 1
        self._equal["nearly"] += of_several_ranks(stepped)
        self._equal["metrics"] += len(again.keys() & stepped.metrics.keys())
        if not found:
            click.echo(
                f"step {number}: equal   loss {trained['loss']:+.6f}   "
                f"gradient norm {trained['grad_norm']:.6f}   {time.monotonic() - begun:.1f} s"
            )
        return found

    async def _score(self, step: int, states: Iterable[Trajectory]) -> list[Difference]:
        found: list[Difference] = []
        members = list(states)
        if not self._rewards.deterministic:
            self._equal["taken"] += len(members)
            return found
        again = await asyncio.gather(*(self._rewards.again(state) for state in members))
        for state, scored in zip(members, again, strict=True):
            found += compare_reward(step, state, scored)
        self._equal["rewards"] += len(members)
        return found

    def summary(self, checkpoint: str) -> str:
        """What was found equal, and what was not looked at."""
        equal = self._equal
        if not equal["steps"]:
            return f"nothing to replay: no step was finished after {checkpoint}"
        lines = [
            f"equal: {equal['steps']} steps from {checkpoint}: {equal['batches']} batches, "
            f"{equal['rewards']} rewards, {equal['metrics']} metrics, {equal['steps'] - equal['nearly']} versions"
        ]
        if equal["nearly"]:
            lines.append(
                f"{equal['nearly']} steps of several ranks: metrics equal to a thousandth, versions not compared"
            )
        if equal["taken"]:
            lines.append(
                f"{equal['taken']} rewards taken as recorded: the reward is not deterministic"
            )
        if equal["batches"] < equal["steps"]:
            lines.append(
                f"{equal['steps'] - equal['batches']} steps have no batch_sha256 to compare"
            )
        return "\n".join(lines)
