"""Norm with a gate before or after it, as Mamba-2 uses it.

    y = norm(x) * silu(z)          with norm_before_gate
    y = norm(x * silu(z))          otherwise

`x`, `z` [..., D]. With `group_size` the norm is taken in contiguous groups of that many channels. Family: `fused`.
Paper: https://arxiv.org/abs/2405.21060
"""

import torch
from torch import Tensor

from fla.backends import fused
from fla.modules.layernorm import Norm


def layernorm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Layer norm (RMS norm with `is_rms_norm`) gated by `silu(z)`; without `z` only the norm."""
    where = {"gate": z, "gate_first": not norm_before_gate, "group_size": group_size}
    return fused.norm(x, weight, bias, eps=eps, is_rms=is_rms_norm, **where)  # type: ignore[arg-type]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm gated by `silu(z)`; without `z` only the norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class LayerNormGated(Norm):
    """Layer norm with weight and bias. By default the gate multiplies the norm's output."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(f"group_size must divide hidden_size ({hidden_size}), got {group_size}")
        super().__init__(hidden_size, True, not self.is_rms, eps, device, dtype)
        self.group_size, self.norm_before_gate = group_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The gated norm of `x`; without `z` only the norm."""
        options = (self.eps, self.group_size, self.norm_before_gate, self.is_rms)
        return layernorm_fn(x, self.weight, self.bias, z, *options)

    def extra_repr(self) -> str:
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}{group}, norm_before_gate={self.norm_before_gate}"


class RMSNormGated(LayerNormGated):
    """RMS norm with weight. By default the gate multiplies the norm's input."""

    is_rms = True

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
