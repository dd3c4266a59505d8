"""What rank 0 says arrives as it was said."""

from dataclasses import fields, replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner import orders
from learner.conversations import Conversation
from learner.samples import Sample
from schemas.images import ImageInput
from schemas.recipe import Learner, Policy, Recipe

TEXTS = st.text(max_size=8)
FLOATS = st.floats(width=32, allow_nan=False)
IMAGES = st.builds(
    ImageInput, places=st.lists(st.integers(0, 6), max_size=2), pixels=st.binary(max_size=2)
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    count = draw(st.integers(0, 6))

    def array(elements: st.SearchStrategy[object], dtype: type) -> np.ndarray:
        return np.array(draw(st.lists(elements, min_size=count, max_size=count)), dtype)

    return Sample(
        trajectory=draw(TEXTS),
        group=draw(TEXTS),
        ids_T=array(st.integers(0, 2**31 - 1), np.int32),
        mask_T=array(st.booleans(), np.bool_),
        logprobs_T=array(FLOATS, np.float32),
        versions_T=array(st.integers(-1, 2**31 - 1), np.int32),
        reward=draw(FLOATS),
        truncated=draw(st.booleans()),
        turn_rewards=tuple(draw(st.lists(FLOATS, max_size=3))),
        images=tuple(draw(st.lists(IMAGES, max_size=2))),
    )


def same(one: object, other: object) -> bool:
    pairs = ((getattr(one, f.name), getattr(other, f.name)) for f in fields(one))  # type: ignore[arg-type]
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in pairs
    )


@given(st.lists(st.lists(samples(), max_size=3), max_size=3), st.integers(1, 10**6))
def test_a_batch(groups: list[list[Sample]], step: int) -> None:
    """To the bit: arrays of the same type, in the same order."""
    found = orders.decode(orders.encode(orders.Train(groups=groups, step=step)))
    assert isinstance(found, orders.Train)
    assert found.step == step
    assert [len(group) for group in found.groups] == [len(group) for group in groups]
    for group, theirs in zip(groups, found.groups, strict=True):
        assert all(same(*pair) for pair in zip(group, theirs, strict=True))


@given(samples())
def test_an_image_travels_once(sample: Sample) -> None:
    """Whoever saw it: a step of two groups of four says no more than its pixels, and is told the same bytes."""
    pixels = [bytes([number]) * 10_000 for number in range(2)]
    images = tuple(ImageInput(places=[number], pixels=pixels[number]) for number in range(2))
    member = replace(sample, images=images)
    blind = orders.encode(orders.Train(groups=[[replace(sample, images=())] * 4] * 2, step=1))
    told = orders.encode(orders.Train(groups=[[member] * 4] * 2, step=1))
    assert 20_000 < len(told) - len(blind) < 22_000
    found = orders.decode(told)
    assert isinstance(found, orders.Train)
    seen = [member.images for group in found.groups for member in group]
    assert seen == [images] * 8
    assert len({id(image.pixels) for images in seen for image in images}) == 2


@given(samples(), FLOATS)
def test_demonstrations(sample: Sample, learning_rate: float) -> None:
    told = Conversation(ids_T=sample.ids_T, mask_T=sample.mask_T)
    order = orders.Teach(conversations=[told], step=3, learning_rate=learning_rate)
    found = orders.decode(orders.encode(order))
    assert isinstance(found, orders.Teach)
    assert same(found.conversations[0], told)
    assert (found.step, found.learning_rate) == (3, learning_rate)


@given(TEXTS, st.lists(TEXTS), st.integers(0, 10**6))
def test_all_others(text: str, moments: list[str], updates: int) -> None:
    recipe = Recipe(policy=Policy(model=text), learner=Learner(ranks=3, zero_stage=2))
    for order in (
        orders.Open(config_json=text, recipe=recipe),
        orders.Restart(),
        orders.Hold(what="teacher", config_json=text),
        orders.GatherState(),
        orders.GatherMoments(),
        orders.Become(moments=moments, updates=updates),
    ):
        assert orders.decode(orders.encode(order)) == order
