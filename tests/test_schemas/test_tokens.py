"""Token facts: packed, concatenated, counted."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.tokens import GIVEN_VERSION, Tokens

INT32 = st.integers(-(2**31), 2**31 - 1)
VERSION = st.integers(0, 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
SAMPLED = st.lists(st.tuples(INT32, FLOAT32, VERSION), max_size=10)
TOKENS = st.from_type(Tokens)


@given(TOKENS, TOKENS, TOKENS)
def test_concatenation_is_associative(a: Tokens, b: Tokens, c: Tokens) -> None:
    """However a trajectory is cut into turns, its tokens are the same; nothing is neutral."""
    assert (a + b) + c == a + (b + c) == Tokens.join([a, b, c])
    assert a + Tokens() == a == Tokens() + a
    assert Tokens.join([]) == Tokens()
    assert len(a + b) == len(a) + len(b)


@given(st.lists(INT32, max_size=20))
def test_given_tokens_have_no_facts_of_sampling(ids: list[int]) -> None:
    """Mask 0, log-probability 0, version -1."""
    tokens = Tokens.given(ids)
    assert list(tokens.ids_T) == ids
    assert list(tokens.mask) == [0] * len(ids)
    assert list(tokens.logprobs_T) == [0.0] * len(ids)
    assert list(tokens.versions_T) == [GIVEN_VERSION] * len(ids)
    assert tokens.sampled_count == 0
    assert tokens.oldest_version is None


@given(SAMPLED)
def test_sampled_tokens_keep_the_engine_s_facts(facts: list[tuple[int, float, int]]) -> None:
    """Each token has the log-probability, to the bit of a float32, and the version that it was given."""
    ids, logprobs, versions = ([fact[part] for fact in facts] for part in range(3))
    tokens = Tokens.sampled(ids, logprobs, versions)
    assert list(tokens.ids_T) == ids
    assert list(tokens.mask) == [1] * len(facts)
    assert list(tokens.logprobs_T) == logprobs
    assert list(tokens.versions_T) == versions
    assert tokens.sampled_count == len(facts)
    assert tokens.oldest_version == min(versions, default=None)


@given(st.lists(INT32, max_size=5), SAMPLED)
def test_the_oldest_version_is_of_sampled_tokens(
    given_ids: list[int], facts: list[tuple[int, float, int]]
) -> None:
    """The -1 of given tokens is not a version."""
    ids, logprobs, versions = ([fact[part] for fact in facts] for part in range(3))
    tokens = Tokens.given(given_ids) + Tokens.sampled(ids, logprobs, versions)
    assert tokens.oldest_version == min(versions, default=None)
    assert tokens.sampled_count == len(facts)


def test_the_worked_example_of_the_docstring() -> None:
    """Packed little-endian, whatever machine this is."""
    tokens = Tokens.given([5, 6]) + Tokens.sampled([7], [-0.5], [3])
    assert tokens.ids == struct.pack("<3i", 5, 6, 7)
    assert tokens.mask == b"\0\0\1"
    assert tokens.logprobs == struct.pack("<3f", 0.0, 0.0, -0.5)
    assert tokens.versions == struct.pack("<3i", -1, -1, 3)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
def test_lengths_must_agree(ids: int, logprobs: int, versions: int, mask: int) -> None:
    """Arrays of another length are refused when they are made, so also when they come."""
    parts = {
        "ids": bytes(ids),
        "logprobs": bytes(logprobs),
        "versions": bytes(versions),
        "mask": bytes(mask),
    }
    if ids == logprobs == versions == 4 * mask:
        assert len(Tokens(**parts)) == mask
    else:
        with pytest.raises(ValueError, match=f"not {ids}, {logprobs}, {versions}, {mask}"):
            Tokens(**parts)
