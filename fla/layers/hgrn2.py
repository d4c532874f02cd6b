"""HGRN2: gated linear attention whose keys are what its forget gates let in, with gates that a lower bound keeps open.

    a_t = b + (1 - b) sigmoid(W_f x_t)         the forget gate of every key channel; b: the layer's lower bound
    q_t = silu(W_q x_t),  k_t = 1 - a_t,  v_t = W_i x_t
    S_t = diag(a_t) S_{t-1} + k_t v_t^T
    o_t = W_o RMSNorm(dk^-1/2 S_t^T q_t)       the norm is over all heads together

Op: `gla`. Paper: https://arxiv.org/abs/2404.07904
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import naive_conv, split_width
from fla.layers._lower_bounds import bounded_gate
from fla.layers._mixer import Call, TokenMixer
from fla.modules import RMSNorm
from fla.ops import chunk_gla, fused_chunk_gla, fused_recurrent_gla


class HGRN2Attention(TokenMixer):
    """HGRN2, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    A model may hand over a `lower_bound` `[hidden_size]` of the forget gates, with values from 0 to 1. Without one it
    is 0, as it is in a model's first layer.

    Args:
        mode: form of the op in training and for long inputs: "chunk", "fused_chunk" or "fused_recurrent".
        num_heads, expand_ratio: number of heads, and the width dk of each, by which the paper expands the state; their
            product must be `hidden_size`. One of them may be None.
        use_short_conv, conv_size, conv_bias: short convolutions, without activation, after the projections of q, of
            the forget gates and of v.
        elementwise_affine, norm_eps: settings of the output norm.
        layer_idx: the layer's place in a model's cache.

    Raises ValueError or TypeError, naming the argument. State: `[B, H, dk, dk]` in float32.
    """

    forms: ClassVar = {"chunk": chunk_gla, "fused_recurrent": fused_recurrent_gla, "fused_chunk": fused_chunk_gla}
    inputs: ClassVar = {"lower_bound": "D"}
    gate_names = ("f_proj",)
    tiny: ClassVar[Mapping[str, Any]] = {"expand_ratio": 8}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "conv": {"expand_ratio": None, "num_heads": 2, "use_short_conv": True, "conv_bias": True},
    }

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        num_heads: int | None = None,
        expand_ratio: int | None = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        D = hidden_size
        super().__init__(D, layer_idx, mode)
        self.expand_ratio, self.num_heads = split_width(D, expand_ratio, num_heads, "expand_ratio")
        self.use_short_conv = use_short_conv
        self.q_proj = nn.Linear(D, D, bias=False)
        self.f_proj = nn.Linear(D, D, bias=False)
        self.i_proj = nn.Linear(D, D, bias=False)
        if use_short_conv:
            convs = {f"{name}_conv1d": (D, None) for name in ("q", "f", "i")}
            self.add_short_convs(convs, conv_size, conv_bias)
        self.g_norm = RMSNorm(D, elementwise_affine=elementwise_affine, eps=norm_eps)
        self.o_proj = nn.Linear(D, D, bias=False)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, f, v = self.convolve(call, self.q_proj(x), self.f_proj(x), self.i_proj(x))
        k, g = bounded_gate(f, call.extra["lower_bound"])
        # under autocast some activations return a wider dtype
        q, k, v, g = (y.unflatten(-1, (-1, self.expand_ratio)) for y in (F.silu(q).to(v.dtype), k.to(v.dtype), v, g))
        return self.recur(call, q, k, v, g)

    def output(self, o: Tensor) -> Tensor:
        """Concatenate the heads, then the norm and the output projection."""
        return self.o_proj(self.g_norm(o.flatten(2)))

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state: a square matrix per head."""
        return self.hidden_size * self.expand_ratio

    def naive(self, x: Tensor, lower_bound: Tensor) -> Tensor:
        """The formulas at the top for one sequence `[1, T, D]`, in the dtype of `x`."""
        q, f, v = self.q_proj(x), self.f_proj(x), self.i_proj(x)
        if self.use_short_conv:
            q, f, v = (naive_conv(y, getattr(self, f"{name}_conv1d")) for y, name in zip((q, f, v), "qfi", strict=True))
        a = lower_bound + (1 - lower_bound) * f.sigmoid()
        q, k, v, a = (y.unflatten(-1, (-1, self.expand_ratio)) for y in (F.silu(q), 1 - a, v, a))
        state, rows = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
        for t in range(x.shape[1]):
            state = a[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
            rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * self.expand_ratio**-0.5)
        o = torch.stack(rows, 1).flatten(2)
        norm: Any = self.g_norm
        o = o * (o.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return self.o_proj(o if norm.weight is None else o * norm.weight)
