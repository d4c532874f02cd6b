"""Gated DeltaNet: the delta rule on a state that decays at a data-dependent rate in every head.

    g_t = -exp(A_log) softplus(W_a x_t + dt_bias)          beta_t = sigmoid(W_b x_t)
    S' = exp(g_t) S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T               q, k: divided by their L2 norms
    o_t = RMSNorm(dk^-1/2 S_t^T q_t) * silu(W_g x_t)

Op: `gated_delta_rule`. Paper: https://arxiv.org/abs/2412.06464
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._decay import LearnedDecay
from fla.layers._delta import IN_OP, DeltaMixer, head_value_dim
from fla.layers._mixer import Call
from fla.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


class GatedDeltaNet(LearnedDecay, DeltaMixer):
    """Gated DeltaNet, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    With the output gate the layer has `6 hidden_size^2` weights, as softmax attention has with `4`, if
    `num_heads * head_dim` is `0.75 hidden_size` and `expand_v` is 2.

    Args:
        expand_v: width of a head's values as a factor of `head_dim`; the product must be a whole number.
        head_dim: width of a head's queries and keys.
        num_heads, num_v_heads: heads of queries and keys, and of values, a multiple; by default the same.
        mode: form of the op in training and for long inputs: "chunk" or "fused_recurrent".
        use_gate: whether there is an output gate.
        use_short_conv, conv_size, conv_bias: short convolutions after the projections of q, k and v.
        allow_neg_eigval: double beta, so that a write may reverse what a key holds.
        layer_idx: the layer's place in a model's cache.
        norm_eps: what the output norm adds to the mean square.

    Raises ValueError or TypeError, naming the argument. State: `[B, HV, dk, dv]` in float32.
    """

    forms: ClassVar = {"chunk": chunk_gated_delta_rule, "fused_recurrent": fused_recurrent_gated_delta_rule}
    gate_names: ClassVar = ("a_proj", "A_log", "dt_bias")
    tiny: ClassVar[Mapping[str, Any]] = {"num_heads": 2, "head_dim": 8}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "grouped": {"num_v_heads": 4, "allow_neg_eigval": True, "conv_bias": True},
        "bare": {"use_gate": False, "use_short_conv": False, "expand_v": 1.5},
    }

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        head_v_dim = head_value_dim(head_dim, expand_v)
        super().__init__(hidden_size, num_heads, num_v_heads, head_dim, head_v_dim, layer_idx, mode)
        self.allow_neg_eigval = allow_neg_eigval
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.add_decay(self.num_v_heads, self.num_v_heads, rates=(0, 16))
        self.add_qkv_convs(use_short_conv, conv_size, conv_bias)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.add_output("swish" if use_gate else None, norm_eps)
        self.register_load_state_dict_pre_hook(_drop_unused)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x, call)
        decay = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        beta = {"beta": self.b_proj(x), "allow_neg_eigval": self.allow_neg_eigval}
        o = self.recur(call, q, k, v, self.a_proj(x), **beta, **decay, **IN_OP)
        return self.norm_and_gate(o, x)

    def naive_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log decay `[B, T, HV, 1]` and the write strength `[B, T, HV]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        A_log, dt_bias = self.A_log.to(wide), self.dt_bias.to(wide)
        g = -A_log.exp() * F.softplus(self.a_proj(x).to(wide) + dt_bias)
        return g[..., None], self.b_proj(x).to(wide).sigmoid() * (1 + self.allow_neg_eigval)


def _drop_unused(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop `D`, a weight without effect that checkpoints of the reference's first release have."""
    state_dict.pop(f"{prefix}D", None)
