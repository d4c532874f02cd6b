"""Layer, RMS and group norm, alone or followed by a linear map.

    x' = x + residual
    LayerNorm:  y = (x' - mean(x')) * rsqrt(var(x') + eps) * weight + bias
    RMSNorm:    y = x' * rsqrt(mean(x'^2) + eps) * weight + bias
    GroupNorm:  the same in each of `num_groups` contiguous groups of channels; `weight` and `bias` are per channel

`x` [..., D]. Statistics are taken over the last axis in float32 (float64 for float64), and `y` has the dtype of `x`.
Family: `fused`.
Papers: https://arxiv.org/abs/1607.06450, https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/1803.08494
"""

from typing import Any

import torch
from torch import Tensor, nn

from fla.backends import fused


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """Layer norm of `x + residual` (RMS norm with `is_rms_norm`).

    With `prenorm` the result is `(y, x + residual)`, the second in the residual's dtype. Without a residual the second
    is `x`, in float32 if `residual_in_fp32`. Raises ValueError for shapes that do not fit.
    """
    return fused.norm(
        x, weight, bias, residual, eps=eps, is_rms=is_rms_norm, prenorm=prenorm, residual_in_fp32=residual_in_fp32
    )


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """RMS norm of `x + residual`; see `layer_norm`."""
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    """Layer norm (RMS norm with `is_rms_norm`) of each of `num_groups` groups of channels; see `layer_norm`."""
    fused.check_float("x", x)
    return fused.norm(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        is_rms=is_rms_norm,
        group_size=group_size(x.shape[-1], num_groups),
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def group_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    """`group_norm(...) @ linear_weight.T + linear_bias`. The backward pass recomputes the normalised activation.

    `linear_weight` [O, D], `linear_bias` [O] or None. Under autocast the product runs in the autocast dtype.
    """
    fused.check_float("x", x)
    return fused.norm_linear(
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps=eps,
        is_rms=is_rms_norm,
        group_size=group_size(x.shape[-1], num_groups),
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    """`layer_norm(...) @ linear_weight.T + linear_bias`; see `group_norm_linear`."""
    tensors = (x, norm_weight, norm_bias, linear_weight, linear_bias, residual)
    return group_norm_linear(*tensors, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups)


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """`rms_norm(...) @ linear_weight.T + linear_bias`; see `group_norm_linear`."""
    tensors = (x, norm_weight, norm_bias, linear_weight, linear_bias, residual)
    return group_norm_linear(*tensors, eps, prenorm, residual_in_fp32, is_rms_norm=True)


def group_size(width: int, num_groups: int) -> int | None:
    """Channels per group, or None for a single group. Raises ValueError if `num_groups` does not divide `width`."""
    fused.check_count("num_groups", num_groups)
    if width % num_groups:
        raise ValueError(f"num_groups must divide the width {width}, got {num_groups}")
    return None if num_groups == 1 else width // num_groups


def group_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int = 1,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    is_rms_norm: bool = False,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """The formulas of this module in plain PyTorch, in the dtype of `x` (float32 with `upcast`); for comparison."""
    dtype = x.dtype
    x = x.float() if upcast else x
    x = x if residual is None else x + residual
    groups = x.unflatten(-1, (num_groups, -1))
    centered = groups if is_rms_norm else groups - groups.mean(-1, keepdim=True)
    y = (centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(dtype)
    return (y, x) if prenorm else y


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """Layer norm in plain PyTorch; see `group_norm_ref`."""
    return group_norm_ref(x, weight, bias, 1, residual, eps, False, prenorm, upcast)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """RMS norm in plain PyTorch; see `group_norm_ref`."""
    return group_norm_ref(x, weight, bias, 1, residual, eps, True, prenorm, upcast)


class Norm(nn.Module):
    """Base of all norm modules: `weight` [D], at first ones, and `bias` [D], at first zeros; either may be None."""

    is_rms = False
    num_groups = 1
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fused.check_count("hidden_size", hidden_size)
        fused.check_flag("elementwise_affine", elementwise_affine)
        fused.check_flag("bias", bias)
        fused.check_number("eps", eps)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        affine = "" if self.elementwise_affine else ", elementwise_affine=False"
        return f"{self.hidden_size}, eps={self.eps}{affine}"


class LayerNorm(Norm):
    """Layer norm over the last axis. It has a bias only with `bias=True`."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """`y`, or `(y, x + residual)` with `prenorm`; see `layer_norm`."""
        return group_norm(
            x, self.weight, self.bias, residual, self.eps, prenorm, residual_in_fp32, self.is_rms, self.num_groups
        )


class RMSNorm(LayerNorm):
    """RMS norm over the last axis."""

    is_rms = True


class GroupNorm(LayerNorm):
    """Layer norm (RMS norm with `is_rms_norm`) of each of `num_groups` contiguous groups of channels."""

    def __init__(
        self,
        num_groups: int,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        is_rms_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        group_size(hidden_size, num_groups)
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        self.num_groups, self.is_rms = num_groups, is_rms_norm

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {super().extra_repr()}" + (", is_rms_norm=True" if self.is_rms else "")


class LayerNormLinear(Norm):
    """Layer norm followed by a linear map. The module has the norm's parameters; a call passes those of the map."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """`norm(x + residual) @ weight.T + bias`, `weight` [O, D]; see `group_norm_linear`."""
        tensors = (x, self.weight, self.bias, weight, bias, residual)
        return group_norm_linear(*tensors, self.eps, prenorm, residual_in_fp32, self.is_rms, self.num_groups)


class RMSNormLinear(LayerNormLinear):
    """RMS norm followed by a linear map; see `LayerNormLinear`."""

    is_rms = True


class GroupNormLinear(GroupNorm):
    """Group norm followed by a linear map; see `LayerNormLinear`."""

    forward = LayerNormLinear.forward  # type: ignore[assignment]
