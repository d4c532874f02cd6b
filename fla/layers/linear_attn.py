"""Linear attention: attention whose scores are inner products of feature maps, so that its state is one matrix.

    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = RMSNorm(scale phi(q_t)^T S_t)

Op: `linear_attn`. Paper: https://arxiv.org/abs/2006.16236
"""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import MultiHeadMixer
from fla.layers._mixer import Call
from fla.modules import RMSNorm
from fla.modules.feature_map import DPFPFeatureMap, HadamardFeatureMap, HedgehogFeatureMap, T2RFeatureMap
from fla.ops import chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn


class EluPlusOne(nn.Module):
    """`elu(x) + 1`, a positive feature map."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


# The first three have weights, which q and k share with `tie_feature_map_qk`.
FEATURE_MAPS: dict[str, Callable[[int], nn.Module]] = {
    "hedgehog": HedgehogFeatureMap,
    "t2r": T2RFeatureMap,
    "elementwise_product": HadamardFeatureMap,
    "dpfp": DPFPFeatureMap,
    "elu": lambda head_dim: EluPlusOne(),
    "relu": lambda head_dim: nn.ReLU(),
    "identity": lambda head_dim: nn.Identity(),
}


class LinearAttention(MultiHeadMixer):
    """Linear attention with a feature map, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Args:
        mode: form of the op in training and for long inputs: "chunk", "fused_chunk" or "fused_recurrent".
        feature_map: "hedgehog", "t2r", "elementwise_product", "dpfp", "elu" (elu + 1), "relu" or "identity".
        tie_feature_map_qk: whether q and k share the weights of the feature map.
        output_norm: "rmsnorm" (per head) or "identity".
        norm_q, norm_k: divide the features of q or k by their sum plus 1e-4.
        do_feature_map_norm: divide the output by `phi(q_t) . sum_{s<=t} phi(k_s)`.

    The other arguments are those of `GatedLinearAttention`. State: `[B, H, features, dv]` in float32; with
    `do_feature_map_norm` a pair of it and the sum of the features of the keys.
    """

    forms: ClassVar = {
        "chunk": chunk_linear_attn,
        "fused_chunk": fused_chunk_linear_attn,
        "fused_recurrent": fused_recurrent_linear_attn,
    }
    config_names: ClassVar = {**MultiHeadMixer.config_names, "do_feature_map_norm": "norm_feature_map"}

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str = "elementwise_product",
        tie_feature_map_qk: bool = False,
        output_norm: str = "rmsnorm",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, layer_idx, mode)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if output_norm not in ("rmsnorm", "identity"):
            raise ValueError(f"output_norm must be 'rmsnorm' or 'identity', got {output_norm!r}")
        self.norm_q, self.norm_k = norm_q, norm_k
        self.do_feature_map_norm = do_feature_map_norm
        self.add_projections(expand_k, expand_v)
        build = FEATURE_MAPS[feature_map]
        self.feature_map_q = build(self.head_k_dim)
        self.feature_map_k = self.feature_map_q if tie_feature_map_qk else build(self.head_k_dim)
        self.norm = (
            RMSNorm(self.head_v_dim, elementwise_affine=elementwise_affine, eps=norm_eps)
            if output_norm == "rmsnorm"
            else nn.Identity()
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        q = self.feature_map_q(self.split_heads(q, self.head_k_dim))
        k = self.feature_map_k(self.split_heads(k, self.head_k_dim))
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        k = self.split_heads(k.flatten(2), k.shape[-1], grouped=True)
        v = self.split_heads(v, self.head_v_dim, grouped=True)
        return self.norm(self.recur(call, q, k, v, normalize=self.do_feature_map_norm))

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state: a features x value matrix per head, and the sum of key features."""
        weight = self.q_proj.weight
        features = self.feature_map_k(weight.new_zeros(1, self.head_k_dim)).shape[-1]
        return self.num_heads * features * (self.head_v_dim + self.do_feature_map_norm)
