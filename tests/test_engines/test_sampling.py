"""The sampler draws from softmax(logits / temperature), and only its stream and position decide."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.sampling import draw, stream, uniforms

LOGITS = [0.5, -1.0, 2.0, float("-inf"), 0.0, 1.0]


def draw_many(count: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    streams = np.array([stream(seed) for seed in range(count)], dtype=np.uint64)
    positions = np.arange(count) % 7
    return draw(
        torch.tensor(LOGITS).expand(count, -1),
        torch.full((count,), temperature),
        torch.from_numpy(uniforms(streams, positions)),
    )


def test_frequencies_are_the_probabilities() -> None:
    """Chi-square of 20 000 draws over neighbouring seeds: 4 degrees of freedom, 0.1 % point 18.5."""
    count, temperature = 20_000, 0.7
    tokens, logprobs = draw_many(count, temperature)
    expected = torch.softmax(torch.tensor(LOGITS) / temperature, -1)
    observed = torch.bincount(tokens, minlength=len(LOGITS))
    assert observed[3] == 0
    possible = expected > 0
    chi_square = ((observed - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert chi_square < 18.5
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_temperature_0_takes_the_likeliest() -> None:
    """And reports it under softmax(logits)."""
    tokens, logprobs = draw_many(10, 0.0)
    assert tokens.tolist() == [2] * 10
    torch.testing.assert_close(logprobs, torch.log_softmax(torch.tensor(LOGITS), -1)[tokens])


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_a_uniform_is_in_range_and_independent_of_its_batch(seed: int, position: int) -> None:
    """Any seed, any position: in [0, 1), the same alone as among others."""
    streams = np.array([stream(seed), stream(seed + 1), stream(seed)], dtype=np.uint64)
    positions = np.array([position, position, position + 1])
    together = uniforms(streams, positions)
    assert ((together >= 0) & (together < 1)).all()
    assert uniforms(streams[:1], positions[:1])[0] == together[0]


@given(st.integers(1, 400), st.floats(0.0, 2.0), st.integers(0, 1000))
def test_the_drawn_token_is_possible(vocabulary: int, temperature: float, seed: int) -> None:
    """Its log-probability is finite, even at the ends of the unit interval and with most tokens impossible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * 20
    logits[:, 1:][torch.rand(3, vocabulary - 1, generator=generator) < 0.9] = float("-inf")
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    _, logprobs = draw(logits, torch.full((3,), temperature), ends)
    assert logprobs.isfinite().all()
