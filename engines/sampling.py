"""From logits to tokens: one draw per row, the same draw wherever and whenever the row is computed.

Shapes: M rows that sample, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z_M: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, figure 17)."""
    z_M = (z_M ^ (z_M >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_M = (z_M ^ (z_M >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_M ^ (z_M >> np.uint64(31))


def stream(seed: int) -> int:
    """The 64-bit stream that belongs to a seed (any integer); neighbouring seeds are unrelated."""
    return int(_mix(np.array([(seed + 1) * _GOLDEN & _MASK], dtype=np.uint64))[0])


def uniforms(
    streams_M: npt.NDArray[np.uint64], positions_M: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """[M] in [0, 1): a function of the stream and of the position that is about to be filled.

    Counter-based, so that a draw does not depend on what else is in the batch, nor on how many draws came before.
    """
    bits_M = _mix(streams_M + positions_M.astype(np.uint64) * np.uint64(_GOLDEN))
    return (bits_M >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def draw(
    logits_MV: torch.Tensor,
    temperatures_M: torch.Tensor,
    uniforms_M: torch.Tensor,
    *,
    greedy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [M] by inverse cumulative distribution, and their log-probabilities [M] in float32.

    The distribution is softmax(logits / temperature); temperature 0 takes the likeliest token and
    reports it under softmax(logits). `greedy`: whether any temperature may be 0.
    """
    greedy_M = temperatures_M == 0
    # A temperature too close to 0 to divide by is as good as the smallest that is not.
    scale_M = torch.where(greedy_M, 1.0, temperatures_M.clamp(min=1e-6))
    logprobs_MV = torch.log_softmax(logits_MV.float() / scale_M.unsqueeze(1), dim=-1)
    cumulative_MV = logprobs_MV.exp().cumsum_(dim=-1)
    targets_M1 = uniforms_M.unsqueeze(1) * cumulative_MV[:, -1:]
    # right=True finds the first entry above the target, which a token of probability 0 never is.
    tokens_M1 = torch.searchsorted(cumulative_MV, targets_M1, right=True)
    tokens_M1.clamp_(max=logits_MV.shape[1] - 1)
    if greedy:
        likeliest_M1 = logprobs_MV.argmax(dim=-1, keepdim=True)
        tokens_M1 = torch.where(greedy_M.unsqueeze(1), likeliest_M1, tokens_M1)
    return tokens_M1.squeeze(1), logprobs_MV.gather(1, tokens_M1).squeeze(1)
