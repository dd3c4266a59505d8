"""What the policy says of the sampled tokens now.

`hidden_states` is the seam for other attention kernels: a packed row is one call of the model's decoder.

Shapes: R rows, L places, K sampled tokens of a micro-batch, H width, V vocabulary, C tokens of a chunk.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from learner.errors import UnsupportedModel
from learner.pack import MicroBatch, pack
from learner.samples import BoolArray, IntArray

_CHUNK_LOGITS = 1 << 24
"""Logits (C * V) that exist at once, 64 MiB in float32."""

_PROBE_TOLERANCE = 1e-3
"""Between float32 log-probabilities of the same tokens, packed and not."""


class TokenLogprobs(NamedTuple):
    """Of each sampled token, in float32."""

    logprobs_K: torch.Tensor
    """Under softmax(logits / temperature); has the gradient."""
    entropies_K: torch.Tensor
    """Of the whole distribution, in nats; with gradient only when asked for."""
    hidden_KH: torch.Tensor
    """The decoder's last hidden states where the tokens were predicted; detached."""


def sampled_logprobs(
    model: Any,
    batch: MicroBatch,
    temperature: float,
    dtype: torch.dtype,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """Recompute the log-probabilities of a micro-batch's sampled tokens with a Hugging Face causal model.

    Matrix products are in `dtype` (below float32 by autocast: the weights stay as they are), the softmax in
    float32. Logits exist only for sampled tokens; where they would be many, a chunk at a time, and again in the
    backward pass.
    """
    device = model.device
    head = model.get_output_embeddings()
    sources_K, targets_K = (
        torch.from_numpy(array).to(device) for array in (batch.sources_K, batch.targets_K)
    )
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden_RLH = hidden_states(model, batch, dtype)
        # index_select, as indexing would be added up in no fixed order by its backward pass.
        hidden_KH = hidden_RLH.flatten(0, 1).index_select(0, sources_K)
        chunk = max(1, _CHUNK_LOGITS // head.weight.shape[0])
        if len(targets_K) <= chunk:
            found = _of_tokens(head, hidden_KH, targets_K, temperature, entropy_gradient)
            return TokenLogprobs(*found, hidden_KH.detach())
        parts = [
            checkpoint(
                _of_tokens,
                head,
                hidden_CH,
                targets_C,
                temperature,
                entropy_gradient,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for hidden_CH, targets_C in zip(
                torch.split(hidden_KH, chunk), torch.split(targets_K, chunk), strict=True
            )
        ]
    logprobs, entropies = zip(*parts, strict=True)
    return TokenLogprobs(torch.cat(logprobs), torch.cat(entropies), hidden_KH.detach())


def hidden_states(model: Any, batch: MicroBatch, dtype: torch.dtype) -> torch.Tensor:
    """The decoder's last hidden states [R, L, H], each place seeing what the micro-batch says it sees."""
    device = model.device
    attend_RLL = torch.from_numpy(batch.attend_RLL).to(device)
    # Added to attention scores; a boolean one would be converted again in every layer.
    bias_RLL = torch.zeros(attend_RLL.shape, dtype=dtype, device=device)
    bias_RLL.masked_fill_(~attend_RLL, torch.finfo(dtype).min)
    output = model.base_model(
        input_ids=torch.from_numpy(batch.ids_RL).to(device),
        position_ids=torch.from_numpy(batch.positions_RL).to(device),
        attention_mask=bias_RLL.unsqueeze(1),
        use_cache=False,
    )
    hidden_RLH: torch.Tensor = output.last_hidden_state
    return hidden_RLH


def _of_tokens(
    head: torch.nn.Module,
    hidden_CH: torch.Tensor,
    targets_C: torch.Tensor,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_CV = torch.log_softmax(head(hidden_CH).float() / temperature, dim=-1)
    logprobs_C = logprobs_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return logprobs_C, entropies_C


class _Probe(NamedTuple):
    ids_T: IntArray
    mask_T: BoolArray


@torch.no_grad()
def refuse_unless_packable(model: Any, max_tokens: int) -> None:
    """Compare two packed sequences that share a prompt with what the model itself says of each.

    Raises UnsupportedModel: state space layers mix neighbours in a row, some models change their logits after
    the head, and a sliding window shorter than `max_tokens` would not be kept.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(name, f"layers of kind {min(unknown)}")
    if "sliding_attention" in kinds and window is not None and window < max_tokens:
        raise UnsupportedModel(name, f"its window of {window} tokens is below {max_tokens}")
    ids = (np.arange(12, dtype=np.int32) * 7 + 3) % config.vocab_size
    probes = [
        _Probe(probe_ids, np.arange(len(probe_ids)) >= 4)
        for probe_ids in (ids, np.concatenate([ids[:4], ids[6:11]]))
    ]
    (batch,) = pack([probes], microbatch_tokens=64, row_tokens=64)
    packed_K = sampled_logprobs(model, batch, 1.0, torch.float32).logprobs_K
    plain_K = torch.cat([_plain_logprobs(model, probe) for probe in probes])
    error = (
        (packed_K - plain_K[torch.from_numpy(batch.tokens_K).to(model.device)]).abs().max().item()
    )
    if not error <= _PROBE_TOLERANCE:
        raise UnsupportedModel(name, f"packed log-probabilities are off by {error:.2g}")


def _plain_logprobs(model: Any, probe: _Probe) -> torch.Tensor:
    ids_T = torch.from_numpy(probe.ids_T).long().to(model.device)
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0].float()
    logprobs_T = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
    sampled_K: torch.Tensor = logprobs_T[torch.from_numpy(probe.mask_T[1:]).to(model.device)]
    return sampled_K
