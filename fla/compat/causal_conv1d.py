"""The functions of the package causal_conv1d, by `fla.modules.convolution`: any machine, strides, dtypes and widths.

    y[:, t] = activation(sum_{j < W} weight[:, j] x[:, t - (W - 1) + j] + bias)

Channels stand before time here: `x` [B, D, T], `weight` [D, W], states [B, D, W - 1] of the last inputs, oldest first.
Names, order and defaults of the parameters are that package's. transformers hands over those of its keywords that a
function names.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.modules import convolution
from fla.shapes import check_shapes

VERSION = "1.7.0+fla"  # of the package whose functions these are


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal convolution of every channel of `x` [B, D, T]; returns y like `x`, with `return_final_states` also the
    states after it.

    Args:
        weight, bias: `[D, W]`, `[D]`.
        seq_idx: integers `[B, T]`: a sequence begins where the number changes.
        initial_states: `[N, D, W - 1]`, the inputs before each of N sequences: the rows, or those packed into one row.
        final_states_out: `[N, D, W - 1]`, in which the states are returned.
        activation: None, "silu" or "swish".
        cu_seq_lens_q: `[N + 1]` bounds of sequences packed into one row. It may be given beside `seq_idx`, and then
            counts; on a CPU both must agree.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out can be given with return_final_states=True alone, got False")
    _check(x, weight, bias, initial_states=initial_states, final_states_out=final_states_out)
    if seq_idx is not None and cu_seq_lens_q is not None:
        _check_agreement(seq_idx, cu_seq_lens_q, x)
        seq_idx = None
    if initial_states is not None and initial_states.shape[2] != weight.shape[1] - 1:
        raise ValueError(f"initial_states must have {weight.shape[1] - 1} columns, got {list(initial_states.shape)}")
    before = None if initial_states is None else F.pad(initial_states, (1, 0))  # ours have W columns
    y, state = convolution.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        initial_state=before,
        output_final_state=return_final_states,
        activation=activation,
        cu_seqlens=cu_seq_lens_q,
        seq_idx=seq_idx,
    )
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    assert state is not None
    last = state[..., 1:].to(x.dtype)
    if final_states_out is None:
        return y, last
    if final_states_out.shape != last.shape:
        raise ValueError(f"final_states_out must have shape {list(last.shape)}, got {list(final_states_out.shape)}")
    return y, final_states_out.copy_(last)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of new tokens `x` [B, D] or [B, D, T]; returns y like `x`. It updates `conv_state` IN PLACE.

    Args:
        conv_state: `[B, D, S]`, the last S >= W - 1 inputs of every row, oldest first.
        cache_seqlens: integers `[B]`. `conv_state` is then a ring, and the next token goes to column
            `cache_seqlens % S`.
        conv_state_indices: integers `[B]`. `conv_state` then holds any number of rows, and row b of `x` uses the row
            `conv_state_indices[b]` of it. -1 skips a row of `x`: its output is 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    one = isinstance(x, Tensor) and x.dim() == 2
    tokens = x.unsqueeze(2) if one else x
    _check(tokens, weight, bias, conv_state=conv_state)
    B, W, S = tokens.shape[0], weight.shape[1], conv_state.shape[2]
    if S < W - 1:
        raise ValueError(f"conv_state must have at least {W - 1} columns, got {list(conv_state.shape)}")
    for name, value in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        _check_per_row(name, value, tokens)
    if conv_state_indices is None and conv_state.shape[0] != B:
        raise ValueError(f"conv_state must have {B} rows as x has, got {list(conv_state.shape)}")
    in_order = cache_seqlens is None and conv_state_indices is None
    recorded = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, weight, bias))
    if in_order and S == W and tokens.shape[2] == 1 and not recorded:
        y, _ = convolution.causal_conv1d_update(tokens.squeeze(2), conv_state, None, weight, bias, activation)
        return y.view(x.shape)
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long().clamp(min=0)]
    order = None if cache_seqlens is None else _order(cache_seqlens, S, conv_state)
    states = rows if order is None else rows.gather(2, order.expand_as(rows))
    before = F.pad(states, (max(W - S, 0), 0))[..., -W:].detach()
    y, _ = convolution.causal_conv1d(tokens.transpose(1, 2), weight, bias, initial_state=before, activation=activation)
    with torch.no_grad():
        states = torch.cat((states, tokens.to(states.dtype)), 2)[..., -S:]
        if cache_seqlens is not None:
            order = _order(cache_seqlens + tokens.shape[2], S, conv_state).expand_as(states)
            states = torch.empty_like(states).scatter_(2, order, states)
        if conv_state_indices is None:
            conv_state.copy_(states)
        else:
            used = conv_state_indices >= 0
            conv_state[conv_state_indices[used].long()] = states[used]
    y = y.transpose(1, 2)
    y = y if conv_state_indices is None else y.masked_fill((conv_state_indices < 0)[:, None, None], 0.0)
    return y.squeeze(2) if one else y


MODULES: dict[str, tuple[Callable, ...]] = {"causal_conv1d": (causal_conv1d_fn, causal_conv1d_update)}


def _order(cache_seqlens: Tensor, size: int, like: Tensor) -> Tensor:
    """The columns of a ring from the oldest to the newest, `[B, 1, size]`."""
    columns = torch.arange(size, device=like.device)
    return ((cache_seqlens.long()[:, None] + columns) % size).unsqueeze(1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, **states: Tensor | None) -> None:
    shapes = {"x": "B D T", "weight": "D W", "bias": "D"} | {name: f"R{i} D S{i}" for i, name in enumerate(states)}
    required = ("x", "weight", *(name for name in states if name == "conv_state"))
    check_shapes(shapes, same_dtype=(), required=required, **{"x": x, "weight": weight, "bias": bias}, **states)  # type: ignore[arg-type]


def _check_per_row(name: str, value: Tensor | None, x: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.shape != x.shape[:1] or value.device != x.device:
        expected = f"an integer tensor of shape {list(x.shape[:1])} on {x.device}"
        raise ValueError(f"{name} must be {expected}, got {value.dtype} {list(value.shape)} on {value.device}")


def _check_agreement(seq_idx: Tensor, cu_seqlens: Tensor, x: Tensor) -> None:
    """Raise ValueError if both do not describe the same sequences; on a GPU values are not read."""
    if seq_idx.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"seq_idx must have shape {[x.shape[0], x.shape[2]]}, got {list(seq_idx.shape)}")
    if x.is_cpu and cu_seqlens.is_cpu and x.shape[0] == 1 and not torch.compiler.is_compiling():
        begins = 1 + (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten()
        inner = torch.unique(cu_seqlens)[1:-1]
        if begins.tolist() != inner.tolist():
            raise ValueError(f"seq_idx and cu_seq_lens_q must agree, got bounds {begins.tolist()} and {inner.tolist()}")
