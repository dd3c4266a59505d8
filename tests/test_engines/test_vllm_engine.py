"""The vLLM engine against the model itself, in float32; what every engine does is in test_protocol.py.

The model's head is its own here, and new weights are taken between turns; there it is tied, and between tokens.
"""

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from engines.engine import Engine, Sample, SampleRequest
from engines.errors import EngineError

MakeFolder = Callable[..., Path]
OpenVllm = Callable[..., Awaitable[Engine]]

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def engine(make_folder: MakeFolder, open_vllm: OpenVllm) -> Engine:
    return await open_vllm(make_folder("llama"), weight_swap="turn")


@pytest_asyncio.fixture(loop_scope="session")
async def running(make_folder: MakeFolder, open_vllm: OpenVllm) -> Engine:
    """One whose turns go on when new weights come."""
    return await open_vllm(make_folder("endless"))


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def logprobs(model: Any, ids: list[int], sampled: list[int], temperature: float = 1.0) -> Any:
    """What a plain forward pass says of the sampled tokens."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids + sampled])).logits[0, len(ids) - 1 : -1]
    all_logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    return all_logprobs.gather(1, torch.tensor(sampled)[:, None])[:, 0]


def assert_close(actual: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(actual), expected, atol=1e-4, rtol=0)


async def test_logprobs_are_the_models_own(engine: Engine, make_folder: MakeFolder) -> None:
    """Groups of several turns, more than there are slots, some greedy, with shared prompts and kept prefixes."""
    model = model_of(make_folder("llama"))
    rng = random.Random(0)

    async def trajectory(ids: list[int], seed: int) -> None:
        temperature = (0.0, 0.8, 1.0)[seed % 3]
        for turn in range(3):
            sample = await engine.sample(
                SampleRequest(ids=ids, max_tokens=9, seed=seed * 10 + turn, temperature=temperature)
            )
            assert_close(sample.logprobs, logprobs(model, ids, sample.ids, temperature))
            ids = [*ids, *sample.ids, *rng.choices(range(3, 320), k=5)]

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            prompt = rng.choices(range(3, 320), k=40)
            for member in range(4):
                tasks.create_task(trajectory(prompt, member))


async def test_loaded_weights_are_what_samples(engine: Engine, make_folder: MakeFolder) -> None:
    """Also with a head of its own, and for prompts that the old weights have seen."""
    request = SampleRequest(ids=[4, 5, 6] * 12, max_tokens=20)
    await engine.sample(request)
    new = make_folder("llama", 1)
    await engine.load(weights_of(new), 7)
    sample = await engine.sample(request)
    assert sample.versions == [7] * len(sample.ids)
    assert_close(sample.logprobs, logprobs(model_of(new), request.ids, sample.ids))


async def test_tokens_come_as_often_as_they_say(engine: Engine) -> None:
    """Over many seeds each likely token's frequency is its probability, within four standard deviations."""
    requests = [SampleRequest(ids=[4, 5], max_tokens=1, seed=seed) for seed in range(800)]
    samples = await asyncio.gather(*map(engine.sample, requests))
    seen = Counter(sample.ids[0] for sample in samples)
    chances = {sample.ids[0]: torch.tensor(sample.logprobs[0]).exp().item() for sample in samples}
    likely = [token for token in seen if chances[token] > 0.01]
    assert len(likely) > 5
    for token in likely:
        spread = (800 * chances[token] * (1 - chances[token])) ** 0.5
        assert abs(seen[token] - 800 * chances[token]) < 4 * spread


async def test_a_running_turn_goes_on_with_new_weights(
    running: Engine, make_folder: MakeFolder
) -> None:
    """Each token has the version, and the log-probability, of the weights that sampled it."""
    old, new = make_folder("endless"), make_folder("endless", 1)
    await running.load(weights_of(old), 3)
    turn = asyncio.create_task(running.sample(SampleRequest(ids=[4, 5], max_tokens=120, seed=9)))
    await running.sample(SampleRequest(ids=[7], max_tokens=3))  # so the first has begun
    await running.load(weights_of(new), 4)
    sample = await turn
    split = sample.versions.count(3)
    assert 0 < split < 120
    assert sample.versions == [3] * split + [4] * (120 - split)
    assert_close(sample.logprobs[:split], logprobs(model_of(old), [4, 5], sample.ids)[:split])
    assert_close(sample.logprobs[split:], logprobs(model_of(new), [4, 5], sample.ids)[split:])


async def test_a_cut_turn_is_continued_by_new_weights(
    running: Engine, make_folder: MakeFolder
) -> None:
    """What it had is kept as it was sampled, and what follows is the new version's."""
    old, new = make_folder("endless"), make_folder("endless", 1)
    turn = asyncio.create_task(running.sample(SampleRequest(ids=[4, 5], max_tokens=120, seed=9)))
    await running.sample(SampleRequest(ids=[7], max_tokens=3))
    await running.interrupt()
    cut = await turn
    assert cut.finish_reason == "partial"
    assert_close(cut.logprobs, logprobs(model_of(old), [4, 5], cut.ids))
    await running.load(weights_of(new), 1)
    ids = [4, 5, *cut.ids]
    rest = await running.sample(SampleRequest(ids=ids, max_tokens=120 - len(cut.ids), seed=10))
    assert (len(rest.ids), rest.finish_reason) == (120 - len(cut.ids), "length")
    assert rest.versions == [1] * len(rest.ids)
    assert_close(rest.logprobs, logprobs(model_of(new), ids, rest.ids))


async def test_weight_swap_by_turn_waits_for_running_turns(
    engine: Engine, make_folder: MakeFolder
) -> None:
    """With `weight_swap="turn"` no turn has two versions, and turns that come meanwhile wait."""
    first = asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=100, seed=9)))
    await engine.sample(SampleRequest(ids=[7], max_tokens=2))
    swap = asyncio.create_task(engine.load(weights_of(make_folder("llama", 1)), 5))
    sample, _ = await asyncio.gather(first, swap)
    assert set(sample.versions) == {-1}
    later: Sample = await engine.sample(SampleRequest(ids=[4], max_tokens=3))
    assert set(later.versions) == {5}


async def test_a_load_that_is_given_up_harms_nobody(
    running: Engine, make_folder: MakeFolder
) -> None:
    """Tokens have the version of the weights that were taken, and the engine takes the next ones."""
    new = weights_of(make_folder("endless", 1))
    given_up = asyncio.create_task(running.load(new, 1))
    kept = asyncio.create_task(running.load(new, 2))
    await asyncio.sleep(0)
    given_up.cancel()
    await kept
    assert running.policy_version == 2
    assert set((await running.sample(SampleRequest(ids=[4], max_tokens=3))).versions) == {2}


async def test_wrong_weights_are_refused(engine: Engine, make_folder: MakeFolder) -> None:
    """By name, before anything is touched."""
    tensors = load(weights_of(make_folder("llama", 1)))
    del tensors["model.norm.weight"]
    with pytest.raises(EngineError, match=r"bad_weights: missing model\.norm\.weight"):
        await engine.load(save(tensors), 9)
    sample = await engine.sample(SampleRequest(ids=[4], max_tokens=3))
    assert_close(sample.logprobs, logprobs(model_of(make_folder("llama")), [4], sample.ids))


async def test_a_turn_ends_with_an_end_token(engine: Engine) -> None:
    """Which is its last token; the models of this folder say it often."""
    requests = [SampleRequest(ids=[4, seed], max_tokens=120, seed=seed) for seed in range(3, 30)]
    samples = await asyncio.gather(*map(engine.sample, requests))
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    assert ended
    assert all(sample.ids.index(2) == len(sample.ids) - 1 for sample in ended)


async def test_what_vllm_cannot_do_is_refused(engine: Engine) -> None:
    """A token that the model does not have, and a temperature that vLLM takes for another."""
    with pytest.raises(EngineError, match="bad_request"):
        await engine.sample(SampleRequest(ids=[5, 320], max_tokens=4))
    with pytest.raises(EngineError, match="bad_request"):
        await engine.sample(SampleRequest(ids=[5], max_tokens=4, temperature=0.005))


async def test_a_worker_that_is_killed_within_a_load_ends_it(
    open_vllm: OpenVllm, make_folder: MakeFolder
) -> None:
    """And every call after it, by name."""
    before = set(psutil.Process().children(recursive=True))
    engine = await open_vllm(make_folder("llama", 2))
    new = set(psutil.Process().children(recursive=True)) - before
    ours = [
        process for process in new if "EngineCore" in process.name() or "Worker" in process.name()
    ]
    workers = [process for process in ours if "Worker" in process.name()]
    assert len(ours) > len(workers) > 0
    for worker in workers:
        worker.suspend()  # it is asked, and cannot answer
    load = asyncio.create_task(engine.load(weights_of(make_folder("llama", 1)), 7))
    await asyncio.wait([load], timeout=2)
    assert not load.done()
    for worker in workers:
        worker.kill()
    async with asyncio.timeout(60):
        with pytest.raises(EngineError, match=r"engine\.not_loaded"):
            await load
        with pytest.raises(EngineError, match=r"engine\.not_loaded"):
            await engine.load(weights_of(make_folder("llama", 1)), 8)
        with pytest.raises(EngineError):
            await engine.sample(SampleRequest(ids=[4], max_tokens=3))
        await engine.close()
    _, alive = await asyncio.to_thread(psutil.wait_procs, ours, timeout=60)
    assert not alive


async def test_its_processes_die_with_the_replica(engine: Engine, make_folder: MakeFolder) -> None:
    """However it ends: a scheduler that goes on keeps the memory that the next one needs."""
    code = (
        "import sys, time; from pathlib import Path; from engines.vllm_engine import VllmEngine\n"
        "if __name__ == '__main__':\n"
        "    VllmEngine.open(Path(sys.argv[1]), dtype='float32', slots=1, threads=1, context=128)\n"
        "    print('open', flush=True); time.sleep(600)\n"
    )
    script = make_folder("llama") / "replica.py"
    script.write_text(code)
    replica = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        make_folder("llama"),
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
    )
    assert replica.stdout is not None
    while line := await replica.stdout.readline():
        if line == b"open\n":
            break
    ours = psutil.Process(replica.pid).children(recursive=True)
    assert ours
    replica.kill()
    await replica.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, ours, timeout=60)
    assert not alive
