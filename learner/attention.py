"""Attention by segment: in a packed row each sees itself and what was before it (see pack.py), and nothing else.

On a GPU and below float32 all segments are one call of the variable-length kernel; elsewhere each is one call of
torch's attention. Neither computes a score that a mask would throw away, but for half of those within a segment.

Shapes: P places of a row, S segments of it, J places seen by its segments, one after another, H heads, G heads of keys
and values, D of a head.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from learner.pack import MicroBatch

NAME = "packed"
"""Of this attention, among those of transformers."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """What the places of a micro-batch see, on the model's device; one object for all layers."""

    lengths: list[int]
    seen_lengths: list[int]
    seen_J: torch.Tensor | None
    """None where every segment sees only itself."""
    masks: list[torch.Tensor | None]
    """For each segment what is added to its scores; None where it sees only itself."""
    edges_S: torch.Tensor
    seen_edges_S: torch.Tensor
    """Where each segment begins, and the end of the last one; of places, and of places seen."""

    @classmethod
    def of(cls, batch: MicroBatch, dtype: torch.dtype, device: torch.device) -> Self:
        """`dtype` is that of the scores."""
        lengths, seen_lengths = batch.lengths_S.tolist(), batch.seen_lengths_S.tolist()
        alone = lengths == seen_lengths
        return cls(
            lengths=lengths,
            seen_lengths=seen_lengths,
            seen_J=None if alone else torch.from_numpy(batch.seen_J).to(device),
            masks=[
                None if own == seen else _mask(own, seen, dtype).to(device)
                for own, seen in zip(lengths, seen_lengths, strict=True)
            ],
            edges_S=_edges(lengths).to(device),
            seen_edges_S=_edges(seen_lengths).to(device),
        )


def _mask(own: int, seen: int, dtype: torch.dtype) -> torch.Tensor:
    """The last of the places seen is the last of the segment's own."""
    hidden = torch.ones(own, seen, dtype=torch.bool).triu(seen - own + 1)
    return torch.zeros(own, seen, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _edges(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def packed_attention(
    module: torch.nn.Module,
    query_1HPD: torch.Tensor,
    key_1GPD: torch.Tensor,
    value_1GPD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Called by the layers of a model with `use_packed_attention`: [1, P, H, D].

    A model that is called without `segments` attends as any other does.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query_1HPD, key_1GPD, value_1GPD, attention_mask, **options
        )
    scale = options.get("scaling")
    # Rotated in float32; with autocast the values are already in the dtype of the products.
    query_1HPD, key_1GPD = query_1HPD.to(value_1GPD.dtype), key_1GPD.to(value_1GPD.dtype)
    key_1GJD, value_1GJD = key_1GPD, value_1GPD
    if segments.seen_J is not None:
        key_1GJD = key_1GPD.index_select(2, segments.seen_J)
        value_1GJD = value_1GPD.index_select(2, segments.seen_J)
    if query_1HPD.is_cuda and query_1HPD.dtype != torch.float32:
        query_PHD, key_JGD, value_JGD = (
            tensor.squeeze(0).transpose(0, 1) for tensor in (query_1HPD, key_1GJD, value_1GJD)
        )
        output_PHD = varlen_attn(
            query_PHD,
            key_JGD,
            value_JGD,
            segments.edges_S,
            segments.seen_edges_S,
            max(segments.lengths),
            max(segments.seen_lengths),
            scale=scale,
            window_size=(-1, 0),  # causal; a segment's end is the end of what it sees
            enable_gqa=True,
        )
        assert isinstance(output_PHD, torch.Tensor)
        return output_PHD.unsqueeze(0), None
    parts = [
        scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        ).transpose(1, 2)
        for query, key, value, mask in zip(
            torch.split(query_1HPD, segments.lengths, 2),
            torch.split(key_1GJD, segments.seen_lengths, 2),
            torch.split(value_1GJD, segments.seen_lengths, 2),
            segments.masks,
            strict=True,
        )
    ]
    return torch.cat(parts, 1), None


AttentionInterface.register(NAME, packed_attention)


def use_packed_attention(model: Any) -> None:
    """Let the model's layers take `segments`; called as often as one likes."""
    text = model.config.get_text_config()
    if text._attn_implementation != NAME:
        # a vision tower keeps its own
        model.set_attn_implementation(NAME if text is model.config else {"text_config": NAME})
