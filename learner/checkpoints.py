"""State on disk, all or nothing.

<folder>/step-000010/
    model.safetensors       weights as the optimizer sees them
    optimizer.safetensors   `<parameter>/<moment>`
    rng.safetensors         torch's generators
    state.json              {"step": 10}
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step belongs."""
    return folder / f"step-{step:06d}"


def latest_checkpoint(folder: Path, last_step: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run, of no later step than `last_step`; None when there is none."""
    found = [p for p in checkpoints(folder) if last_step is None or step_of(p) <= last_step]
    return found[-1] if found else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` and that of step 0, and what interrupted writers left behind.

    From step 0 a whole run can be replayed.
    """
    for path in (*folder.glob(".*.writing"), *folder.glob(".*.removing")):
        shutil.rmtree(path)
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) > 0:
            _remove(path)


def write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
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
