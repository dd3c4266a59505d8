"""`actors export`: a checkpoint of a run, or of a shadow, as a plain Hugging Face folder with a model card."""

import asyncio
from pathlib import Path

import click

from actors.card import Exported, card_files
from actors.errors import UserError
from actors.joining import reach
from actors.learner import NAME
from actors.process import opened
from actors.reopening import reopened
from actors.run_folder import RunFolder
from actors.scores import Scores
from actors.shadow import recipe_of_shadow
from bus import subjects
from bus.log import Log
from learner.checkpoints import best_steps, checkpoint_path, checkpoints, step_of
from schemas.events import Joined
from schemas.recipe import Learner, Recipe


async def export(name: str, folder: Path, nats_url: str, *, step: int | None, best: bool) -> None:
    """Write the newest checkpoint, that of a step, or the best, of `RUN` or `RUN/SHADOW`. Raises UserError."""
    _refuse_folder(folder)
    run, _, shadow = name.partition("/")
    kept = RunFolder(run, shadow).checkpoints
    async with reach(run, nats_url) as (bus, log):
        event = await opened(log)
        if event is None:
            raise UserError(f"run {run!r} has no recipe in its log: it was never begun")
        recipe, scores = await _told(log, event.recipe, shadow or NAME)
        number = _choose(kept, scores, recipe.learner, step=step, best=best)
        checkpoint = checkpoint_path(kept, number)
        async with reopened(bus, run, recipe, checkpoint) as policy:
            files = card_files(Exported(name, number, recipe, scores))
            await asyncio.to_thread(policy.export, folder, files)
    click.echo(f"version {number} of {name} in {folder}/")


def _refuse_folder(folder: Path) -> None:
    if folder.exists() and not (folder / "config.json").exists():
        raise UserError(f"export: {folder} is there and is no model's folder: give a new one")


async def _told(log: Log, recipe: Recipe, learner: str) -> tuple[Recipe, Scores]:
    """What a learner's log, and the evaluations of a main one, say."""
    scores = Scores()
    async for stored in log.read(subjects.learner(log.run, learner)):
        scores.observe(stored.event)
        if isinstance(stored.event, Joined):
            recipe = recipe_of_shadow(recipe, stored.event.overrides)
    if learner == NAME:
        async for stored in log.read(subjects.trajectory(log.run, "*", "evaluated")):
            scores.observe(stored.event)
    return recipe, scores


def _choose(kept: Path, scores: Scores, learner: Learner, *, step: int | None, best: bool) -> int:
    """The step to export. Raises UserError."""
    steps = [step_of(path) for path in checkpoints(kept)]
    if not steps:
        raise UserError(f"no checkpoint in {kept}/: export where the learner ran")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {kept}/; there are {steps}")
    if not best:
        return steps[-1] if step is None else step
    found = best_steps(kept, scores.by_step(learner), 1)
    if not found:
        raise UserError(
            f"no checkpoint in {kept}/ has a score by learner.best_by = {learner.best_by}"
        )
    return found[0]
