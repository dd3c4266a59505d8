"""State on disk, all or nothing.

<folder>/step-000010/
    model.safetensors       weights as the optimizer sees them; of an adapter adapter.safetensors
    optimizer.safetensors   `<parameter>/<moment>`
    rng.safetensors         torch's generators
    state.json              {"step": 10}
"""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

Files = Iterable[tuple[str, bytes]]
"""Names and contents."""

_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step belongs."""
    return folder / f"step-{step:06d}"


def latest_checkpoint(folder: Path, last_step: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run, of no later step than `last_step`; None when there is none."""
    found = [p for p in checkpoints(folder) if last_step is None or step_of(p) <= last_step]
    return found[-1] if found else None


def prune_checkpoints(folder: Path, keep: int, beside: Collection[int] = ()) -> None:
    """Delete all but the newest `keep`, those of the steps `beside`, that of step 0, and what interrupted writers left.

    From step 0 a whole run can be replayed.
    """
    for path in (*folder.glob(".*.writing"), *folder.glob(".*.removing")):
        shutil.rmtree(path)
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) > 0 and step_of(path) not in beside:
            _remove(path)


def best_steps(folder: Path, scores: Mapping[int, float], count: int) -> list[int]:
    """The steps of the `count` checkpoints with the highest scores, the best first; of equals the later is better."""
    scored = [step for path in checkpoints(folder) if (step := step_of(path)) in scores]
    return sorted(scored, key=lambda step: (-scores[step], -step))[:count]


class CheckpointWriter:
    """Writes a run's checkpoints in a thread of its own, one after the other, so that training goes on meanwhile."""

    def __init__(self, folder: Path, keep: int, keep_best: int = 0) -> None:
        self._folder = folder
        self._keep = keep
        self._keep_best = keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def write(
        self, step: int, snapshot: list[tuple[str, bytes]], scores: Mapping[int, float]
    ) -> None:
        """Begin to write what nobody changes any more, then to delete what need not stay, once the one before is done.

        Raises OSError when the one before could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, step, snapshot, dict(scores))

    def wait(self) -> None:
        """Until all is written. Raises OSError when it could not be."""
        if self._writing is not None:
            self._writing.result()

    def _write(
        self, step: int, snapshot: list[tuple[str, bytes]], scores: Mapping[int, float]
    ) -> None:
        write_folder(checkpoint_path(self._folder, step), snapshot)
        best = best_steps(self._folder, scores, self._keep_best)
        prune_checkpoints(self._folder, self._keep, best)


def write_folder(path: Path, files: Files) -> None:
    """Write a folder so that it is there whole or not at all, also after a power cut; replaces an older one.

    `files` are taken one by one, so that not all need be in memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.writing")
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir()
    for name, content in files:
        with (writing / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(writing)
    if path.exists():
        _remove(path)
    writing.rename(path)
    _sync_folder(path.parent)


def _remove(path: Path) -> None:
    """Delete a folder without ever showing half of it under its name."""
    removing = path.with_name(f".{path.name}.removing")
    if removing.exists():
        shutil.rmtree(removing)
    path.rename(removing)
    shutil.rmtree(removing)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, as fsync of a file does for its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
