"""Joins the learner to the bus: the write-ahead log, the optimizer step, the weights, in that order.

    step appended → trained → stepped appended → weights published

Killed anywhere in it, the next learner loads the last checkpoint, trains the recorded steps again, with the same
batches, and goes on. Training runs in a thread; the loop goes on reading the log.
"""

import asyncio
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
from msgspec.structs import replace

from actors import metrics
from actors.cleaning import OldWeights
from actors.data import load_function
from actors.errors import RecipeError
from actors.learner import LOG_PLACE, NAME, Batch, LogPlace, Planner, is_shadow, step_metrics
from actors.pictures import Pictures, open_pictures
from actors.process import Process
from actors.run_folder import RunFolder
from actors.scores import Scores
from bus import policy, subjects
from engines.chat import Chat
from engines.errors import EngineError
from learner.checkpoints import CheckpointWriter, latest_checkpoint
from learner.policy import Policy
from learner.samples import Sample, batch_sha256, sample_of
from learner.supervised import cold_start
from schemas.events import AnyLearnerEvent, Ended, Step, Stepped, Warmed
from schemas.messages import WeightsPointer
from schemas.recipe import Lora, Recipe
from schemas.trajectory import Trajectory

log = structlog.get_logger()

REFERENCE = "reference"
"""Where version 0 stays in a run's folder, if the loss compares with it."""
_BASE = "base"
"""Where the result of the cold start stays, if adapters are trained on it."""
_POLL_S = 0.05


class Training:
    """One learner process."""

    def __init__(
        self, process: Process, open_policy: Callable[[Path, Recipe], Policy] = Policy.open
    ) -> None:
        self._process = process
        self._open = open_policy
        self._recipe = process.recipe
        self._folder = RunFolder(process.run)
        self._policy: Policy
        self._planner: Planner
        self._base = self._folder.path / _BASE
        learner = process.recipe.learner
        self._checkpoints = CheckpointWriter(
            self._folder.checkpoints, learner.checkpoints_kept, learner.best_checkpoints_kept
        )
        self._scores = Scores()
        self._assets = self._base_sha256 = ""
        self._version = -1
        """What the policy in memory is."""
        self._published = -1
        """The newest version that others know; steps trained again are not published again."""
        self._waited_s: float | None = None
        self._old_weights = OldWeights(process.bus, process.run, process.recipe)

    async def serve(self) -> None:
        """Make version 0 or recover, then train until the run ends or we are told to stop."""
        process = self._process
        process.vitals.phase = "loading the model"
        torch.set_num_threads(self._recipe.learner.threads)
        checkpoint = latest_checkpoint(self._folder.checkpoints)
        source = await asyncio.to_thread(self._model_folder)
        self._pictures = self._open_pictures(source)
        cold = checkpoint is None and source != self._base and self._recipe.cold_start.steps
        recipe = _without_adapters(self._recipe) if cold else self._recipe
        self._policy = await asyncio.to_thread(self._open, source, recipe)
        self._assets = await policy.publish_assets(process.bus, process.run, self._policy.assets())
        pointer = await policy.current(process.bus, process.run)
        self._published = pointer.policy_version if pointer else -1
        step = 0
        if checkpoint is not None:
            step = await asyncio.to_thread(self._policy.load_checkpoint, checkpoint)
        elif cold and not await self._cold_start():
            return
        else:
            await self._keep_version_0()
        await asyncio.to_thread(hold_models, self._policy, process.recipe_dir, self._folder.path)
        if adapters := self._policy.adapters:
            base = await asyncio.to_thread(adapters.base)
            self._base_sha256 = await policy.publish_base(process.bus, process.run, base)
        weights = self._policy.weights()
        await self._publish(step, weights, hashlib.sha256(weights).hexdigest())
        process.vitals.phase = "waiting for groups"
        place = _place_of(checkpoint)
        self._read_seq = place.read_seq
        self._planner = Planner(self._recipe, step, process.replica, place.learner_seq)
        await self._read_scores()
        try:
            await self._train()
        finally:
            await asyncio.to_thread(self._checkpoints.wait)

    def _open_pictures(self, folder: Path) -> Pictures | None:
        """What the model sees. Raises RecipeError where it cannot learn from that."""
        try:
            return open_pictures(folder, self._process.bus, self._process.run)
        except EngineError as error:
            raise RecipeError("recipe", "policy.model", error.detail) from error

    def _model_folder(self) -> Path:
        """The Hugging Face folder to start from; a model source writes it once per run."""
        if self._base.is_dir():
            return self._base
        name = self._recipe.policy.model
        for folder in (Path(self._process.recipe_dir, name), Path(name)):
            if folder.is_dir():
                return folder
        if ":" not in name:
            return _download(name)
        folder = self._folder.path / "model"
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            load_function(name, "policy.model", self._process.recipe_dir)(unfinished)
            unfinished.rename(folder)
        return folder

    async def _append(self, event: AnyLearnerEvent) -> None:
        seq = await self._process.log.append_learner(NAME, event, self._planner.seq)
        self._planner.observe(event, seq, time.time())

    # -- version 0 ---------------------------------------------------------------------------------

    async def _cold_start(self) -> bool:
        """Supervised fine-tuning; its result is version 0. False when told to stop in the middle."""
        config, vitals = self._recipe.cold_start, self._process.vitals
        vitals.phase = f"cold start 0/{config.steps}"
        make = load_function(
            config.demonstrations, "cold_start.demonstrations", self._process.recipe_dir
        )
        chat = Chat(self._policy.folder)
        rows = cold_start(self._policy, make(self._recipe.seed), self._recipe, chat)
        seq = 0
        async for stored in self._process.log.read(subjects.learner(self._process.run, NAME)):
            seq = stored.seq
        while (row := await asyncio.to_thread(next, rows, None)) is not None:
            step = int(row["step"])
            vitals.phase = f"cold start {step}/{config.steps}"
            event = Warmed(
                replica=self._process.replica, step=step, steps=config.steps, metrics=row
            )
            seq = await self._process.log.append_learner(NAME, event, seq)
            if self._process.stopping.is_set():
                return False
        if self._recipe.learner.lora.rank:
            await asyncio.to_thread(self._policy.export, self._base)
            self._policy = await asyncio.to_thread(self._open, self._base, self._recipe)
        return True

    async def _keep_version_0(self) -> None:
        """Keep what the loss compares with, if that is version 0, and what every replay begins with."""
        learner = self._recipe.learner
        if learner.kl.coefficient and not (learner.kl.reference or learner.lora.rank):
            await asyncio.to_thread(self._policy.export, self._folder.path / REFERENCE)
        await self._checkpoint(0)
        await asyncio.to_thread(self._checkpoints.wait)

    # -- versions 1, 2, … --------------------------------------------------------------------------

    async def _train(self) -> None:
        barriers = self._recipe.asynchrony.barriers  # all wait then for what is filtered here
        hint = subjects.trajectory(self._process.run, "*", "scored") if barriers else ""
        async for found in self._process.log.follow(self._read_seq, poll_s=_POLL_S, hint=hint):
            for stored in found:
                self._read_seq = stored.seq
                if is_shadow(stored.learner):
                    continue
                self._planner.observe(stored.event, stored.seq, stored.time_s)
                self._old_weights.observe(stored.event, stored.seq)
                self._scores.observe(stored.event)
                if isinstance(stored.event, Ended):
                    await self._train_again()
                    await self._finish()
                    return
            if not found:
                await self._step()
            if self._process.stopping.is_set():
                return

    async def _read_scores(self) -> None:
        """Of the part of the log that is not read again."""
        run_log = self._process.log
        for subject in (
            subjects.learner(run_log.run, NAME, "stepped"),
            subjects.trajectory(run_log.run, "*", "evaluated"),
        ):
            async for stored in run_log.read(subject):
                if stored.seq <= self._read_seq:
                    self._scores.observe(stored.event)

    async def _train_again(self) -> None:
        """The steps that the log has and our checkpoint had not."""
        batches = self._planner.batches
        for number in sorted(batches):
            if not self._process.stopping.is_set():
                await self._train_batch(batches.pop(number))

    async def _step(self) -> None:
        """Train what can be trained now. Called at the end of what is stored."""
        planner = self._planner
        await self._train_again()
        for event in planner.filters(self._version):
            await self._append(event)
        step = planner.plan(self._version)
        if step is None or self._must_wait():
            if without := planner.without_signal:
                self._process.vitals.phase = (
                    f"no signal: in each of {without} groups all rewards are equal"
                )
            return
        await self._append(step)
        await self._train_batch(planner.batches.pop(step.step))

    def _must_wait(self) -> bool:
        """Whether live trajectories that this step would make too stale are still worth waiting for."""
        if not self._planner.stragglers(self._version):
            self._waited_s = None
            return False
        now = time.monotonic()
        self._waited_s = self._waited_s or now
        if now - self._waited_s < self._recipe.asynchrony.straggler_wait_s:
            self._process.vitals.phase = "waiting for stragglers"
            return True
        self._waited_s = None
        return False

    async def _train_batch(self, batch: Batch) -> None:
        """The optimizer step and all that follows it; a step recorded before is trained again."""
        number = batch.step.step
        self._process.vitals.phase = f"step {number}/{self._recipe.learner.steps}"
        begun = time.monotonic()
        groups = await samples_of(batch, self._pictures)
        trained = await asyncio.to_thread(optimize, self._policy, groups, batch.step)
        train_s = time.monotonic() - begun
        weights = await asyncio.to_thread(self._policy.weights)
        recorded = self._planner.stepped.get(number)
        sha256 = hashlib.sha256(weights).hexdigest()
        if recorded is None:
            row = self._row(batch, trained, train_s)
            await self._append(
                Stepped(
                    replica=self._process.replica,
                    step=number,
                    policy_version=number,
                    weights_sha256=sha256,
                    metrics=row,
                    batch_sha256=batch_sha256(groups),
                )
            )
            metrics.stepped(row)
        elif recorded.weights_sha256 != sha256:
            log.warning("step trained again gave other weights", step=number)
        if number > self._published:  # else what is newer is in use
            await self._old_weights.delete(number)
        await self._publish(number, weights, sha256)
        last = number == self._recipe.learner.steps
        if number % self._recipe.learner.checkpoint_every_steps == 0 or last:
            await self._checkpoint(number)
        self._process.vitals.phase = "waiting for groups"

    def _row(self, batch: Batch, trained: dict[str, float], train_s: float) -> dict[str, Any]:
        """One row of metrics.jsonl."""
        planner = self._planner
        step_s = max(1e-9, time.time() - planner.since_s)
        return {
            "step": batch.step.step,
            "policy_version": batch.step.step,
            **step_metrics(batch),
            **trained,
            "failed_by_cause": dict(planner.failed_by_cause),
            "gen_tokens_per_s": planner.sampled_tokens / step_s,
            "train_tokens_per_s": trained["train_tokens"] / train_s,
            "train_s": train_s,
            "step_s": step_s,
        }

    async def _publish(self, version: int, weights: bytes, sha256: str) -> None:
        self._version = self._process.vitals.policy_version = version
        if version <= self._published:
            return
        pointer = WeightsPointer(
            policy_version=version,
            weights_sha256=sha256,
            assets_sha256=self._assets,
            base_sha256=self._base_sha256,
        )
        await policy.publish_policy(self._process.bus, self._process.run, pointer, weights)
        self._published = version

    async def _checkpoint(self, step: int) -> None:
        """Take a snapshot; it is written while training goes on."""
        snapshot = await asyncio.to_thread(lambda: list(self._policy.checkpoint_files(step)))
        if step:
            read_seq = min(
                self._planner.needed_from(self._read_seq),
                self._old_weights.needed_from(self._read_seq),
            )
            place = LogPlace(read_seq, self._planner.seq)
            snapshot.append((LOG_PLACE, msgspec.json.encode(place)))
        scores = self._scores.by_step(self._recipe.learner)
        await asyncio.to_thread(self._checkpoints.write, step, snapshot, scores)

    async def _finish(self) -> None:
        """Leave the trained model as an ordinary Hugging Face folder."""
        self._process.vitals.phase = "exporting"
        await asyncio.to_thread(self._policy.export, self._folder.path / "checkpoint")


def _place_of(checkpoint: Path | None) -> LogPlace:
    path = checkpoint and checkpoint / LOG_PLACE
    if path and path.exists():
        return msgspec.json.decode(path.read_bytes(), type=LogPlace)
    return LogPlace()


def hold_models(policy: Policy, recipe_dir: str, run_path: Path) -> None:
    """Load the other models that the recipe's loss asks; a name is a folder or a hub's. Raises UnsupportedModel."""
    learner = policy.config.learner
    if learner.kl.reference:
        policy.hold_reference(_named(learner.kl.reference, recipe_dir))
    elif learner.kl.coefficient and not policy.adapters:  # without its adapters it is version 0
        policy.hold_reference(run_path / REFERENCE)
    if learner.teacher.folder:
        policy.hold_teacher(_named(learner.teacher.folder, recipe_dir))


def _without_adapters(recipe: Recipe) -> Recipe:
    """The cold start trains all weights."""
    return replace(recipe, learner=replace(recipe.learner, lora=Lora()))


def _named(name: str, recipe_dir: str) -> Path:
    """A model's folder, relative to the recipe or to where we are, or a hub's model."""
    folders = [folder for folder in (Path(recipe_dir, name), Path(name)) if folder.is_dir()]
    return folders[0] if folders else _download(name)


async def samples_of(batch: Batch, pictures: Pictures | None) -> list[list[Sample]]:
    """A batch as the learner takes it. Raises HopFailed, BusError when an image cannot be had."""

    async def sample(member: Trajectory) -> Sample:
        images = await pictures.inputs(member.images, member.tokens) if pictures else []
        return sample_of(member, images)

    return [[await sample(member) for member in group] for group in batch.groups]


def optimize(policy: Policy, groups: list[list[Sample]], step: Step) -> dict[str, float]:
    """One optimizer step, in the thread that calls: torch keeps the number of its threads for each one apart."""
    torch.set_num_threads(step.threads)
    return policy.train_step(groups, step.step)


def _download(name: str) -> Path:
    """A model of a hub, by name. Raises RecipeError when there is none, or no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = f"no such folder, and the hub does not give {name!r}: {error}".splitlines()[0]
        raise RecipeError("recipe", "policy.model", why) from error
