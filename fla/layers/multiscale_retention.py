"""Multi-scale retention (RetNet): the state decays at a fixed rate per head, and q and k have rotary positions.

    S_t = gamma_h S_{t-1} + rope(k_t) v_t^T          gamma_h = 1 - 2^(-5-h) in head h
    o_t = RMSNorm(dk^-1/2 rope(q_t)^T S_t) * gate_fn(W_g x_t)

Op: `retention`. Paper: https://arxiv.org/abs/2307.08621
"""

from typing import ClassVar

from torch import Tensor

from fla.layers._heads import MultiHeadMixer
from fla.layers._mixer import Call
from fla.modules import RotaryEmbedding
from fla.modules.activations import get_activation
from fla.ops import chunk_retention, fused_chunk_retention, fused_recurrent_retention, parallel_retention


class MultiScaleRetention(MultiHeadMixer):
    """Multi-scale retention, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    The arguments are those of `GatedLinearAttention`. `mode` may also be "parallel"; calls with a state then take the
    chunk form. Positions count the tokens of a row, not its padding, and continue from the cache.
    State: `[B, H, dk, dv]` in float32.
    """

    forms: ClassVar = {
        "chunk": chunk_retention,
        "fused_chunk": fused_chunk_retention,
        "parallel": parallel_retention,
        "fused_recurrent": fused_recurrent_retention,
    }
    uses_positions = True

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, layer_idx, mode)
        self.feature_map_fn = None if feature_map is None else get_activation(feature_map, "feature_map")
        self.add_projections(expand_k, expand_v)
        self.add_output_gate(use_output_gate)
        self.add_qkv_convs(use_short_conv, conv_size, conv_bias)
        self.add_output(gate_fn, fuse_norm, elementwise_affine, norm_eps)
        if self.head_k_dim % 2:
            raise ValueError(f"hidden_size * expand_k / num_heads must be even to rotate, got {self.head_k_dim}")
        self.rotary = RotaryEmbedding(dim=self.head_k_dim)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        q, k = (self.split_heads(y, self.head_k_dim) for y in (q, k))
        q, k = self.rotary(
            q, k, seqlen_offset=call.start, cu_seqlens=call.cu_seqlens, max_seqlen=call.seen + call.seq_len
        )
        k = self.split_heads(k.flatten(2), self.head_k_dim, grouped=True)
        v = self.split_heads(v, self.head_v_dim, grouped=True)
        return self.norm_and_gate(self.recur(call, q, k, v), x)
