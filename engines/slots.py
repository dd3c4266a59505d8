"""The key-value cache: one row per running turn, each with its own length; and attention over it.

All tokens of a step, of decoding and of joining rows, go through the model packed into one sequence of N
tokens, as in vLLM's transformers backend: layers that act on single tokens never see padding, and `attend`,
which the model calls instead of its own attention, takes the rows apart.

Shapes: A layers, S rows, T positions, K key-value heads, D head width; N tokens of a step;
B rows of a block, L tokens of its longest row, H heads, G = H / K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from engines.errors import EngineError

ATTENTION = "agentic_actors_slots"
"""The name under which transformers knows `attend`."""

_POSITIONS_STEP = 64


class Slots:
    """Keys and values of every running row; grows as needed, rows first to last without holes."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        """Nothing is allocated yet. `shape` is (layers, key-value heads, head width)."""
        self.layers, self.heads, self.width = shape
        self._cache_A2STKD = torch.empty(
            (self.layers, 2, 0, 0, self.heads, self.width), dtype=dtype, device=device
        )

    @property
    def positions(self) -> int:
        """T: how many positions a row can hold now."""
        return self._cache_A2STKD.shape[3]

    @property
    def nbytes(self) -> int:
        """What is allocated."""
        return self._cache_A2STKD.nbytes

    def layer(self, index: int) -> torch.Tensor:
        """[2, S, T, K, D], keys first."""
        return self._cache_A2STKD[index]

    def reserve(self, rows: int, positions: int, most_rows: int) -> None:
        """Make room; what is cached stays. Geometric, so that growing costs little in total."""
        have_rows, have_positions = self._cache_A2STKD.shape[2:4]
        if rows <= have_rows and positions <= have_positions:
            return
        if rows > have_rows:
            rows = max(rows, min(2 * have_rows, most_rows))
        if positions > have_positions:
            positions = max(positions, have_positions * 3 // 2)
            positions = -(-positions // _POSITIONS_STEP) * _POSITIONS_STEP
        old = self._cache_A2STKD
        # Zeros, since a masked key must still be a number: 0 · NaN would spoil its row.
        new = old.new_zeros(
            (
                *old.shape[:2],
                max(rows, have_rows),
                max(positions, have_positions),
                *old.shape[4:],
            )
        )
        new[:, :, :have_rows, :have_positions] = old
        self._cache_A2STKD = new

    def release(self) -> None:
        """Free the memory; no row may be running."""
        self._cache_A2STKD = self._cache_A2STKD[:, :, :0, :0].clone()

    def copy_rows(self, sources: list[int], targets: list[int], positions: int) -> None:
        """Copy the first positions of rows; no target may be a source."""
        cache = self._cache_A2STKD
        for source, target in zip(sources, targets, strict=True):  # much faster than indexing
            cache[:, :, target, :positions] = cache[:, :, source, :positions]

    def read(self, row: int, positions: int) -> torch.Tensor:
        """A copy of a row's first positions, [A, 2, positions, K, D]."""
        return self._cache_A2STKD[:, :, row, :positions].clone()

    def write(self, row: int, prefix: torch.Tensor) -> None:
        """Put back what `read` gave, or its first positions."""
        self._cache_A2STKD[:, :, row, : prefix.shape[2]] = prefix


class Block:
    """Neighbouring rows whose queries attend together, padded to the longest."""

    def __init__(self, rows: slice, lengths: list[int], positions_n: torch.Tensor, span: int):
        """`positions_n`: where the rows' tokens stand, row after row; `span`: the highest + 1."""
        self.rows = rows
        self.tokens = len(positions_n)
        self.longest = max(lengths)
        self.span = span
        self._packed: torch.Tensor | None = None  # [tokens] the place of each token in B · L
        self._padded: torch.Tensor | None = None  # [B · L] the token at each place; 0 where none is
        device = positions_n.device
        if min(lengths) == self.longest:
            positions_BL = positions_n.view(len(lengths), self.longest)
        else:
            order_L = torch.arange(self.longest, device=device)
            valid_BL = order_L < torch.tensor(lengths, device=device).unsqueeze(1)
            self._packed = valid_BL.flatten().nonzero().squeeze(1)
            self._padded = positions_n.new_zeros(valid_BL.numel())
            self._padded[self._packed] = torch.arange(self.tokens, device=device)
            positions_BL = positions_n.new_zeros(valid_BL.shape)  # padding sees position 0
            positions_BL[valid_BL] = positions_n
        self._hidden_BLT = torch.arange(span, device=device) > positions_BL.unsqueeze(2)
        self._mask_B1QT: torch.Tensor | None = None

    def _mask(self, group: int, dtype: torch.dtype) -> torch.Tensor:
        """What each query may not see, as -inf; the same in all layers of a step."""
        if self._mask_B1QT is None:
            hidden_BLT = self._hidden_BLT
            if self.longest > 1:  # with one query per row, G broadcasts
                hidden_BLT = hidden_BLT.repeat_interleave(group, dim=1)
            zeros_BLT = torch.zeros(hidden_BLT.shape, dtype=dtype, device=hidden_BLT.device)
            self._mask_B1QT = zeros_BLT.masked_fill_(hidden_BLT, float("-inf")).unsqueeze(1)
        return self._mask_B1QT

    def attend(
        self, query_nHD: torch.Tensor, cache_2STKD: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Attention of the block's tokens, [tokens, H, D]."""
        heads, width = query_nHD.shape[1:]
        key_heads = cache_2STKD.shape[3]
        group = heads // key_heads
        if self._padded is not None:
            query_nHD = query_nHD.index_select(0, self._padded)
        # The G heads that share a key-value head become G queries of it: nothing is repeated.
        shape = (-1, self.longest, key_heads, group, width)
        query_BKQD = query_nHD.reshape(shape).transpose(1, 2).flatten(2, 3)
        keys_BKTD, values_BKTD = cache_2STKD[:, self.rows, : self.span].transpose(2, 3)
        mask_B1QT = self._mask(group, query_BKQD.dtype)
        out_BKQD = F.scaled_dot_product_attention(
            query_BKQD, keys_BKTD, values_BKTD, attn_mask=mask_B1QT, scale=scaling
        )
        out_BLKGD = out_BKQD.view(-1, key_heads, self.longest, group, width).transpose(1, 2)
        out_nHD = out_BLKGD.reshape(-1, heads, width)
        return out_nHD if self._packed is None else out_nHD.index_select(0, self._packed)


class Step:
    """Where the N tokens of one forward pass belong."""

    def __init__(self, slots: Slots, places_N: torch.Tensor, blocks: list[Block]):
        """`places_N` = row · T + position; the blocks' tokens follow one another."""
        self.calls = 0
        """Layers that have attended."""
        self._slots = slots
        self._places_N = places_N
        self._blocks = blocks

    def attend(
        self,
        layer: int,
        query_NHD: torch.Tensor,
        key_NKD: torch.Tensor,
        value_NKD: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Store a layer's new keys and values, and attend: [N, H, D]."""
        cache_2STKD = self._slots.layer(layer)
        places_2PX = cache_2STKD.flatten(1, 2).flatten(2)
        places_2PX[0].index_copy_(0, self._places_N, key_NKD.flatten(1))
        places_2PX[1].index_copy_(0, self._places_N, value_NKD.flatten(1))
        self.calls += 1
        if len(self._blocks) == 1:
            return self._blocks[0].attend(query_NHD, cache_2STKD, scaling)
        mixed, first = [], 0
        for block in self._blocks:
            end = first + block.tokens
            mixed.append(block.attend(query_NHD[first:end], cache_2STKD, scaling))
            first = end
        return torch.cat(mixed)


_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (transformers' signature; ours is in the step)
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls instead of its own attention: [1, heads, N, D] each → [1, N, H, D].

    Raises EngineError for a kind of attention that this is not.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise EngineError("unsupported_model", f"{type(module).__name__} attends with {name}")
    step: Step = kwargs["slot_step"]
    query_NHD, key_NKD, value_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    mixed_NHD = step.attend(module.layer_idx, query_NHD, key_NKD, value_NKD, kwargs.get("scaling"))
    return mixed_NHD.unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend)
