"""`MultiHeadMixer`: the base of token mixers with heads.

    x -> q, k, v (-> short convolutions) -> heads -> op -> norm and gate per head -> output projection

It has the grouped heads, the projections of q, k and v, the output norm (whose weight has two names in checkpoints) and
the output gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._mixer import Call, TokenMixer, check_positive
from fla.modules import FusedRMSNormSwishGate, RMSNorm
from fla.modules.activations import get_activation


class MultiHeadMixer(TokenMixer):
    """Base of token mixers with heads. A subclass's `mix()` returns the outputs of the heads `[B, T, H, V]`."""

    tiny: ClassVar[Mapping[str, Any]] = {"num_heads": 2}
    g_norm: nn.Module  # a mixer has this norm or the next one: see `add_output`
    g_norm_swish_gate: nn.Module

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None, layer_idx: int | None, mode: str | None = None
    ) -> None:
        super().__init__(hidden_size, layer_idx, mode)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_kv_groups = num_heads // num_kv_heads
        self.use_short_conv = False

    def output(self, o: Tensor) -> Tensor:
        """Concatenate the heads and apply the output projection."""
        return self.o_proj(o.flatten(2))

    def split_heads(self, x: Tensor, head_dim: int, grouped: bool = False) -> Tensor:
        """`[B, T, H d]` -> `[B, T, H, d]`. `grouped`: `x` has the kv heads, and each is repeated for its group."""
        x = x.unflatten(-1, (-1, head_dim))
        return x.repeat_interleave(self.num_kv_groups, 2) if grouped and self.num_kv_groups > 1 else x

    # ---- q, k and v

    def add_projections(self, expand_k: float, expand_v: float) -> None:
        """Add the projections of q, k and v.

        All query heads together are `int(D expand_k)` wide. The output of all heads is `int(D expand_v)` wide. The
        projections of k and v compute the kv heads only.
        """
        H, D = self.num_heads, self.hidden_size
        self.head_k_dim, self.head_v_dim = head_dim("expand_k", expand_k, D, H), head_dim("expand_v", expand_v, D, H)
        self.key_dim, self.value_dim = H * self.head_k_dim, H * self.head_v_dim
        self.key_dim_per_group = self.key_dim // self.num_kv_groups
        self.value_dim_per_group = self.value_dim // self.num_kv_groups
        self.q_proj = nn.Linear(D, self.key_dim, bias=False)
        self.k_proj = nn.Linear(D, self.key_dim_per_group, bias=False)
        self.v_proj = nn.Linear(D, self.value_dim_per_group, bias=False)

    def add_qkv_convs(self, use_short_conv: bool, conv_size: int, conv_bias: bool) -> None:
        """Add a causal depthwise convolution with SiLU for each of q, k and v, if `use_short_conv`."""
        self.use_short_conv = use_short_conv
        if use_short_conv:
            widths = (self.key_dim, self.key_dim_per_group, self.value_dim_per_group)
            names = ("q_conv1d", "k_conv1d", "v_conv1d")
            convs = {name: (width, "silu") for name, width in zip(names, widths, strict=True)}
            self.add_short_convs(convs, conv_size, conv_bias)

    def project(self, x: Tensor, call: Call) -> tuple[Tensor, ...]:
        """q, k and v `[B, T, ...]` after their convolutions, k and v for the kv heads only."""
        return self.convolve(call, self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def recur(self, call: Call, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, **settings: Any) -> Tensor:
        """As `TokenMixer.recur`, with q and k cast to the dtype of v."""
        # under autocast some feature maps return a wider dtype
        return super().recur(call, q.to(v.dtype), k.to(v.dtype), v, *gates, **settings)

    # ---- output: norm, gate, projection

    def add_output_gate(self, use_output_gate: bool) -> None:
        """Add the projection of the output gate, if `use_output_gate`."""
        self.use_output_gate = use_output_gate
        if use_output_gate:
            self.g_proj = nn.Linear(self.hidden_size, self.value_dim, bias=False)

    def add_output(self, gate_fn: str, fuse_norm: bool, elementwise_affine: bool, norm_eps: float) -> None:
        """Add the output projection and an RMSNorm per head; with `fuse_norm` a swish gate is part of the norm."""
        self.gate_fn = get_activation(gate_fn, "gate_fn")
        self.fuse_norm_and_gate = fuse_norm and self.use_output_gate and gate_fn in ("swish", "silu")
        self.o_proj = nn.Linear(self.value_dim, self.hidden_size, bias=False)
        name, norm = ("g_norm_swish_gate", FusedRMSNormSwishGate) if self.fuse_norm_and_gate else ("g_norm", RMSNorm)
        self.add_module(name, norm(self.head_v_dim, elementwise_affine=elementwise_affine, eps=norm_eps))
        self.register_load_state_dict_pre_hook(_rename_norm)

    def norm_and_gate(self, o: Tensor, x: Tensor) -> Tensor:
        """`RMSNorm(o) * gate_fn(g_proj(x))` per head, `[B, T, H, V]`."""
        if not self.use_output_gate:
            return self.g_norm(o)
        g = self.split_heads(self.g_proj(x), self.head_v_dim)
        return self.g_norm_swish_gate(o, g) if self.fuse_norm_and_gate else self.g_norm(o) * self.gate_fn(g)

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state: a key x value matrix per head."""
        return self.key_dim * self.head_v_dim


def head_dim(argument: str, factor: float, hidden_size: int, num_heads: int) -> int:
    """The width of one of `num_heads` heads that together are `int(hidden_size factor)` wide.

    Raises ValueError, naming `argument`, unless the heads can be equally wide.
    """
    width = int(hidden_size * factor)
    if width <= 0 or width % num_heads:
        raise ValueError(
            f"{argument} * hidden_size must be a positive multiple of num_heads={num_heads}, "
            f"got {factor} * {hidden_size} = {width}"
        )
    return width // num_heads


def split_width(
    hidden_size: int, head_dim: int | None, num_heads: int | None, argument: str = "head_dim"
) -> tuple[int, int]:
    """The width and the number of heads that are `hidden_size` wide together; one of the two may be given as None.

    Raises ValueError, with `argument` as the name of the width, unless their product is `hidden_size`.
    """
    if head_dim is not None and num_heads is not None:
        if head_dim * num_heads != hidden_size:
            raise ValueError(
                f"{argument} * num_heads must be hidden_size={hidden_size}, got {head_dim} * {num_heads}; "
                "one of the two may be None"
            )
        return head_dim, num_heads
    for name, given in ((argument, head_dim), ("num_heads", num_heads)):
        if given is not None and hidden_size % given:
            raise ValueError(f"{name} must divide hidden_size={hidden_size}, got {given}")
    if head_dim is not None:
        return head_dim, hidden_size // head_dim
    if num_heads is not None:
        return hidden_size // num_heads, num_heads
    raise ValueError(f"{argument} or num_heads must be given, got None for both")


def naive_conv(x: Tensor, conv: Any) -> Tensor:
    """The convolution `conv` of `x` `[B, T, D]`, token by token and without its activation, for naive layers."""
    weight = conv.weight[:, 0]
    width = weight.shape[1]
    x = F.pad(x, (0, 0, width - 1, 0))
    y = torch.stack([(x[:, t : t + width] * weight.T).sum(1) for t in range(x.shape[1] - width + 1)], 1)
    return y if conv.bias is None else y + conv.bias


def _rename_norm(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load the weight of the output norm under either of its names, which depend on `fuse_norm` (`add_output`)."""
    names = [f"{prefix}{name}.weight" for name in ("g_norm", "g_norm_swish_gate")]
    ours, other = names[::-1] if hasattr(module, "g_norm_swish_gate") else names
    if other in state_dict and ours not in state_dict:
        state_dict[ours] = state_dict.pop(other)
