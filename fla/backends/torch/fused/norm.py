"""Norms, alone or together with a residual, a gate or a linear map."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fla.backends.torch.fused._common import autocast, creating_graph, gradients_with_graph, wide_dtype
from fla.backends.torch.fused.glu import ACTIVATIONS


def _root_norm(x: Tensor, weight: Tensor | None, eps: float, sum_scale: float) -> Tensor:
    u = x.to(wide_dtype(x))
    y = u * torch.rsqrt(u.square().sum(-1, keepdim=True) * sum_scale + eps)
    return y if weight is None else y * weight


class _RootNorm(torch.autograd.Function):
    """`y = x * r * weight` with `r = rsqrt(sum_scale * sum(x^2) + eps)` over the last axis.

    `sum_scale` is 1/D for the RMS norm and 1 for the L2 norm. The gradient is written by hand because autograd would
    keep three wide copies of `x`; this keeps `x` in its own dtype and one number per row.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, sum_scale):
        u = x.to(wide_dtype(x))
        # nothing in place: PyTorch 2.11 compiles a wrong gradient for an autograd Function whose forward has that
        inverse_root = torch.rsqrt(torch.linalg.vector_norm(u, dim=-1, keepdim=True).square() * sum_scale + eps)
        ctx.save_for_backward(x, weight, inverse_root)
        ctx.eps, ctx.sum_scale = eps, sum_scale
        y = u * inverse_root
        return y if weight is None else (y * weight).to(y.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse_root = ctx.saved_tensors
        if creating_graph():
            plain = functools.partial(_root_norm, eps=ctx.eps, sum_scale=ctx.sum_scale)
            return *gradients_with_graph(plain, (x, weight), ctx.needs_input_grad[:2], dy), None, None
        unit = x.to(inverse_root.dtype) * inverse_root
        product, dweight = dy * unit, None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                dweight = product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
            product, dy = product.mul_(weight), dy * weight
        projection = product.sum(-1, keepdim=True).mul_(ctx.sum_scale)
        return (dy - unit.mul_(projection)).mul_(inverse_root).to(x.dtype), dweight, None, None


def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms: bool) -> Tensor:
    """RMS or layer norm over the last axis, in the wide dtype."""
    wide = wide_dtype(x)
    if not is_rms:
        weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    y = _RootNorm.apply(x, weight, eps, 1 / x.shape[-1])
    return y if bias is None else y + bias


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
    group_size: int | None,
    activation: str,
    gate_first: bool,
) -> Tensor:
    wide = wide_dtype(x)
    total = x if residual is None else x.to(wide) + residual
    factor = None if gate is None else ACTIVATIONS[activation](gate.to(wide))
    if factor is not None and gate_first:
        total = total * factor
    if group_size is None or group_size == x.shape[-1]:
        y = _normalize(total, weight, bias, eps, is_rms)
    else:
        y = _normalize(total.unflatten(-1, (-1, group_size)), None, None, eps, is_rms).flatten(-2)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
    if factor is not None and not gate_first:
        y = y * factor
    return y.to(x.dtype)


def norm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    **options,
) -> Tensor:
    def compute(x, weight, bias, residual, gate, linear_weight, linear_bias):
        y = norm(x, weight, bias, residual, gate, **options)
        y, linear_weight, linear_bias = autocast(y, linear_weight, linear_bias)
        return F.linear(y, linear_weight.to(y.dtype), None if linear_bias is None else linear_bias.to(y.dtype))

    # the linear map would keep the normalised activation, which can be recomputed without a matrix product
    tensors = (x, weight, bias, residual, gate, linear_weight, linear_bias)
    return checkpoint(compute, *tensors, use_reentrant=False, preserve_rng_state=False)


def l2norm(x: Tensor, eps: float, output_dtype: torch.dtype | None) -> Tensor:
    return _RootNorm.apply(x, None, eps, 1.0).to(output_dtype or x.dtype)
