"""Texts to vectors, by a real encoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from engines.encoder import open_encoder


def test_a_text_has_one_vector_whatever_is_beside_it(make_folder: Callable[..., Path]) -> None:
    """Rows of length 1, in order; padding and batches change nothing; the same text, the same vector."""
    encode = open_encoder(str(make_folder("qwen3")))
    texts = [f"text {'of some length ' * (n % 3)}{n}" for n in range(40)]
    vectors_NW = encode([*texts, texts[0]])
    assert vectors_NW.shape == (41, 32)
    assert vectors_NW.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors_NW, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors_NW[0], vectors_NW[-1], atol=1e-5)
    for index in (0, 1, 39):
        np.testing.assert_allclose(vectors_NW[index], encode([texts[index]])[0], atol=1e-4)
    assert np.abs(vectors_NW[1] - vectors_NW[2]).max() > 1e-3
