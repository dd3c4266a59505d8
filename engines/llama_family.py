"""The forward pass of Llama and its relatives without a framework's overhead of many small calls.

With a small model that overhead is most of a step. The parameters are the module's own: query, key and value
projections (and the gate and up projections) become views of one matrix, so that loading weights into the
module loads them here, and nothing is stored twice. PolicyModel compares the result with the module's own.

Shapes: N tokens of a step, M of them whose logits are wanted, C hidden width, H heads, K key-value heads,
D head width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from engines.slots import Step

_FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


class _Norm:
    """Root mean square normalisation (Zhang and Sennrich 2019)."""

    def __init__(self, module: Any) -> None:
        self._weight = module.weight
        self._shape = tuple(module.weight.shape)
        self._epsilon = module.variance_epsilon

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, self._shape, self._weight, self._epsilon)


class _Linears:
    """Linear layers of one input, as one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, *modules: nn.Linear) -> None:
        if len(modules) == 1:
            self.weight, self.bias = modules[0].weight, modules[0].bias
            return
        self.weight = torch.cat([module.weight.data for module in modules])
        self.bias = None
        if modules[0].bias is not None:
            self.bias = torch.cat([module.bias.data for module in modules])
        first = 0
        for module in modules:
            end = first + module.out_features
            module.weight.data = self.weight[first:end]
            if self.bias is not None:
                module.bias.data = self.bias[first:end]
            first = end

    def __call__(self, hidden_NC: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_NC, self.weight, self.bias)


class _Layer:
    """One decoder layer: attention, then the gated feed-forward network."""

    def __init__(self, module: Any) -> None:
        attention, network = module.self_attn, module.mlp
        self._index = int(attention.layer_idx)
        self._scaling = float(attention.scaling)
        self._width = width = int(attention.head_dim)
        self._heads = attention.q_proj.out_features // width
        self._key_heads = attention.k_proj.out_features // width
        self._before_attention = _Norm(module.input_layernorm)
        self._project = _Linears(attention.q_proj, attention.k_proj, attention.v_proj)
        self._head_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = _Norm(attention.q_norm), _Norm(attention.k_norm)
        self._out = _Linears(attention.o_proj)
        self._before_network = _Norm(module.post_attention_layernorm)
        self._gate_up = _Linears(network.gate_proj, network.up_proj)
        self._activate = network.act_fn
        self._down = _Linears(network.down_proj)

    def __call__(
        self, hidden_NC: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """Rotary positions (Su et al. 2021): `sin_N1D` has its first half negated."""
        heads = self._project(self._before_attention(hidden_NC)).view(
            len(hidden_NC), -1, self._width
        )
        turned, value_NKD = heads[:, : -self._key_heads], heads[:, -self._key_heads :]
        if self._head_norms:
            normed_NHD = self._head_norms[0](turned[:, : self._heads])
            normed_NKD = self._head_norms[1](turned[:, self._heads :])
            turned = torch.cat([normed_NHD, normed_NKD], 1)
        turned = torch.addcmul(turned * cos_N1D, turned.roll(self._width // 2, -1), sin_N1D)
        query_NHD, key_NKD = turned[:, : self._heads], turned[:, self._heads :]
        mixed_NHD = step.attend(self._index, query_NHD, key_NKD, value_NKD, self._scaling)
        hidden_NC = hidden_NC + self._out(mixed_NHD.flatten(1))
        gate, up = self._gate_up(self._before_network(hidden_NC)).chunk(2, dim=1)
        return hidden_NC + self._down(self._activate(gate).mul_(up))


class LlamaFamily:
    """A whole model of the family."""

    def __init__(self, module: Any) -> None:
        """`module`: a transformers model that `is_llama_family`; its projections are merged."""
        self._embed = module.model.embed_tokens
        self._rotary = module.model.rotary_emb
        self._layers = [_Layer(layer) for layer in module.model.layers]
        self._norm = _Norm(module.model.norm)
        self._head = module.lm_head

    def forward(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, wanted_M: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """Logits [M, V]."""
        hidden_NC = self._embed(ids_N)
        cos_1ND, sin_1ND = self._rotary(hidden_NC, positions_N.unsqueeze(0))
        half = cos_1ND.shape[-1] // 2
        cos_N1D, sin_N1D = cos_1ND[0].unsqueeze(1), sin_1ND[0].unsqueeze(1)
        # rotate_half(x) · sin = roll(x) · (-sin, sin): one small operation instead of four.
        sin_N1D = torch.cat([-sin_N1D[..., :half], sin_N1D[..., half:]], -1)
        for layer in self._layers:
            hidden_NC = layer(hidden_NC, cos_N1D, sin_N1D, step)
        logits_MV: torch.Tensor = self._head(self._norm(hidden_NC.index_select(0, wanted_M)))
        return logits_MV


def is_llama_family(module: Any) -> bool:
    """Whether LlamaFamily can run a transformers model."""
    return type(module) in _FAMILY
