"""vLLM in processes of its own, with its front end in ours.

sample() ──► AsyncLLM.generate ──► scheduler and worker: step, step, …
load()   ──► a file ──►   paused between two steps, every worker reads it; keys and values are forgotten

`processed_logprobs` are those that a token was drawn by: after the temperature, under the weights of its step.
"""

import asyncio
import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from engines.engine import Sample, SampleRequest
from engines.errors import EngineError, TooLong
from engines.tokenizer import Vocabulary, open_vocabulary
from engines.turns import Finish, StopStrings, begun_ids
from engines.vllm_worker import OWNER_VARIABLE
from engines.weights import read_weights

_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a replica has threads; a fork would copy their locks
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default all replicas share the first cores
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_ON_CPU = {"TORCH_COMPILE_DISABLE": "1"}
"""The first turn would wait for g++, and the next one of another batch size again."""
_CPU_CACHE_BYTES = 1 << 30
_GPU_SHARE = 0.45
"""Of a GPU's memory: while an evaluation runs there is an engine of its own beside the live one."""
_COLDEST = 0.01
"""vLLM takes any lower temperature for this one."""
_LOOK_S = 1.0
"""While weights are taken, whether vLLM's processes are alive."""
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "partial"}


class VllmEngine:
    """An Engine around vLLM's AsyncLLM."""

    def __init__(
        self,
        llm: AsyncLLM,
        shape: Any,
        vocabulary: Vocabulary,
        *,
        has_weights: bool = True,
        weight_swap: Literal["token", "turn"] = "token",
    ) -> None:
        """`shape`: the transformers model, without memory. `open` makes everything from a folder."""
        self._llm = llm
        self._shape = shape
        self._context = int(llm.model_config.max_model_len)
        self._vocabulary = int(shape.config.vocab_size)
        self._tokenizer = vocabulary.tokenizer
        self._ends = [token for token in vocabulary.end_ids if token < self._vocabulary]
        self._has_weights = has_weights
        self._pause: Literal["keep", "wait"] = "wait" if weight_swap == "turn" else "keep"
        self._policy_version = -1
        self._names = count()
        self._running: set[str] = set()
        self._swapping = asyncio.Lock()
        self._swaps: set[asyncio.Future[None]] = set()
        self._closed = False

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dtype: str,
        slots: int,
        threads: int,
        context: int,
        weight_swap: Literal["token", "turn"] = "token",
    ) -> Self:
        """Read a Hugging Face folder; without weights in it, `load` must bring them first. Takes half a minute.

        `context`: the most tokens that a trajectory has; memory is kept for at least one such.
        Raises EngineError (`unsupported_model`, `not_started`).
        """
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "vision_config"):
            why = 'models that see images need generator.engine = "transformers"'
            raise EngineError("unsupported_model", f"{config.model_type}: {why}")
        models: Any = AutoModelForCausalLM
        with torch.device("meta"):
            shape = models.from_config(config)
        has_weights = any(folder.glob("*.safetensors"))
        most = getattr(config, "max_position_embeddings", None) or context
        on_cpu = current_platform.is_cpu()
        for name, value in (_ENVIRONMENT | (_ON_CPU if on_cpu else {})).items():
            os.environ.setdefault(name, value)
        os.environ |= {OWNER_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
        arguments = AsyncEngineArgs(
            model=str(folder),
            dtype=dtype,
            load_format="auto" if has_weights else "dummy",
            generation_config="vllm",  # sampling is as the request says
            max_model_len=min(context, most),
            max_num_seqs=slots,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            enforce_eager=on_cpu,
            kv_cache_memory_bytes=_CPU_CACHE_BYTES if on_cpu else None,
            gpu_memory_utilization=_GPU_SHARE,
            worker_extension_cls="engines.vllm_worker.WeightTaker",
            disable_log_stats=True,
        )
        try:
            llm = AsyncLLM.from_engine_args(arguments)
        except ValueError as error:
            raise EngineError("unsupported_model", str(error)) from error
        except RuntimeError as error:
            raise EngineError("not_started", str(error)) from error
        vocabulary = open_vocabulary(folder)
        return cls(llm, shape, vocabulary, has_weights=has_weights, weight_swap=weight_swap)

    @property
    def policy_version(self) -> int:
        """The version that the next token will be sampled by; -1 until `load`: a folder does not know its own."""
        return self._policy_version

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn; see Engine."""
        self._check(request)
        name = str(next(self._names))
        prompt = tokens_input(request.ids)
        self._running.add(name)
        try:
            async for output in self._llm.generate(prompt, self._params(request), name):
                completion = output.outputs[0]
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError("decode_failed", f"vLLM: {error.__cause__ or error}") from error
        finally:
            self._running.discard(name)
        if completion.finish_reason not in _FINISH:
            raise EngineError("decode_failed", f"vLLM ended a turn by {completion.finish_reason}")
        return self._stopped(_sample(completion), request)

    async def load(self, weights: bytes, policy_version: int) -> None:
        """Take new weights; see Engine. Raises EngineError: `bad_weights`, naming what does not fit, or `not_loaded`.

        Running turns go on with keys and values that the new weights compute again from the first token.
        """
        await asyncio.to_thread(read_weights, weights, self._shape)
        self._refuse_if_closed()
        # A caller that goes away must not leave the engine paused, or new weights under an old version.
        swap = asyncio.ensure_future(self._swap(weights, policy_version))
        self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        await asyncio.shield(swap)

    async def interrupt(self) -> None:
        """End running and waiting turns now; see Engine."""
        self._refuse_if_closed()
        await self._llm.abort(list(self._running))

    async def close(self) -> None:
        """End vLLM's processes; running turns end as `partial`. May be called again."""
        if self._closed:
            return
        self._closed = True
        await self._llm.abort(list(self._running))
        await asyncio.to_thread(self._llm.shutdown)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineError("closed", "the engine is closed")

    def _check(self, request: SampleRequest) -> None:
        self._refuse_if_closed()
        need = len(request.ids) + 1
        if need > self._context:
            raise TooLong(need, self._context)
        if not request.ids or request.max_tokens < 1:
            raise EngineError("bad_request", "a turn needs a token before it and one to sample")
        if max(request.ids) >= self._vocabulary or min(request.ids) < 0:
            raise EngineError("bad_request", "a token that the model does not have")
        if request.images:
            raise EngineError("bad_request", "images for a model that sees none")
        if 0 < request.temperature < _COLDEST:
            why = f"vLLM has no temperature between 0 and {_COLDEST}"
            raise EngineError("bad_request", f"{why}: {request.temperature}")
        if not self._has_weights:
            raise EngineError("no_weights", "the folder has none and none were loaded")

    def _params(self, request: SampleRequest) -> SamplingParams:
        return SamplingParams(
            max_tokens=min(request.max_tokens, self._context - len(request.ids)),
            temperature=request.temperature,
            seed=request.seed,
            stop=list(request.stop),
            detokenize=bool(request.stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            stop_token_ids=self._ends,
            ignore_eos=True,  # those are all the ends there are
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _stopped(self, sample: Sample, request: SampleRequest) -> Sample:
        """Without what follows a stop string that began before a cut: vLLM looks for one only after the cut."""
        if not (request.stop and request.begun):
            return sample
        stops = StopStrings(self._tokenizer, request.stop)
        length = stops.first_from(begun_ids(request), sample.ids)
        if length is None:
            return sample
        return Sample(
            ids=sample.ids[:length],
            logprobs=sample.logprobs[:length],
            versions=sample.versions[:length],
            finish_reason="stop",
        )

    async def _swap(self, weights: bytes, policy_version: int) -> None:
        async with self._swapping:
            with tempfile.TemporaryDirectory(prefix="actors-weights-") as folder:
                path = Path(folder, "policy.safetensors")
                await asyncio.to_thread(path.write_bytes, weights)
                taking = asyncio.create_task(self._take(path, policy_version))
                while not (await asyncio.wait([taking], timeout=_LOOK_S))[0]:
                    if self._llm.errored:  # who waits for its answer is not told
                        taking.cancel()
                        raise EngineError("not_loaded", "vLLM's processes have ended")
                if error := taking.exception():  # a call of its processes raises just any
                    raise EngineError("not_loaded", f"vLLM: {error}") from error

    async def _take(self, path: Path, policy_version: int) -> None:
        await self._llm.pause_generation(mode=self._pause, clear_cache=True)
        await self._llm.collective_rpc("take_weights", args=(str(path),))
        await self._llm.update_weight_version(str(policy_version))
        self._policy_version = policy_version
        self._has_weights = True
        await self._llm.resume_generation()


def _sample(completion: Any) -> Sample:
    ids = list(completion.token_ids)
    places = completion.logprobs or []
    spans = completion.weight_versions or []
    return Sample(
        ids=ids,
        logprobs=[place[token].logprob for token, place in zip(ids, places, strict=True)],
        versions=[_version(span.version) for span in spans for _ in range(span.start, span.end)],
        finish_reason=_FINISH[completion.finish_reason],
    )


def _version(name: str) -> int:
    """What `load` called it; vLLM's own name is that of the folder's weights."""
    return -1 if name == "default" else int(name)
