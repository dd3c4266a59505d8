"""What runs within vLLM's worker processes. vLLM imports this module there by its name."""

import multiprocessing
import os
import select
import signal
from contextlib import suppress
from threading import Thread
from typing import Any

from safetensors.torch import load_file
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

OWNER_VARIABLE = "ACTORS_ENGINE_OWNER"
"""The process id of the replica whose engine this is."""


class WeightTaker:
    """vLLM adds its methods to those of its own workers."""

    model_runner: Any

    def take_weights(self, path: str) -> None:
        """Read a safetensors file into the live model."""
        self.model_runner.reload_weights(weights_iterator=iter(load_file(path).items()))
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "cpu_linear"):
            # A tied head multiplies by a packed copy of the embeddings, which `reload_weights` leaves as it was.
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _die_with(owner: int) -> None:
    """End this process, and the scheduler that started it, when the owner has ended: vLLM's scheduler outlives a
    SIGKILL of its front end, and keeps the memory."""
    with suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(owner)], [], [])
    scheduler = multiprocessing.parent_process()
    with suppress(ProcessLookupError):
        if scheduler is not None and scheduler.pid is not None and scheduler.pid != owner:
            os.kill(scheduler.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


# At once, and not with the first weights: to load a model takes long.
if OWNER_VARIABLE in os.environ:
    owner = int(os.environ[OWNER_VARIABLE])
    Thread(target=_die_with, args=(owner,), name="owner", daemon=True).start()
