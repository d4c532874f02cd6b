"""DeltaNet: linear attention that writes by the delta rule, so that a key's new value takes the place of its old one.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T          beta_t = sigmoid(W_b x_t)
    o_t = RMSNorm(dk^-1/2 S_t^T q_t)

Op: `delta_rule`. Papers: https://arxiv.org/abs/2406.06484, https://arxiv.org/abs/2102.11174
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla.layers._delta import DeltaMixer
from fla.layers._heads import head_dim
from fla.layers._mixer import Call
from fla.ops import chunk_delta_rule, fused_chunk_delta_rule, fused_recurrent_delta_rule


class DeltaNet(DeltaMixer):
    """DeltaNet, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Args:
        mode: form of the op in training and for long inputs: "chunk", "fused_chunk" (the same) or "fused_recurrent".
        d_model: another name of `hidden_size`, which it overrides.
        expand_k, expand_v: widths of all keys and of all values, as factors of `hidden_size`; both widths must be
            multiples of `num_heads`.
        use_beta: whether beta is computed from the token; otherwise it is 1.
        use_gate: whether there is an output gate, with SiLU.
        use_short_conv, conv_size, conv_bias: short convolutions after the projections of q, k and v.
        allow_neg_eigval: double beta, so that a write may reverse what a key holds.
        layer_idx: the layer's place in a model's cache.
        qk_activation: "silu", "relu", "elu" (elu + 1) or "identity", applied to q and k; v has SiLU.
        qk_norm: "l2" divides q and k by their L2 norms, "sum" by their sums.
        norm_eps: what the output norm adds to the mean square.

    Raises ValueError or TypeError, naming the argument. State: `[B, H, dk, dv]` in float32.
    """

    forms: ClassVar = {
        "chunk": chunk_delta_rule,
        "fused_chunk": fused_chunk_delta_rule,
        "fused_recurrent": fused_recurrent_delta_rule,
    }
    tiny: ClassVar[Mapping[str, Any]] = {"num_heads": 2}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gated": {"use_gate": True, "use_short_conv": False, "allow_neg_eigval": True, "expand_v": 0.5},
        "sum": {"qk_activation": "elu", "qk_norm": "sum", "conv_bias": True},
        "relu": {"qk_activation": "relu", "use_short_conv": False, "use_beta": False},
    }

    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
    ) -> None:
        hidden_size = hidden_size if d_model is None else d_model
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f"qk_norm must be 'l2' or 'sum', got {qk_norm!r}")
        head_k_dim = head_dim("expand_k", expand_k, hidden_size, num_heads)
        head_v_dim = head_dim("expand_v", expand_v, hidden_size, num_heads)
        super().__init__(hidden_size, num_heads, None, head_k_dim, head_v_dim, layer_idx, mode)
        self.use_beta, self.allow_neg_eigval, self.qk_norm = use_beta, allow_neg_eigval, qk_norm
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.add_qkv_convs(use_short_conv, conv_size, conv_bias, qk_activation)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.add_output("swish" if use_gate else None, norm_eps)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        if self.qk_norm == "sum":
            # under autocast the sum may have a wider dtype than v
            q, k = (_divided_by_its_sum(y).to(v.dtype) for y in (q, k))
        o = self.recur(call, q, k, v, self._beta(x), use_qk_l2norm_in_kernel=self.qk_norm == "l2")
        return self.norm_and_gate(o, x)

    def _beta(self, x: Tensor) -> Tensor:
        beta = self.b_proj(x).sigmoid() if self.use_beta else x.new_ones(*x.shape[:2], self.num_heads)
        return 2 * beta if self.allow_neg_eigval else beta

    def naive_norm(self, x: Tensor) -> Tensor:
        """What is done to q and to k `[B, T, H, K]` before the op."""
        if self.qk_norm == "l2":
            return super().naive_norm(x)
        total = x.sum(-1, keepdim=True)
        return torch.where(total == 0, torch.zeros_like(x), x / torch.where(total == 0, torch.ones_like(total), total))

    def naive_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """No decay, `[B, T, H, 1]`, and the write strength `[B, T, H]`."""
        beta = self._beta(x)
        return torch.zeros_like(beta)[..., None], beta


def _divided_by_its_sum(x: Tensor) -> Tensor:
    """`x` divided by its sum over the last axis; zeros, as a ReLU may leave them, stay zeros."""
    total = x.sum(-1, keepdim=True)
    return x / total.masked_fill(total == 0, 1)
