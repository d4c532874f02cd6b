"""Gated linear attention (GLA): the state decays at a data-dependent rate in every key channel.

    g_t = logsigmoid(W2 W1 x_t + b) / gate_logit_normalizer
    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
    o_t = RMSNorm(dk^-1/2 q_t^T S_t) * gate_fn(W_g x_t)

Op: `gla`. Paper: https://arxiv.org/abs/2312.06635
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import MultiHeadMixer
from fla.layers._mixer import Call, check_positive
from fla.modules.activations import get_activation
from fla.ops import chunk_gla, fused_chunk_gla, fused_recurrent_gla


class GatedLinearAttention(MultiHeadMixer):
    """Gated linear attention (GLA), `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Args:
        mode: form of the op in training and for long inputs: "chunk", "fused_chunk" or "fused_recurrent".
        expand_k, expand_v: widths of all keys and of all values, as factors of `hidden_size`; both widths must be
            multiples of `num_heads`.
        num_kv_heads: heads of keys, values and decay, each shared by `num_heads / num_kv_heads` query heads; by default
            `num_heads`.
        feature_map: name of an activation that is applied to q and k, or None.
        use_short_conv, conv_size, conv_bias: short convolutions after the projections of q, k and v.
        use_output_gate, gate_fn: whether there is an output gate, and its activation.
        elementwise_affine, norm_eps: settings of the output norm.
        fuse_norm: compute a norm and a swish gate in one module, with the same result.
        gate_logit_normalizer: see the formula.
        gate_low_rank_dim: rank of `W2 W1`.
        clamp_min: lower bound of the log decay, or None.
        layer_idx: the layer's place in a model's cache.

    Raises ValueError or TypeError, naming the argument. State: `[B, H, dk, dv]` in float32.
    """

    forms: ClassVar = {"chunk": chunk_gla, "fused_recurrent": fused_recurrent_gla, "fused_chunk": fused_chunk_gla}

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, layer_idx, mode)
        check_positive(gate_low_rank_dim=gate_low_rank_dim)
        self.feature_map_fn = None if feature_map is None else get_activation(feature_map, "feature_map")
        self.gate_logit_normalizer = gate_logit_normalizer
        self.clamp_min = clamp_min
        self.add_projections(expand_k, expand_v)
        self.add_output_gate(use_output_gate)
        self.add_qkv_convs(use_short_conv, conv_size, conv_bias)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False), nn.Linear(gate_low_rank_dim, self.key_dim_per_group)
        )
        self.add_output(gate_fn, fuse_norm, elementwise_affine, norm_eps)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        gk = F.logsigmoid(self.gk_proj(x)) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            gk = gk.clamp(min=self.clamp_min)
        q = self.split_heads(q, self.head_k_dim)
        k, gk = (self.split_heads(y, self.head_k_dim, grouped=True) for y in (k, gk))
        v = self.split_heads(v, self.head_v_dim, grouped=True)
        return self.norm_and_gate(self.recur(call, q, k, v, gk), x)
