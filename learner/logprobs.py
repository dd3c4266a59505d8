"""What the policy says of the sampled tokens now.

Shapes: P places of a micro-batch, K sampled tokens of it, H width, V vocabulary, C tokens of a chunk.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from learner.attention import Segments, use_packed_attention
from learner.errors import UnsupportedModel
from learner.images import with_images
from learner.pack import MicroBatch, pack
from learner.samples import BoolArray, IntArray
from schemas.images import ImageInput

_CHUNK_LOGITS = 1 << 26
"""Logits (C * V) that exist at once, 256 MiB in float32; a quarter of it costs the head a third more time."""

_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Between log-probabilities of the same tokens, packed and not. Rounded ones are compared since a GPU has another
attention for them: a token that sees what it should not is further off than by rounding."""


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

    Matrix products are in `dtype` (below float32 by autocast: the weights stay as they are), but for the head, whose
    rounding would be that of the log-probabilities. Logits exist only for sampled tokens; where they would be many, a
    chunk at a time, and again in the backward pass.
    """
    device = model.device
    head = model.get_output_embeddings()
    sources_K, targets_K = (
        torch.from_numpy(array).to(device) for array in (batch.sources_K, batch.targets_K)
    )
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden_PH = hidden_states(model, batch, dtype)
    # index_select, as indexing would be added up in no fixed order by its backward pass.
    hidden_KH = hidden_PH.index_select(0, sources_K).float()
    chunk = max(1, _CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    chunks = zip(torch.split(hidden_KH, chunk), torch.split(targets_K, chunk), strict=True)
    if len(targets_K) <= chunk:
        parts = [_of_tokens(head, *tokens, temperature) for tokens in chunks]
    else:
        parts = [
            checkpoint(
                _of_tokens,
                head,
                *tokens,
                temperature,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for tokens in chunks
        ]
    logprobs_K, entropies_K = (torch.cat(part) for part in zip(*parts, strict=True))
    if not entropy_gradient:
        entropies_K = entropies_K.detach()
    return TokenLogprobs(logprobs_K, entropies_K, hidden_KH.detach())


def hidden_states(model: Any, batch: MicroBatch, dtype: torch.dtype) -> torch.Tensor:
    """The decoder's last hidden states [P, H], each place seeing what the micro-batch says it sees."""
    use_packed_attention(model)
    ids_P, positions_P = (
        torch.from_numpy(array).to(model.device) for array in (batch.ids_P, batch.positions_P)
    )
    tokens = {"input_ids": ids_P.unsqueeze(0)}
    if batch.pixels or batch.unseen:
        tokens = {"inputs_embeds": with_images(model, ids_P, batch).unsqueeze(0)}
    output = model.base_model(
        **tokens,
        position_ids=positions_P.unsqueeze(0),
        segments=Segments.of(batch, dtype, model.device),
        use_cache=False,
    )
    hidden_PH: torch.Tensor = output.last_hidden_state.squeeze(0)
    return hidden_PH


def _of_tokens(
    head: Any, hidden_CH: torch.Tensor, targets_C: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = _Softmax.apply(  # type: ignore[no-untyped-call]
        head(hidden_CH.to(head.weight.dtype)).float(), targets_C, temperature
    )
    return found


class _Softmax(torch.autograd.Function):
    """Of softmax(logits / temperature): the targets' log-probabilities, and the entropies.

        p = softmax(z / temperature)    d log p_t / dz_v = (1[v = t] - p_v) / temperature
        H = -sum(p log p)               dH / dz_v = (-p_v log p_v - p_v H) / temperature

    One function instead of torch's several, which would each write an array of the logits' size.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrites the logits."""
        ctx.set_materialize_grads(False)  # most losses do not use the entropy
        logits_CV.sub_(logits_CV.amax(1, keepdim=True))
        if temperature != 1.0:
            logits_CV.div_(temperature)
        p_CV = logits_CV.exp()
        sums_C1 = p_CV.sum(1, keepdim=True)
        logs_C = sums_C1.log().squeeze(1)
        logprobs_C = logits_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1) - logs_C
        p_CV.div_(sums_C1)
        entropies_C = logs_C - torch.linalg.vecdot(p_CV, logits_CV)
        ctx.save_for_backward(p_CV, targets_C, entropies_C)
        ctx.temperature = temperature
        return logprobs_C, entropies_C

    @staticmethod
    def backward(
        ctx: Any,
        logprobs_gradient_C: torch.Tensor | None,
        entropies_gradient_C: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None, None]:
        p_CV, targets_C, entropies_C = ctx.saved_tensors
        scale_C = torch.zeros_like(entropies_C)
        if logprobs_gradient_C is not None:
            scale_C -= logprobs_gradient_C
        if entropies_gradient_C is not None:
            scale_C -= entropies_gradient_C * entropies_C
        gradient_CV = p_CV * (scale_C / ctx.temperature).unsqueeze(1)
        if entropies_gradient_C is not None:
            weight_C1 = (entropies_gradient_C / ctx.temperature).unsqueeze(1)
            gradient_CV.addcmul_(torch.special.entr(p_CV), weight_C1)
        if logprobs_gradient_C is not None:
            weight_C1 = (logprobs_gradient_C / ctx.temperature).unsqueeze(1)
            gradient_CV.scatter_add_(1, targets_C.unsqueeze(1), weight_C1)
        return gradient_CV, None, None


class _Probe(NamedTuple):
    ids_T: IntArray
    mask_T: BoolArray
    images: tuple[ImageInput, ...] = ()


@torch.no_grad()
def refuse_unless_packable(model: Any, max_tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """Compare two packed sequences that share a prompt with what the model itself says of each, in float32 and `dtype`.

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
    (batch,) = pack([probes], microbatch_tokens=64)
    plain_N = torch.cat([_plain_logprobs(model, probe) for probe in probes])
    plain_K = plain_N[torch.from_numpy(batch.tokens_K).to(model.device)]
    for products in {torch.float32, dtype}:
        packed_K = sampled_logprobs(model, batch, 1.0, products).logprobs_K
        error = (packed_K - plain_K).abs().max().item()
        if not error <= _PROBE_TOLERANCE[products]:
            raise UnsupportedModel(name, f"packed log-probabilities are off by {error:.2g}")


def _plain_logprobs(model: Any, probe: _Probe) -> torch.Tensor:
    ids_T = torch.from_numpy(probe.ids_T).long().to(model.device)
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0].float()
    logprobs_T = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
    sampled_K: torch.Tensor = logprobs_T[torch.from_numpy(probe.mask_T[1:]).to(model.device)]
    return sampled_K
