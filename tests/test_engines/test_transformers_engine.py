"""The transformers engine against the model itself, in float32."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from engines.engine import Sample, SampleRequest
from engines.errors import EngineError, TooLong
from engines.transformers_engine import TransformersEngine

MakeFolder = Callable[..., Path]
VOCABULARY = 320
FAMILIES = ["llama", "tied", "qwen2", "qwen3", "gpt2", "gemma", "phi"]
TOLERANCE = 1e-4


def open_engine(folder: Any, **options: Any) -> TransformersEngine:
    settings = {"dtype": "float32", "slots": 7, "threads": 1, "device": "cpu"} | options
    return TransformersEngine.open(folder, **settings)


def reference(model: Any, ids: list[int], sample: Sample, temperature: float) -> torch.Tensor:
    """What a plain forward pass says of the sampled tokens."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids + sample.ids])).logits[0, len(ids) - 1 : -1]
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    return logprobs.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]


def assert_logprobs(model: Any, ids: list[int], sample: Sample, temperature: float = 1.0) -> None:
    expected = reference(model, ids, sample, temperature)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=TOLERANCE, rtol=0)


def random_ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("family", FAMILIES)
async def test_logprobs_are_the_models_own(make_folder: MakeFolder, family: str) -> None:
    """Groups of several turns, more than there are slots, with shared prompts and kept prefixes."""
    folder = make_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = open_engine(folder)
    rng = random.Random(0)

    async def trajectory(name: str, ids: list[int], seed: int) -> None:
        for turn in range(3):
            sample = await engine.sample(
                SampleRequest(
                    ids=ids,
                    max_tokens=rng.randint(1, 9),
                    seed=seed * 10 + turn,
                    temperature=0.8,
                    cache_key=name,
                )
            )
            assert_logprobs(model, ids, sample, 0.8)
            ids = [*ids, *sample.ids, *random_ids(rng, 1, 6)]

    async with asyncio.TaskGroup() as tasks:
        for group in range(3):
            prompt = random_ids(rng, 1, 24)
            for member in range(4):
                tasks.create_task(trajectory(f"{group}-{member}", prompt, member))
    await engine.close()


async def test_late_members_share_what_runs(make_folder: MakeFolder) -> None:
    """A turn that joins while another with the same or a partly equal prompt runs is as exact."""
    folder = make_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = open_engine(folder)
    rng = random.Random(1)
    prompt = random_ids(rng, 40, 40)
    first = asyncio.create_task(engine.sample(SampleRequest(ids=prompt, max_tokens=60)))
    await engine.sample(SampleRequest(ids=[5], max_tokens=2))  # the first is under way
    joined = [prompt, prompt[:30], [*prompt[:20], *random_ids(rng, 9, 9)], [*prompt, 9, 8]]
    samples = await asyncio.gather(
        *(
            engine.sample(SampleRequest(ids=ids, max_tokens=5, seed=7 + n))
            for n, ids in enumerate(joined)
        )
    )
    for ids, sample in zip([prompt, *joined], [await first, *samples], strict=True):
        assert_logprobs(model, ids, sample)
    await engine.close()


async def test_a_changed_history_is_computed_anew(make_folder: MakeFolder) -> None:
    """A key whose next prompt is not a continuation keeps only the common prefix."""
    folder = make_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = open_engine(folder)
    for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 50, 51, 52], [5, 6], [90, 91], [90, 91]):
        request = SampleRequest(ids=ids, max_tokens=6, cache_key="same")
        assert_logprobs(model, ids, await engine.sample(request))
    await engine.close()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
async def test_temperature_0_is_greedy_generation(make_folder: MakeFolder, family: str) -> None:
    """The likeliest tokens, as `generate` finds them; log-probabilities at temperature 1."""
    folder = make_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = open_engine(folder)
    ids = [11, 12, 13, 14]
    sample, _ = await asyncio.gather(
        engine.sample(SampleRequest(ids=ids, max_tokens=20, temperature=0)),
        engine.sample(SampleRequest(ids=[9, 9], max_tokens=20, temperature=1)),
    )
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(ids) :]
    assert sample.ids == generated.tolist()
    assert_logprobs(model, ids, sample)
    await engine.close()


async def test_same_seed_same_tokens_whatever_the_batch(make_folder: MakeFolder) -> None:
    """Alone, or among others that join and leave; another seed gives other tokens."""
    engine = open_engine(make_folder("llama"))
    request = SampleRequest(ids=[4, 5, 6, 7], max_tokens=24, seed=123)
    alone = await engine.sample(request)
    others = [
        SampleRequest(ids=[40 + n, 8, 9][: 1 + n % 3], max_tokens=1 + n, seed=n) for n in range(20)
    ]
    crowd = [*others[:10], request, *others[10:]]
    among = (await asyncio.gather(*map(engine.sample, crowd)))[10]
    assert among.ids == alone.ids
    other = await engine.sample(SampleRequest(ids=[4, 5, 6, 7], max_tokens=24, seed=124))
    assert other.ids != alone.ids
    await engine.close()


async def test_members_of_a_group_differ_by_their_seeds(make_folder: MakeFolder) -> None:
    """One prefill for all, and yet each its own tokens."""
    engine = open_engine(make_folder("llama"))
    samples = await asyncio.gather(
        *(engine.sample(SampleRequest(ids=[4, 5], max_tokens=12, seed=n)) for n in range(8))
    )
    assert len({tuple(sample.ids) for sample in samples}) == 8
    await engine.close()


async def test_weights_change_between_two_tokens(make_folder: MakeFolder) -> None:
    """A running turn goes on: earlier tokens are the old version's; a later turn is all the new one's.

    Later tokens of the running turn come from the new weights over the old keys and values, as a
    forward pass with such a cache gives them.
    """
    folder = make_folder("llama")
    old = AutoModelForCausalLM.from_pretrained(folder)
    new = AutoModelForCausalLM.from_pretrained(make_folder("llama", 1))
    engine = open_engine(folder, slots=3)
    ids = [4, 5, 6]
    for version in range(3, 103, 2):  # a busy machine may load before the turn, or after it
        await engine.load(save(old.state_dict()), version)
        turn = engine.sample(SampleRequest(ids=ids, max_tokens=120, seed=9))
        running = asyncio.create_task(turn)
        await engine.sample(SampleRequest(ids=[7], max_tokens=3))  # so the first has begun
        await engine.load(save(new.state_dict()), version + 1)
        assert engine.policy_version == version + 1
        sample = await running
        split = sample.versions.count(version)
        if 0 < split < len(sample.ids):
            break
    assert sample.versions == [version] * split + [version + 1] * (len(sample.ids) - split)
    assert 0 < split < len(sample.ids)
    with torch.inference_mode():
        tokens = torch.tensor([ids + sample.ids])
        fed = len(ids) + split - 1  # by the old weights; the token after them, by the new ones
        before = old(tokens[:, :fed], use_cache=True)
        after = new(tokens[:, fed:-1], past_key_values=before.past_key_values)
    logits = torch.cat([before.logits[0, len(ids) - 1 :], after.logits[0]])
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=TOLERANCE, rtol=0)
    later = await engine.sample(SampleRequest(ids=ids, max_tokens=5))
    assert later.versions == [version + 1] * len(later.ids)
    assert_logprobs(new, ids, later)
    await engine.close()


async def test_kept_prefixes_do_not_outlive_their_weights(make_folder: MakeFolder) -> None:
    """The next turn of a trajectory after a load is computed by the new weights from its first token."""
    new = AutoModelForCausalLM.from_pretrained(make_folder("tied", 1))
    engine = open_engine(make_folder("tied"))
    ids = [4, 5, 6]
    sample = await engine.sample(SampleRequest(ids=ids, max_tokens=5, cache_key="a"))
    weights = new.state_dict()
    weights.pop("lm_head.weight")  # tied: one name is enough
    await engine.load(save(weights), 1)
    ids = [*ids, *sample.ids, 9]
    assert_logprobs(
        new, ids, await engine.sample(SampleRequest(ids=ids, max_tokens=5, cache_key="a"))
    )
    await engine.close()


async def test_weight_swap_by_turn_waits_for_running_turns(make_folder: MakeFolder) -> None:
    """With `weight_swap="turn"` no turn has two versions, and turns that come meanwhile wait."""
    new = AutoModelForCausalLM.from_pretrained(make_folder("llama", 1))
    engine = open_engine(make_folder("llama"), weight_swap="turn")
    running = asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=100, seed=9)))
    async with asyncio.timeout(60):
        while not (engine._batch.turns or running.done()):  # noqa: ASYNC110 - a thread tells nobody
            await asyncio.sleep(0.001)
    load = asyncio.create_task(engine.load(save(new.state_dict()), 5))
    sample, _ = await asyncio.gather(running, load)
    assert set(sample.versions) == {-1}
    assert set((await engine.sample(SampleRequest(ids=[4], max_tokens=3))).versions) == {5}
    await engine.close()


async def test_a_failing_decode_thread_fails_everyone(make_folder: MakeFolder) -> None:
    """Running, joining, waiting and later requests all raise, and closing still works."""
    engine = open_engine(make_folder("endless"), slots=2)
    requests = [SampleRequest(ids=[5, n], max_tokens=110, seed=n) for n in range(4)]
    turns = [asyncio.create_task(engine.sample(request)) for request in requests]
    await asyncio.sleep(0)
    # Spoils the next forward pass, as a broken kernel would.
    engine._model.module.lm_head.weight.data = torch.zeros(1, 1)
    outcomes = await asyncio.gather(*turns, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineError] * 4
    with pytest.raises(EngineError, match="decode_failed"):
        await engine.sample(SampleRequest(ids=[5], max_tokens=2))
    with pytest.raises(EngineError, match="decode_failed"):
        await engine.interrupt()
    await engine.close()


async def test_an_unknown_token_is_the_callers_error(make_folder: MakeFolder) -> None:
    """It is refused, and nobody else's turn suffers."""
    engine = open_engine(make_folder("llama"))
    running = asyncio.create_task(engine.sample(SampleRequest(ids=[5], max_tokens=20)))
    for token in (VOCABULARY, -1):
        with pytest.raises(EngineError, match="bad_request"):
            await engine.sample(SampleRequest(ids=[5, token], max_tokens=4))
    assert (await running).finish_reason != "partial"
    await engine.close()


async def test_a_caller_that_goes_away_frees_its_slot(make_folder: MakeFolder) -> None:
    """With one slot, the next turn runs at once after the one before it is cancelled."""
    engine = open_engine(make_folder("llama"), slots=1)
    first = asyncio.create_task(engine.sample(SampleRequest(ids=[5], max_tokens=10_000)))
    await asyncio.sleep(0)
    first.cancel()
    sample = await engine.sample(SampleRequest(ids=[6], max_tokens=2))
    assert sample.finish_reason == "length"
    await engine.close()


async def test_a_load_that_is_given_up_harms_nobody(make_folder: MakeFolder) -> None:
    """Whether its weights were taken or not, the engine goes on, and takes the next ones."""
    folder = make_folder("endless")
    weights = (folder / "model.safetensors").read_bytes()
    engine = open_engine(folder, weight_swap="turn")
    running = asyncio.create_task(engine.sample(SampleRequest(ids=[4], max_tokens=100)))
    await engine.sample(SampleRequest(ids=[7], max_tokens=2))  # the first one runs
    given_up = asyncio.create_task(engine.load(weights, 1))
    kept = asyncio.create_task(engine.load(weights, 2))
    given_up.cancel()
    await kept
    assert engine.policy_version == 2
    assert (await running).finish_reason == "length"
    await engine.close()


async def test_the_context_bounds_a_turn(make_folder: MakeFolder) -> None:
    """A turn that fills the model's 128 positions ends by length; a prompt that fills them is refused."""
    engine = open_engine(make_folder("endless"))
    sample = await engine.sample(SampleRequest(ids=[9] * 120, max_tokens=50))
    assert (len(sample.ids), sample.finish_reason) == (8, "length")
    with pytest.raises(TooLong):
        await engine.sample(SampleRequest(ids=[9] * 128, max_tokens=1))
    await engine.close()
