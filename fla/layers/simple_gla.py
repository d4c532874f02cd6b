"""Simple GLA: linear attention with one data-dependent decay per head and token.

    g_t = logsigmoid(W x_t + b) / gate_logit_normalizer          one number per head
    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = RMSNorm(dk^-1/2 q_t^T S_t) * gate_fn(W_g x_t)

Op: `simple_gla`. Papers: https://arxiv.org/abs/2405.21060, https://arxiv.org/abs/2103.02143
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import MultiHeadMixer
from fla.layers._mixer import Call
from fla.modules.activations import get_activation
from fla.ops import chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla, parallel_simple_gla


class SimpleGatedLinearAttention(MultiHeadMixer):
    """Scalar-gated linear attention, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    The arguments are those of `GatedLinearAttention`, and there is always an output gate. `mode` may also be
    "parallel"; calls with a state then take the chunk form. State: `[B, H, dk, dv]` in float32.
    """

    forms: ClassVar = {
        "chunk": chunk_simple_gla,
        "fused_chunk": fused_chunk_simple_gla,
        "fused_recurrent": fused_recurrent_simple_gla,
        "parallel": parallel_simple_gla,
    }

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, layer_idx, mode)
        self.feature_map_fn = None if feature_map is None else get_activation(feature_map, "feature_map")
        self.gate_logit_normalizer = gate_logit_normalizer
        self.add_projections(expand_k, expand_v)
        self.add_output_gate(True)
        self.add_qkv_convs(use_short_conv, conv_size, conv_bias)
        self.gk_proj = nn.Linear(hidden_size, num_heads)
        self.add_output(gate_fn, fuse_norm, elementwise_affine, norm_eps)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        g = F.logsigmoid(self.gk_proj(x)) / self.gate_logit_normalizer
        q, k = self.split_heads(q, self.head_k_dim), self.split_heads(k, self.head_k_dim, grouped=True)
        v = self.split_heads(v, self.head_v_dim, grouped=True)
        return self.norm_and_gate(self.recur(call, q, k, v, g), x)
