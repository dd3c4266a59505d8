"""A shadow: a learner beside the main one, that trains the batches which that one recorded, with settings of its own.

    main's `step` → the same `step` in our log → trained → `stepped` in our log → our checkpoints and metrics

It publishes no weights and frees no slots; no other reader counts what it does. Killed anywhere in it, the same
command goes on from its last checkpoint. When its run is over before it, it goes on along the log at rest.
"""

import asyncio
import hashlib
import signal
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec
import structlog
import torch
from msgspec.structs import replace

from actors.errors import UserError
from actors.joining import serving, watch_process
from actors.learner import NAME, Batch, Planner, is_shadow, step_metrics
from actors.pictures import open_pictures
from actors.process import Process, join
from actors.recipe import with_overrides
from actors.reopening import version_0
from actors.roles import until_stopping
from actors.run_folder import RunFolder
from actors.scores import Scores
from actors.training import REFERENCE, hold_models, optimize, samples_of
from bus import policy, subjects
from learner.checkpoints import CheckpointWriter, latest_checkpoint, step_of, write_folder
from learner.errors import LearnerError
from learner.policy import Policy
from learner.samples import batch_sha256
from schemas.events import AnyLearnerEvent, Ended, Joined, Step, Stepped
from schemas.recipe import Recipe

log = structlog.get_logger()

INTERRUPTED = 130
"""Exit status of a shadow that was told to stop before the run's end."""
_OF_THE_RUN = (
    "steps", "groups_per_step", "group_size", "refill_limit", "filter", "weights_kept", "best_by",
    "ranks", "zero_stage", "offload", "hostfile",
)  # fmt: skip
"""Keys of `learner` that only the main one reads: it makes the batches, its versions are evaluated, it has ranks."""


async def run_shadow(name: str, overrides: tuple[str, ...], run: str | None, nats_url: str) -> int:
    """Train beside a live run until it ends, or along the log of one at rest; returns the exit status."""
    _refuse(name, overrides)
    told, stopping = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        told.set()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    whole = False
    while not (whole or told.is_set()):
        stopping.clear()
        async with serving(run, nats_url) as served:
            run = served.run
            if not (served.at_rest or nats_url):
                _stop_with(run, stopping)
            async with join(served.logins.of("shadow"), run, "shadow", stopping) as process:
                shadow = Shadow(process, name, overrides, at_rest=served.at_rest)
                try:
                    whole = await shadow.serve()
                except LearnerError as error:
                    raise UserError(str(error)) from error
    return 0 if whole else INTERRUPTED


def _stop_with(run: str, stopping: asyncio.Event) -> None:
    """Set the event when a live run on this machine is over."""
    if live := RunFolder(run).live():
        watch_process(live.supervisor_pid, stopping)
    else:
        stopping.set()


def _refuse(name: str, overrides: tuple[str, ...]) -> None:
    try:
        subjects.token(name, "--shadow")
    except ValueError as error:
        raise UserError(str(error)) from error
    if name == NAME:
        raise UserError(f"--shadow {name}: that is the run's own learner; choose another name")
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if section != "learner" or key.partition(".")[0] in _OF_THE_RUN:
            raise UserError(
                f"--set {override}: a shadow trains the main learner's batches; it can change keys of "
                f"[learner] other than {', '.join(_OF_THE_RUN)}"
            )


def recipe_of_shadow(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The run's recipe as its shadow has it. Raises RecipeError."""
    return with_overrides(recipe, [*overrides, "learner.best_by=reward"])


class Shadow:
    """One shadow of a run."""

    def __init__(
        self, process: Process, name: str, overrides: tuple[str, ...], *, at_rest: bool
    ) -> None:
        self._process = process
        self._name = name
        self._overrides = list(overrides)
        self._at_rest = at_rest
        self._folder = RunFolder(process.run, name)
        self._seq = 0
        """The last sequence of our log."""
        self._begun = 0
        """The last step in our log."""
        self._stepped: dict[int, Stepped] = {}
        self._scores = Scores()

    async def serve(self) -> bool:
        """Train all that the main learner has begun; False when told to stop before its end."""
        process, folder = self._process, self._folder
        process.vitals.phase = "loading the model"
        await self._recall()
        self._recipe = recipe_of_shadow(process.recipe, self._overrides)
        learner = self._recipe.learner
        torch.set_num_threads(learner.threads)
        if not await self._fetch_version_0():
            return False
        source = folder.path / REFERENCE
        self._policy = await asyncio.to_thread(Policy.open, source, self._recipe)
        self._pictures = open_pictures(source, process.bus, process.run)
        checkpoint = latest_checkpoint(folder.checkpoints)
        self._step = self._kept = 0
        if checkpoint is not None:
            self._step = self._kept = step_of(checkpoint)
            await asyncio.to_thread(self._policy.load_checkpoint, checkpoint)
        await asyncio.to_thread(hold_models, self._policy, process.recipe_dir, folder.path)
        self._checkpoints = CheckpointWriter(
            folder.checkpoints, learner.checkpoints_kept, learner.best_checkpoints_kept
        )
        self._write_metrics()
        click.echo(f"shadow {self._name} of run {process.run} in {folder.path}/")
        whole = await self._follow()
        await self._checkpoint()
        await asyncio.to_thread(self._checkpoints.wait)
        click.echo(f"{'done' if whole else 'stopped'} after step {self._step}: {folder.path}/")
        return whole

    async def _recall(self) -> None:
        """Read our own log, or begin it. Raises UserError for other settings than it began with."""
        run_log = self._process.log
        joined: Joined | None = None
        async for stored in run_log.read(subjects.learner(run_log.run, self._name)):
            self._seq = stored.seq
            if isinstance(stored.event, Joined):
                joined = stored.event
            elif isinstance(stored.event, Step):
                self._begun = stored.event.step
            elif isinstance(stored.event, Stepped):
                self._stepped[stored.event.step] = stored.event
                self._scores.observe(stored.event)
        if joined is None:
            await self._append(Joined(replica=self._process.replica, overrides=self._overrides))
        elif self._overrides and joined.overrides != self._overrides:
            known = " ".join(f"--set {override}" for override in joined.overrides)
            raise UserError(
                f"shadow {self._name!r} of run {run_log.run!r} began with {known or 'no --set'}: "
                "leave --set out to go on with it, or choose another name"
            )
        else:
            self._overrides = joined.overrides

    async def _append(self, event: AnyLearnerEvent) -> None:
        self._seq = await self._process.log.append_learner(self._name, event, self._seq)

    async def _fetch_version_0(self) -> bool:
        """Put what the run began with into our folder, once; False when told to stop before it is there."""
        bus, run, source = self._process.bus, self._process.run, self._folder.path / REFERENCE
        if source.is_dir():
            return True
        self._process.vitals.phase = "waiting for version 0"

        async def first() -> None:
            async for _ in policy.follow(bus, run):
                return

        if not self._at_rest and not await self._process.unless_stopping(first()):
            return False
        files = await version_0(bus, run)
        await asyncio.to_thread(write_folder, source, files.items())
        return True

    async def _follow(self) -> bool:
        """Take the run's events in; train each step when it comes."""
        process = self._process
        planner = Planner(self._recipe, self._step, process.replica)
        process.vitals.phase = "follows the log"
        async for found in until_stopping(process, process.log.follow()):
            for stored in found:
                if is_shadow(stored.learner):
                    continue
                planner.observe(stored.event, stored.seq, stored.time_s)
                if process.stopping.is_set():
                    return False
                if isinstance(stored.event, Step) and stored.event.step in planner.batches:
                    await self._train(planner.batches.pop(stored.event.step))
                if isinstance(stored.event, Ended):
                    return True
            if self._at_rest and not found:
                return True
        return False

    async def _train(self, batch: Batch) -> None:
        """Train one of the main learner's batches; one that we have trained before is trained again."""
        threads = self._recipe.learner.threads
        step = replace(batch.step, replica=self._process.replica, threads=threads)
        number = step.step
        if number > self._begun:
            await self._append(step)
        groups = await samples_of(batch, self._pictures)
        begun_s = time.monotonic()
        trained = await asyncio.to_thread(optimize, self._policy, groups, step)
        train_s = time.monotonic() - begun_s
        weights = await asyncio.to_thread(self._policy.weights)
        sha256 = hashlib.sha256(weights).hexdigest()
        recorded = self._stepped.get(number)
        if recorded is None:
            event = Stepped(
                replica=self._process.replica,
                step=number,
                policy_version=number,
                weights_sha256=sha256,
                metrics=_row(batch, trained, train_s),
                batch_sha256=batch_sha256(groups),
            )
            await self._append(event)
            self._scores.observe(event)
            self._write_metrics()
            click.echo(_line(event, self._recipe.learner.steps))
        elif recorded.weights_sha256 != sha256:
            log.warning("step trained again gave other weights", step=number)
        self._step = number
        if number % self._recipe.learner.checkpoint_every_steps == 0:
            await self._checkpoint()

    def _write_metrics(self) -> None:
        """metrics.jsonl, from our log."""
        path = self._folder.path / "metrics.jsonl"
        new = path.with_suffix(".new")
        new.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in self._scores.rows))
        new.rename(path)

    async def _checkpoint(self) -> None:
        if self._step == self._kept:
            return
        snapshot = await asyncio.to_thread(lambda: list(self._policy.checkpoint_files(self._step)))
        scores = self._scores.by_step(self._recipe.learner)
        await asyncio.to_thread(self._checkpoints.write, self._step, snapshot, scores)
        self._kept = self._step


def _row(batch: Batch, trained: dict[str, float], train_s: float) -> dict[str, Any]:
    """One row of metrics.jsonl."""
    return {
        "step": batch.step.step,
        "policy_version": batch.step.step,
        **step_metrics(batch),
        **trained,
        "train_tokens_per_s": trained["train_tokens"] / train_s,
        "train_s": train_s,
    }


def _line(event: Stepped, steps: int) -> str:
    row = event.metrics
    return (
        f"step {event.step}/{steps}  reward {row['reward_mean']:.3f}  loss {row['loss']:+.4f}  "
        f"gradient norm {row['grad_norm']:.4f}  {row['train_s']:.1f} s"
    )
