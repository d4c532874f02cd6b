"""Norm times gate, as token mixers use it on their output.

    y = (norm(x + residual) * weight + bias) * activation(g)          activation: swish (silu) or sigmoid

`x`, `g` [..., D]. The last axis is normalised. Arithmetic is float32, and `y` has the dtype of `x`. The gate is the
argument `g`; under the older names (`*SwishGate`) it may also be given as `o`. Family: `fused`.
Papers: https://arxiv.org/abs/2307.08621, https://arxiv.org/abs/2312.06635
"""

from typing import Any

import torch
from torch import Tensor

from fla.backends import fused
from fla.modules.layernorm import Norm


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`(rms_norm(x + residual) * weight + bias) * activation(g)`.

    With `prenorm` the result is `(y, x + residual)`, the second in the residual's dtype. Without a residual the second
    is `x`, in float32 if `residual_in_fp32`. Raises ValueError for shapes that do not fit or an unknown activation.
    """
    return _gated(True, x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)


def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`(layer_norm(x + residual) * weight + bias) * activation(g)`; see `rms_norm_gated`."""
    return _gated(False, x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)


def rms_norm_swish_gate_fn(
    x: Tensor,
    o: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`rms_norm_gated` with swish, in the older argument order."""
    return _gated(True, x, o, weight, bias, "swish", residual, prenorm, residual_in_fp32, eps)


def layer_norm_swish_gate_fn(
    x: Tensor,
    o: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`layer_norm_gated` with swish, in the older argument order."""
    return _gated(False, x, o, weight, bias, "swish", residual, prenorm, residual_in_fp32, eps)


def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`rms_norm_gated(...) @ linear_weight.T + linear_bias`. The backward pass recomputes the gated activation."""
    linear = (linear_weight, linear_bias)
    return _gated(True, x, g, norm_weight, norm_bias, "swish", residual, prenorm, residual_in_fp32, eps, linear)


def layer_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`layer_norm_gated(...) @ linear_weight.T + linear_bias`; see `rms_norm_swish_gate_linear`."""
    linear = (linear_weight, linear_bias)
    return _gated(False, x, g, norm_weight, norm_bias, "swish", residual, prenorm, residual_in_fp32, eps, linear)


def rms_norm_swish_gate_linear_fn(
    x: Tensor,
    o: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`rms_norm_swish_gate_linear` under its older name."""
    tensors = (x, o, norm_weight, norm_bias, linear_weight, linear_bias, residual)
    return rms_norm_swish_gate_linear(*tensors, prenorm, residual_in_fp32, eps)


def layer_norm_swish_gate_linear_fn(
    x: Tensor,
    o: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`layer_norm_swish_gate_linear` under its older name."""
    tensors = (x, o, norm_weight, norm_bias, linear_weight, linear_bias, residual)
    return layer_norm_swish_gate_linear(*tensors, prenorm, residual_in_fp32, eps)


def _gated(is_rms, x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps, linear=None) -> Any:
    """The gated norm; `linear`, a pair of weight and bias, adds the linear map."""
    settings = {
        "eps": eps,
        "is_rms": is_rms,
        "activation": activation,
        "prenorm": prenorm,
        "residual_in_fp32": residual_in_fp32,
    }
    if linear is None:
        return fused.norm(x, weight, bias, residual, g, **settings)
    linear_weight, linear_bias = linear
    return fused.norm_linear(x, weight, bias, linear_weight, linear_bias, residual, g, **settings)


def _one_gate(g: Tensor | None, o: Tensor | None) -> Tensor:
    """The gate, which is given under one of its two names."""
    if (g is None) == (o is None):
        raise TypeError(f"exactly one gate must be given, as g or as o, got {'both' if g is not None else 'none'}")
    return g if o is None else o  # type: ignore[return-value]


class FusedLayerNormGated(Norm):
    """`(layer_norm(x) * weight + bias) * activation(g)`; `activation`: "swish", "silu" or "sigmoid"."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in fused.ACTIVATIONS:
            raise ValueError(f"activation must be one of {fused.ACTIVATIONS}, got {activation!r}")
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        g: Tensor | None = None,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        *,
        o: Tensor | None = None,
    ) -> Any:
        """`y`, or `(y, x + residual)` with `prenorm`; see `rms_norm_gated`. The gate is given as `g` or as `o`."""
        gate, parameters = _one_gate(g, o), (self.weight, self.bias, self.activation)
        return _gated(self.is_rms, x, gate, *parameters, residual, prenorm, residual_in_fp32, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FusedRMSNormGated(FusedLayerNormGated):
    """`rms_norm(x) * weight * activation(g)`; `activation`: "swish", "silu" or "sigmoid"."""

    is_rms = True

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, False, activation, eps, device, dtype)


class FusedLayerNormGatedLinear(FusedLayerNormGated):
    """`FusedLayerNormGated` followed by a linear map, whose parameters are passed in the call.

    The third argument is `eps`, as in the other modules with a linear map, not `bias` as in `FusedLayerNormGated`.
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, bias, activation, eps, device, dtype)

    def forward(
        self,
        x: Tensor,
        g: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        *,
        o: Tensor | None = None,
    ) -> Any:
        """`(norm(x + residual) * activation(g)) @ weight.T + bias`, `weight` [O, D]."""
        gate, parameters = _one_gate(g, o), (self.weight, self.bias, self.activation)
        options = (residual, prenorm, residual_in_fp32, self.eps)
        return _gated(self.is_rms, x, gate, *parameters, *options, (weight, bias))


class FusedRMSNormGatedLinear(FusedRMSNormGated):
    """`FusedRMSNormGated` followed by a linear map, whose parameters are passed in the call."""

    forward = FusedLayerNormGatedLinear.forward  # type: ignore[assignment]


class FusedRMSNormSwishGate(FusedRMSNormGated):
    """`FusedRMSNormGated` with swish, under its older name and with the older printed form."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, eps, "swish", device, dtype)

    extra_repr = Norm.extra_repr


class FusedLayerNormSwishGate(FusedLayerNormGated):
    """`FusedLayerNormGated` with swish and without bias, under its older name and with the older printed form."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, False, "swish", eps, device, dtype)

    extra_repr = Norm.extra_repr


class FusedRMSNormSwishGateLinear(FusedRMSNormSwishGate):
    """`FusedRMSNormGatedLinear` with swish, under its older name."""

    forward = FusedLayerNormGatedLinear.forward  # type: ignore[assignment]


class FusedLayerNormSwishGateLinear(FusedLayerNormSwishGate):
    """`FusedLayerNormGatedLinear` with swish, under its older name."""

    forward = FusedLayerNormGatedLinear.forward  # type: ignore[assignment]
