"""Depthwise causal convolution and token shift, with state and packing.

Both read a few tokens before the current one. If sequences have a state or are packed, every sequence's context (its
state, or zeros) is put in front of its tokens, which makes them ordinary rows: `_WithContext`. The sizes of these rows
do not depend on the values in `cu_seqlens`, so that nothing waits for the GPU.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fla.backends.torch.fused._common import creating_graph, gradients_with_graph, wide_dtype
from fla.varlen import prepare_sequence_ids


def _depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    wide = wide_dtype(x)
    row = F.pad(x.to(wide), (0, 0, weight.shape[1] - 1, 0)).transpose(1, 2)
    return F.conv1d(row, weight.to(wide).unsqueeze(1), groups=weight.shape[0]).transpose(1, 2)


class CausalConv1dFunction(torch.autograd.Function):
    """`y[t] = sum_j weight[:, j] x[t - (W - 1) + j]` with zeros before the start, for x [B, T, D], weight [D, W].

    The result is in the wide dtype. The sum of shifted products is several times faster on a CPU than a grouped
    convolution. Its gradient is written by hand because autograd would keep every shifted copy. Other programs know it
    by its name, and get an `apply` of their own (`fla.modules.conv`).
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        u, taps = x.to(wide_dtype(x)), weight.to(wide_dtype(x)).t().contiguous()
        T, y = x.shape[1], u * taps[-1]
        for lag in range(1, min(len(taps), T)):
            y[:, lag:].addcmul_(u[:, : T - lag], taps[-1 - lag])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        if creating_graph():
            return gradients_with_graph(_depthwise_conv, (x, weight), ctx.needs_input_grad, dy)
        u, taps = x.to(dy.dtype), weight.to(dy.dtype).t().contiguous()
        T, dx, dweight = x.shape[1], None, None
        lags = range(min(len(taps), T))
        if ctx.needs_input_grad[0]:
            dx = dy * taps[-1]
            for lag in lags[1:]:
                dx[:, : T - lag].addcmul_(dy[:, lag:], taps[-1 - lag])
            dx = dx.to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(taps)
            for lag in lags:
                dweight[-1 - lag] = (u[:, : T - lag] * dy[:, lag:]).sum((0, 1))
            dweight = dweight.t().to(weight.dtype)
        return dx, dweight


_ABOVE: Any = super(CausalConv1dFunction, CausalConv1dFunction)  # has the `apply` that is not other programs'


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    # Dynamo knows the class alone; `torch.export`, which runs this code, would get the other programs' `apply`
    function: Any = CausalConv1dFunction if is_dynamo_compiling() else _ABOVE
    return function.apply(x, weight)


class _WithContext(NamedTuple):
    """Rows in which `width` tokens of context precede every sequence."""

    rows: Tensor  # [B, width + T, D], packed [1, N width + T, D]
    tokens: Tensor | None  # packed: the places of the input's tokens in the row, [T]
    width: int
    cu_seqlens: Tensor | None

    def take(self, y: Tensor) -> Tensor:
        """The places of `y`, a tensor shaped like `rows`, that belong to the input's tokens."""
        return y[:, self.width :] if self.tokens is None else y.index_select(1, self.tokens)

    def last(self) -> Tensor:
        """The last `width` tokens of every sequence `[N, width, D]`, which are partly context if it is shorter."""
        if self.cu_seqlens is None:
            return self.rows[:, self.rows.shape[1] - self.width :]
        ends = self.cu_seqlens[1:].long() + self.width * _sequence_numbers(self.cu_seqlens, first=1)
        return self.rows[0][_ranges(ends - self.width, self.width)]


def _sequence_numbers(cu_seqlens: Tensor, first: int = 0) -> Tensor:
    """The sequences, numbered from `first` on, `[N]`."""
    return torch.arange(first, first + cu_seqlens.shape[0] - 1, device=cu_seqlens.device)


def _ranges(starts: Tensor, width: int) -> Tensor:
    """The indices `start, ..., start + width - 1` of every start, `[N, width]`."""
    return starts[:, None] + torch.arange(width, device=starts.device)


def _put_context_in_front(x: Tensor, context: Tensor | None, width: int, cu_seqlens: Tensor | None) -> _WithContext:
    """Put `context` [N, width, D], or zeros, in front of the sequences of `x`."""
    dtype = x.dtype if context is None else torch.promote_types(x.dtype, context.dtype)
    if cu_seqlens is None:
        context = x.new_zeros(x.shape[0], width, x.shape[2]) if context is None else context
        return _WithContext(torch.cat((context.to(dtype), x.to(dtype)), 1), None, width, None)
    N, T = cu_seqlens.shape[0] - 1, x.shape[1]
    tokens = torch.arange(T, device=x.device) + width * (prepare_sequence_ids(cu_seqlens, T).long() + 1)
    row = x.new_zeros(T + N * width, x.shape[2], dtype=dtype).index_copy(0, tokens, x[0].to(dtype))
    if context is not None:
        slots = _ranges(cu_seqlens[:-1].long() + width * _sequence_numbers(cu_seqlens), width)
        row = row.index_copy(0, slots.flatten(), context.flatten(0, 1).to(dtype))
    return _WithContext(row[None], tokens, width, cu_seqlens)


def _finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, like: Tensor) -> Tensor:
    """`activation(y + bias) + residual` in the dtype of `like`; the only activation is silu."""
    y = y if bias is None else y + bias
    y = y if activation is None else F.silu(y)
    return (y if residual is None else y + residual).to(like.dtype)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    W, state = weight.shape[1], None
    if initial_state is None and cu_seqlens is None:
        y = _convolved(x, weight)
        if output_final_state:
            state = F.pad(x[:, -W:], (0, 0, max(W - x.shape[1], 0), 0))
    else:
        context = None if initial_state is None else initial_state.transpose(1, 2)
        with_context = _put_context_in_front(x, context, W, cu_seqlens)
        y = with_context.take(_convolved(with_context.rows, weight))
        state = with_context.last() if output_final_state else None
    if state is not None:
        state = state.transpose(1, 2).to(x.dtype if initial_state is None else initial_state.dtype)
        state = state.clone(memory_format=torch.contiguous_format)  # never a view of the input
    return _finish(y, bias, residual, activation, x), state


def conv_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    wide = wide_dtype(x)
    window = torch.cat((state[..., 1:].to(wide), x.unsqueeze(-1).to(wide)), -1)
    state.copy_(window)
    return _finish((window * weight.to(wide)).sum(-1), bias, residual, activation, x)


def token_shift(x: Tensor, cu_seqlens: Tensor | None, cache: Tensor | None) -> tuple[Tensor, Tensor]:
    with_context = _put_context_in_front(x, None if cache is None else cache.unsqueeze(1), 1, cu_seqlens)
    rows = with_context.rows
    before = rows[:, :-1] if with_context.tokens is None else rows.index_select(1, with_context.tokens - 1)
    last = with_context.last().squeeze(1).to(x.dtype if cache is None else cache.dtype)
    return (before - x).to(x.dtype), last.clone()
