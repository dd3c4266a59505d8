"""A policy as it was at a checkpoint, wherever its model came from: its other files are taken from the object store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils.logging import disable_progress_bar

from actors.errors import UserError
from bus import policy as policies
from bus.connection import Bus
from learner.errors import LearnerError
from learner.policy import Policy
from schemas.recipe import Recipe


async def version_0(bus: Bus, run: str) -> dict[str, bytes]:
    """The files of a Hugging Face folder of what the run began with. Raises UserError."""
    pointer = await policies.version(bus, run, 0)
    if pointer is None:
        raise UserError(f"run {run!r} has published no version yet")
    assets = await policies.load_assets(bus, run, pointer)
    load = policies.load_base if pointer.base_sha256 else policies.load_weights
    weights = await load(bus, run, pointer)
    return {**assets.files, "model.safetensors": weights}


@asynccontextmanager
async def reopened(
    bus: Bus, run: str, recipe: Recipe, checkpoint: Path, device: str = "cpu"
) -> AsyncIterator[Policy]:
    """The policy of a checkpoint for as long as the block runs. Raises UserError."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = await version_0(bus, run)
    with TemporaryDirectory(prefix="actors-model-") as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        try:
            policy = await asyncio.to_thread(Policy.open, folder, recipe, device)
            await asyncio.to_thread(policy.load_checkpoint, checkpoint)
        except LearnerError as error:
            raise UserError(str(error)) from error
        yield policy
