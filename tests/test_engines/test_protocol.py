"""What every engine does: the same tests for each."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from engines.engine import Engine, Sample, SampleRequest
from engines.errors import EngineError
from engines.scripted import ScriptedEngine
from engines.transformers_engine import TransformersEngine

MakeFolder = Callable[..., Path]
LONG = 120


@pytest.fixture(params=["transformers", "scripted"])
async def engine(request: pytest.FixtureRequest, make_folder: MakeFolder) -> AsyncIterator[Engine]:
    """An engine that has much to say: the scripted one counts, slowly enough to be interrupted."""
    folder = make_folder("endless")
    made: Engine
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
    """The same request gives the same turn, another seed another one."""
    requests = [SampleRequest(ids=[4, 5], max_tokens=20, seed=seed) for seed in (1, 1, 2)]
    first, same, other = await asyncio.gather(*map(engine.sample, requests))
    assert first == same
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


async def test_interrupt_ends_what_runs_and_what_waits(engine: Engine) -> None:
    """All turns, more than there are slots, return at once with what they have; the next one is untouched."""
    turns = [
        asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=LONG, seed=seed)))
        for seed in range(9)
    ]
    await engine.sample(SampleRequest(ids=[5], max_tokens=2))
    await engine.interrupt()
    samples = await asyncio.gather(*turns)
    assert all(consistent(sample) for sample in samples)
    cut = [sample for sample in samples if sample.finish_reason == "partial"]
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


async def test_close_ends_what_runs_and_refuses_the_rest(engine: Engine) -> None:
    """Running turns are partial, later ones raise; closing twice is allowed."""
    turn = asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=LONG)))
    await engine.sample(SampleRequest(ids=[5], max_tokens=2))
    await engine.close()
    assert consistent(await turn)
    with pytest.raises(EngineError, match="closed"):
        await engine.sample(SampleRequest(ids=[4], max_tokens=3))
    await engine.close()


async def test_a_prompt_that_does_not_fit_is_refused(engine: Engine) -> None:
    """Before anything is sampled, with both numbers."""
    too_long = SampleRequest(ids=[4] * ((1 << 20) + 1), max_tokens=3)
    with pytest.raises(EngineError, match="1048578 positions needed"):
        await engine.sample(too_long)


async def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    """There is nothing to continue."""
    with pytest.raises(EngineError, match="bad_request"):
        await engine.sample(SampleRequest(ids=[], max_tokens=3))
