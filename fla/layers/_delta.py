"""`DeltaMixer`: the base of token mixers whose state follows the delta rule.

    x -> q, k, v (-> short convolutions) -> SiLU -> heads -> op -> norm (and gate) per head -> output projection

    S' = diag(exp(g_t)) S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    o_t = dk^-1/2 S_t^T q_t

There may be more heads of values than of queries and keys: head `i` of the values reads head `i // (HV / H)` of the
keys. A mixer's file adds what is its own: the decay `g`, the write strength `beta`, and how q and k are normalised.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import naive_conv
from fla.layers._mixer import Call, TokenMixer, check_positive
from fla.modules import FusedRMSNormGated, FusedRMSNormSwishGate, RMSNorm

QK_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}
# Settings of ops that are given raw projections: they normalise q and k, and compute decay and write strength.
IN_OP: Mapping[str, bool] = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}
# Name of an output gate's activation -> the norm with such a gate.
_GATED_NORMS: Mapping[str, Callable[..., nn.Module]] = {
    "swish": FusedRMSNormSwishGate,
    "sigmoid": functools.partial(FusedRMSNormGated, activation="sigmoid"),
}


class DeltaMixer(TokenMixer):
    """Base of token mixers over the delta rule. A subclass's `mix()` returns the heads' outputs `[B, T, HV, V]`."""

    o_norm: Any  # the norm of the heads, with or without a gate
    g_proj: nn.Module  # of mixers with an output gate

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_v_heads: int | None,
        head_k_dim: int,
        head_v_dim: int,
        layer_idx: int | None,
        mode: str | None,
    ) -> None:
        super().__init__(hidden_size, layer_idx, mode)
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        check_positive(num_heads=num_heads, num_v_heads=num_v_heads)
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads must be a multiple of num_heads={num_heads}, got {num_v_heads}")
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.key_dim, self.value_dim = num_heads * head_k_dim, num_v_heads * head_v_dim
        self.use_short_conv, self.qk_activation = False, "silu"
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)

    def add_qkv_convs(self, use_short_conv: bool, conv_size: int, conv_bias: bool, qk_activation: str = "silu") -> None:
        """Add a causal depthwise convolution for each of q, k and v, if `use_short_conv`.

        The activation of v is SiLU and that of q and k `qk_activation`, with and without convolutions.
        """
        check_positive(conv_size=conv_size)
        if qk_activation not in QK_ACTIVATIONS:
            raise ValueError(f"qk_activation must be one of {', '.join(QK_ACTIVATIONS)}, got {qk_activation!r}")
        self.use_short_conv, self.qk_activation = use_short_conv, qk_activation
        if use_short_conv:
            of_qk = "silu" if qk_activation == "silu" else None
            convs = {f"{name}_conv1d": (self.key_dim, of_qk) for name in "qk"}
            self.add_short_convs(convs | {"v_conv1d": (self.value_dim, "silu")}, conv_size, conv_bias)

    def add_output(self, gate_activation: str | None, norm_eps: float) -> None:
        """Add the output projection and an RMSNorm per head, whose gate `g_proj` computes; None: no gate."""
        self.gate_activation = gate_activation
        norm = RMSNorm if gate_activation is None else _GATED_NORMS[gate_activation]
        self.o_norm = norm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(self.value_dim, self.hidden_size, bias=False)

    def project(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q and k `[B, T, H, K]`, v `[B, T, HV, V]` after their convolutions and activations."""
        q, k, v = self.convolve(call, self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if not self.use_short_conv or self.qk_activation != "silu":  # else it is part of the convolutions
            q, k = (QK_ACTIVATIONS[self.qk_activation](y) for y in (q, k))
        return self.split_heads(q, k, v if self.use_short_conv else F.silu(v))

    def split_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k `[B, T, H K]` -> `[B, T, H, K]`, and v `[B, T, HV V]` -> `[B, T, HV, V]`."""
        q, k = (y.unflatten(-1, (self.num_heads, self.head_k_dim)) for y in (q, k))
        return q, k, v.unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def output_gate(self, x: Tensor) -> Tensor | None:
        """The output gate before its activation, `[B, T, HV, V]`; None if there is none."""
        if self.gate_activation is None:
            return None
        return self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def norm_and_gate(self, o: Tensor, x: Tensor) -> Tensor:
        """The norm of every head's output, times the gate."""
        g = self.output_gate(x)
        return self.o_norm(o) if g is None else self.o_norm(o, g)

    def output(self, o: Tensor) -> Tensor:
        """Concatenate the heads and apply the output projection."""
        return self.o_proj(o.flatten(2))

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state: a key x value matrix per head of the values."""
        return self.head_k_dim * self.value_dim

    # ---- the formulas, for comparison

    def naive(self, x: Tensor) -> Tensor:
        """The layer as formulas, token by token, `[B, T, D] -> [B, T, D]`: slow, and what its tests compare it with."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            q, k, v = (naive_conv(y, getattr(self, f"{name}_conv1d")) for y, name in zip((q, k, v), "qkv", strict=True))
        q, k = (QK_ACTIVATIONS[self.qk_activation](y) for y in (q, k))
        q, k, v = (y.to(wide) for y in self.split_heads(q, k, F.silu(v)))
        group = self.num_v_heads // self.num_heads
        q, k = (self.naive_norm(y).repeat_interleave(group, 2) for y in (q, k))
        g, beta = (y.to(wide) for y in self.naive_gates(x))
        o = _naive_delta_rule(q, k, v, g, beta)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.o_norm.eps) * self.o_norm.weight.to(wide)
        gate = self.output_gate(x)
        if gate is not None:
            gate = gate.to(wide)
            o = o * (F.silu(gate) if self.gate_activation == "swish" else gate.sigmoid())
        return self.o_proj(o.to(x.dtype).flatten(2))

    def naive_norm(self, x: Tensor) -> Tensor:
        """What is done to q and to k `[B, T, H, K]` before the op: the L2 norm."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def naive_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log decay `[B, T, HV, K]` or `[B, T, HV, 1]`, and the write strength `[B, T, HV]`."""
        raise NotImplementedError(f"{type(self).__name__} must define naive_gates()")


def _naive_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The recurrence at the head of this file; all tensors have the heads of the values."""
    state, outputs = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[3]), []
    for t in range(v.shape[1]):
        state = g[:, t].exp()[..., None] * state
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        written = beta[:, t][..., None] * (v[:, t] - read)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1)


def head_value_dim(head_dim: int, expand_v: float) -> int:
    """`head_dim * expand_v`. Raises ValueError unless it is a whole number of at least 1."""
    width = round(head_dim * expand_v)
    if width < 1 or abs(width - head_dim * expand_v) > 1e-6 * width:
        raise ValueError(
            f"expand_v * head_dim must be a whole number of at least 1, got {expand_v} * {head_dim} = "
            f"{head_dim * expand_v:g}"
        )
    return width
