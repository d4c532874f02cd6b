"""Gated linear units: `activation(x) * y`, alone or followed by a linear map."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.backends.torch.fused._common import autocast, creating_graph, gradients_with_graph, wide_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


def _plain(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    z = (ACTIVATIONS[activation](x.to(wide_dtype(x))) * y).to(x.dtype)
    return z if weight is None else F.linear(z, weight, bias)


def _product(x: Tensor, y: Tensor, activation: str) -> Tensor:
    # not in place: PyTorch 2.11 compiles a wrong gradient for an autograd Function whose forward has such an operation
    return (ACTIVATIONS[activation](x.to(wide_dtype(x))) * y).to(x.dtype)


def _product_gradient(x: Tensor, y: Tensor, dz: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x)
    u, dz = x.to(wide), dz.to(wide)
    active = ACTIVATIONS[activation](u)
    dactive = dz * y
    if activation == "sigmoid":
        dx = torch.ops.aten.sigmoid_backward(dactive, active)
    else:
        dx = torch.ops.aten.silu_backward(dactive, u)
    return dx.to(x.dtype), active.mul_(dz).to(y.dtype)


class _Glu(torch.autograd.Function):
    """`activation(x) * y`. It keeps only `x` and `y`; autograd would also keep the activation."""

    @staticmethod
    def forward(ctx, x, y, activation):
        ctx.save_for_backward(x, y)
        ctx.activation = activation
        return _product(x, y, activation)

    @staticmethod
    def backward(ctx, dz):
        if creating_graph():
            plain = functools.partial(_plain, weight=None, bias=None, activation=ctx.activation)
            return *gradients_with_graph(plain, ctx.saved_tensors, ctx.needs_input_grad[:2], dz), None
        return *_product_gradient(*ctx.saved_tensors, dz, ctx.activation), None


class _GluLinear(torch.autograd.Function):
    """`(activation(x) * y) @ weight.T + bias`. It keeps the inputs and recomputes the product in the backward pass."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, activation):
        ctx.save_for_backward(x, y, weight, bias)
        ctx.activation = activation
        return F.linear(_product(x, y, activation), weight, bias)

    @staticmethod
    def backward(ctx, dout):
        x, y, weight, bias = ctx.saved_tensors
        if creating_graph():
            plain = functools.partial(_plain, activation=ctx.activation)
            return *gradients_with_graph(plain, ctx.saved_tensors, ctx.needs_input_grad[:4], dout), None
        rows = dout.reshape(-1, dout.shape[-1])
        dx, dy, dweight, dbias = None, None, None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx, dy = _product_gradient(x, y, dout @ weight, ctx.activation)
        if ctx.needs_input_grad[2]:
            dweight = rows.t() @ _product(x, y, ctx.activation).reshape(-1, weight.shape[1])
        if bias is not None and ctx.needs_input_grad[3]:
            dbias = rows.sum(0)
        return dx, dy, dweight, dbias, None


def glu(x: Tensor, y: Tensor, activation: str) -> Tensor:
    return _Glu.apply(x, y, activation)


def glu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _GluLinear.apply(*autocast(x, y, weight, bias), activation)
