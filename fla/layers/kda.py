"""Kimi Delta Attention (KDA): the delta rule on a state that decays at a data-dependent rate in every key channel.

    g_t = -exp(A_log) softplus(W_f2 W_f1 x_t + dt_bias)                       or, bounded,
    g_t = lower_bound sigmoid(exp(A_log) (W_f2 W_f1 x_t + dt_bias))           beta_t = sigmoid(W_b x_t)
    S' = diag(exp(g_t)) S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T                                  q, k: divided by their L2 norms
    o_t = RMSNorm(dk^-1/2 S_t^T q_t) * sigmoid(W_g2 W_g1 x_t + b)

Op: `kda`. Paper: https://arxiv.org/abs/2510.26692
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._decay import LearnedDecay
from fla.layers._delta import IN_OP, DeltaMixer, head_value_dim
from fla.layers._mixer import Call
from fla.ops import chunk_kda, fused_recurrent_kda


def check_bounded_gate(safe_gate: bool, lower_bound: float | None) -> None:
    """Raise ValueError unless `safe_gate` comes with a `lower_bound` of at least -5."""
    if safe_gate and (lower_bound is None or lower_bound < -5):
        raise ValueError(f"lower_bound must be of at least -5 and below 0 with safe_gate=True, got {lower_bound}")


class KimiDeltaAttention(LearnedDecay, DeltaMixer):
    """Kimi Delta Attention, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Args:
        expand_v: width of a head's values as a factor of `head_dim`; the product must be a whole number.
        head_dim: width of a head's queries and keys.
        num_heads, num_v_heads: heads of queries and keys, and of values, a multiple; by default the same.
        mode: form of the op in training and for long inputs: "chunk" or "fused_recurrent".
        use_short_conv, conv_size, conv_bias: short convolutions after the projections of q, k and v.
        allow_neg_eigval: double beta, so that a write may reverse what a key holds.
        safe_gate: the decay is bounded, by a `lower_bound` of at least -5; all rates begin at 1.
        lower_bound: the lowest log decay of a token, below 0; None: the decay is not bounded.
        layer_idx: the layer's place in a model's cache.
        norm_eps: what the output norm adds to the mean square.

    Raises ValueError or TypeError, naming the argument. State: `[B, HV, dk, dv]` in float32.
    """

    forms: ClassVar = {"chunk": chunk_kda, "fused_recurrent": fused_recurrent_kda}
    gate_names: ClassVar = ("f_proj", "A_log", "dt_bias")
    tiny: ClassVar[Mapping[str, Any]] = {"num_heads": 2, "head_dim": 8}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "grouped": {"num_v_heads": 4, "allow_neg_eigval": True, "conv_bias": True, "expand_v": 0.5},
        "bounded": {"safe_gate": True, "lower_bound": -5.0, "use_short_conv": False, "expand_v": 1.5},
    }

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        check_bounded_gate(safe_gate, lower_bound)
        head_v_dim = head_value_dim(head_dim, expand_v)
        super().__init__(hidden_size, num_heads, num_v_heads, head_dim, head_v_dim, layer_idx, mode)
        self.allow_neg_eigval, self.lower_bound = allow_neg_eigval, lower_bound
        decay_dim = self.num_v_heads * head_dim
        self.add_qkv_convs(use_short_conv, conv_size, conv_bias)
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, head_v_dim, bias=False), nn.Linear(head_v_dim, decay_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.add_decay(self.num_v_heads, decay_dim, rates=(1, 1) if safe_gate else (1, 16))
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, head_v_dim, bias=False), nn.Linear(head_v_dim, self.value_dim)
        )
        self.add_output("sigmoid", norm_eps)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        g = self.f_proj(x).unflatten(-1, (self.num_v_heads, self.head_k_dim))
        decay = {"A_log": self.A_log, "dt_bias": self.dt_bias, "lower_bound": self.lower_bound}
        beta = {"beta": self.b_proj(x), "allow_neg_eigval": self.allow_neg_eigval}
        o = self.recur(call, q, k, v, g, **beta, **decay, **IN_OP)
        return self.norm_and_gate(o, x)

    def naive_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log decay `[B, T, HV, K]` and the write strength `[B, T, HV]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rates = self.A_log.to(wide).exp()[:, None]
        g = (self.f_proj(x).to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.num_v_heads, self.head_k_dim))
        g = -rates * F.softplus(g) if self.lower_bound is None else self.lower_bound * torch.sigmoid(rates * g)
        return g, self.b_proj(x).to(wide).sigmoid() * (1 + self.allow_neg_eigval)
