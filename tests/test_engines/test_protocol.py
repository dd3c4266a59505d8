"""What every engine does: the same tests for each."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from engines.engine import Engine, Sample, SampleRequest
from engines.errors import EngineError
from engines.scripted import ScriptedEngine
from engines.transformers_engine import TransformersEngine

MakeFolder = Callable[..., Path]
LONG = 120

pytestmark = pytest.mark.asyncio(loop_scope="session")  # the one on which vLLM was opened


@pytest_asyncio.fixture(loop_scope="session", params=["transformers", "vllm", "scripted"])
async def engine(
    request: pytest.FixtureRequest,
    make_folder: MakeFolder,
    open_vllm: Callable[..., Awaitable[Engine]],
) -> AsyncIterator[Engine]:
    """An engine that has much to say: the scripted one counts, slowly enough to be interrupted."""
    folder = make_folder("endless")
    made: Engine
    if request.param == "vllm":
        yield await open_vllm(folder)
        return
    if request.param == "scripted":
        made = ScriptedEngine.open(
            folder, lambda _text, seed: f"{seed} " * 200, seconds_per_token=1e-3
        )
    else:
        made = TransformersEngine.open(folder, dtype="float32", slots=4, threads=1, device="cpu")
    yield made
    await made.close()


def consistent(sample: Sample) -> bool:
    return len(sample.ids) == len(sample.logprobs) == len(sample.versions)


async def test_max_tokens_ends_a_turn(engine: Engine) -> None:
    """Exactly that many tokens, each with a log-probability and a version."""
    sample = await engine.sample(SampleRequest(ids=[4, 5], max_tokens=7))
    assert (len(sample.ids), sample.finish_reason) == (7, "length")
    assert consistent(sample)
    assert sample.versions == [engine.policy_version] * 7
    assert all(logprob <= 0 for logprob in sample.logprobs)


async def test_the_seed_decides(engine: Engine) -> None:
    """The same request gives the same tokens, another seed others."""
    requests = [SampleRequest(ids=[4, 5], max_tokens=20, seed=seed) for seed in (1, 1, 2)]
    first, same, other = await asyncio.gather(*map(engine.sample, requests))
    assert first.ids == same.ids
    assert first.ids != other.ids


async def test_a_stop_string_ends_a_turn(engine: Engine, tokenizer: Any) -> None:
    """The token that completes it is the last; stopping changes nothing before it."""
    free = await engine.sample(SampleRequest(ids=[4, 5], max_tokens=20, seed=3))
    texts = [tokenizer.decode(free.ids[: n + 1]) for n in range(20)]
    # Over a token boundary, where no single token completes the string by itself.
    stop = next(text[-3:] for text in texts[4:] if text[-3:].isascii())
    sample = await engine.sample(SampleRequest(ids=[4, 5], max_tokens=20, seed=3, stop=(stop,)))
    length = next(n for n, text in enumerate(texts) if stop in text) + 1
    assert (sample.ids, sample.finish_reason) == (free.ids[:length], "stop")


async def test_a_stop_string_may_have_begun_before_a_cut(engine: Engine, tokenizer: Any) -> None:
    """Wherever in it: the token that completes it is the last one. A string that was whole before the cut is over."""
    begun = tokenizer.encode("so </python", add_special_tokens=False)[-4:]

    def request(seed: int, **fields: Any) -> SampleRequest:
        return SampleRequest(ids=[4, *begun], max_tokens=12, seed=seed, **fields)

    several = await asyncio.gather(*(engine.sample(request(seed)) for seed in range(3, 60)))
    free, seed = next(
        (sample, seed)
        for seed, sample in enumerate(several, start=3)
        if tokenizer.decode(sample.ids[:3]).isascii()  # others are pieces of characters
    )
    for before in range(1, 5):
        after = 4 - before
        stop = tokenizer.decode([*begun[-before:], *free.ids[:after]])
        sample = await engine.sample(request(seed, begun=len(begun), stop=(stop,)))
        ended = (free.ids[:after], "stop") if after else (free.ids, "length")
        assert (sample.ids, sample.finish_reason) == ended
        assert consistent(sample)
        given = await engine.sample(request(seed, stop=(stop,)))
        assert (given.ids, given.finish_reason) == (free.ids, "length")


async def test_interrupt_ends_what_runs_and_what_waits(engine: Engine) -> None:
    """All turns, more than there are slots, return at once with what they have; the next one is untouched."""
    for _ in range(20):  # a quick engine may be done before it is interrupted
        turns = [
            asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=LONG, seed=seed)))
            for seed in range(9)
        ]
        await engine.sample(SampleRequest(ids=[5], max_tokens=2))
        await engine.interrupt()
        samples = await asyncio.gather(*turns)
        assert all(consistent(sample) for sample in samples)
        cut = [sample for sample in samples if sample.finish_reason == "partial"]
        if cut:
            break
    assert cut
    assert all(len(sample.ids) < LONG for sample in cut)
    after = await engine.sample(SampleRequest(ids=[4], max_tokens=4))
    assert (len(after.ids), after.finish_reason) == (4, "length")


async def test_a_cut_turn_can_be_continued(engine: Engine) -> None:
    """Its tokens are those of the whole turn, as far as they go."""
    whole = await engine.sample(SampleRequest(ids=[4], max_tokens=40, seed=5))
    running = asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=40, seed=5)))
    await engine.sample(SampleRequest(ids=[5], max_tokens=2))
    await engine.interrupt()
    cut = await running
    assert cut.ids == whole.ids[: len(cut.ids)]


async def test_load_changes_the_version(engine: Engine, make_folder: MakeFolder) -> None:
    """Of the property, and of what is sampled afterwards."""
    assert engine.policy_version == -1
    await engine.load((make_folder("endless", 4) / "model.safetensors").read_bytes(), 12)
    assert engine.policy_version == 12
    sample = await engine.sample(SampleRequest(ids=[4], max_tokens=3))
    assert sample.versions == [12] * len(sample.ids)


@pytest.mark.parametrize("engine", ["transformers", "vllm"], indirect=True)
async def test_loaded_weights_are_what_samples(engine: Engine, make_folder: MakeFolder) -> None:
    """In every layer, and in a head that is tied to the embeddings: a plain forward pass gives the same numbers."""
    folder = make_folder("endless", 4)
    await engine.load((folder / "model.safetensors").read_bytes(), 1)
    sample = await engine.sample(SampleRequest(ids=[4, 5, 6], max_tokens=30, temperature=0.8))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([[4, 5, 6, *sample.ids]])).logits[0, 2:-1]
    expected = torch.log_softmax(logits / 0.8, -1).gather(1, torch.tensor(sample.ids)[:, None])
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected[:, 0], atol=1e-4, rtol=0)


async def test_a_prompt_that_does_not_fit_is_refused(engine: Engine) -> None:
    """Before anything is sampled, with both numbers."""
    too_long = SampleRequest(ids=[4] * ((1 << 20) + 1), max_tokens=3)
    with pytest.raises(EngineError, match="1048578 positions needed"):
        await engine.sample(too_long)


async def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    """There is nothing to continue."""
    with pytest.raises(EngineError, match="bad_request"):
        await engine.sample(SampleRequest(ids=[], max_tokens=3))


async def test_close_ends_what_runs_and_refuses_the_rest(
    engine: Engine, make_folder: MakeFolder
) -> None:
    """Running turns are partial, later ones and weights raise; closing twice is allowed."""
    turn = asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=LONG)))
    await engine.sample(SampleRequest(ids=[5], max_tokens=2))
    await engine.close()
    assert consistent(await turn)
    with pytest.raises(EngineError, match="closed"):
        await engine.sample(SampleRequest(ids=[4], max_tokens=3))
    with pytest.raises(EngineError, match="closed"):
        await engine.load((make_folder("endless", 4) / "model.safetensors").read_bytes(), 1)
    await engine.close()
