"""A toy family with an op: a file of the family, one for the backend that computes it, one for the op."""

SCAN_FAMILY = '''"""The family `toyscan`: every channel forgets at a rate of its own, at every token.

    h_t = exp(f_t) h_{t-1} + x_t          h in R^D
    o_t = h_t

x, f `[B, T, D]`, states `[N, D]`; f is a natural-log decay.
"""

from dataclasses import dataclass

from torch import Tensor

from fla.backends._recurrence import Family, Recurrence


@dataclass(slots=True, eq=False)
class Problem(Recurrence):
    """One call. `form`: "chunk" or "recurrent"."""

    x: Tensor
    f: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    form: str

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.num_states, self.x.shape[2])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)


FAMILY = Family("toyscan", Problem)


DEAD_LOG_DECAY = -16.0  # what survives such a decay is below float32's digits: its gradient is 0


def scan(
    form, x, f, *, initial_state, cu_seqlens, output_final_state, backend, op,
    state_indices=None, inplace_final_state=False,
):
    """`o` and the final state or None; on states of the caller where it says so."""
    values = (x, f, initial_state, cu_seqlens, form)
    if state_indices is None and not inplace_final_state:
        return FAMILY.call(values, output_final_state, backend, op)
    return FAMILY.step(
        values, state_indices, inplace_final_state, output_final_state, backend=backend, op=op
    )
'''

SCAN_TORCH = '''"""The family `toyscan` in plain PyTorch, token by token."""

import torch

from fla.backends.torch._step import stepping
from fla.backends.toyscan import DEAD_LOG_DECAY


def forward(problem, output_final_state, keep):
    o, states = _run(problem)
    return o[:, 1:].to(problem.output_dtype), states if output_final_state else None, None


step = stepping(forward)


def backward(problem, saved, do, dht, needs):
    h, _ = _run(problem)
    x, f, dtype = problem.x, problem.f, problem.state_dtype
    dx, df = torch.empty_like(x, dtype=dtype), torch.empty_like(f, dtype=dtype)
    states = x.new_zeros(problem.state_shape, dtype=dtype) if dht is None else dht.to(dtype, copy=True)
    for rows, tokens, sequences in _sequences(problem):
        d = states[sequences]
        for t in reversed(tokens):
            decay = f[rows, t].to(dtype).exp()
            d = d + do[rows, t]
            dx[rows, t] = d
            d = d * decay
            df[rows, t] = d * _before(problem, h, rows, t, tokens, sequences)
        states[sequences] = d
    if problem.dtype != torch.float64:
        df.masked_fill_(f < DEAD_LOG_DECAY, 0.0)
    return {"x": dx, "f": df, "initial_state": states}


def _run(problem):
    """The states after every token `[B, 1 + T, D]`, those before the first token unset, and the final ones."""
    x, f, dtype = problem.x, problem.f, problem.state_dtype
    states = x.new_zeros(problem.state_shape, dtype=dtype)
    if problem.initial_state is not None:
        states += problem.initial_state
    h = x.new_zeros(x.shape[0], 1 + x.shape[1], x.shape[2], dtype=dtype)
    for rows, tokens, sequences in _sequences(problem):
        state = states[sequences]
        for t in tokens:
            state = state * f[rows, t].to(dtype).exp() + x[rows, t]
            h[rows, 1 + t] = state
        states[sequences] = state
    return h, states


def _before(problem, h, rows, t, tokens, sequences):
    """The states before token t."""
    if t > tokens[0]:
        return h[rows, t]
    return 0.0 if problem.initial_state is None else problem.initial_state[sequences]


def _sequences(problem):
    """Rows, tokens and states of what is computed at once: the whole batch, or each sequence of a pack."""
    if problem.cu_seqlens is None:
        yield slice(None), range(problem.sizes[1]), slice(None)
        return
    bounds = problem.cu_seqlens.tolist()
    for n in range(problem.num_states):
        if bounds[n] < bounds[n + 1]:
            yield slice(0, 1), range(bounds[n], bounds[n + 1]), slice(n, n + 1)
'''

SCAN_LINE = "from fla.ops.toyscan import chunk_toyscan, fused_recurrent_toyscan\n"

SCAN_OP = '''"""Toy scan: every channel forgets at a rate of its own. No heads, no keys, no scale.

    h_t = exp(f_t) h_{t-1} + x_t          h in R^D
    o_t = h_t

Shapes: x, f `[B, T, D]`, states `[N, D]`. f is a natural-log decay, <= 0. Family: `toyscan`.
"""

import torch
import torch.nn.functional as F

from fla.backends import toyscan
from fla.ops._spec import OpSpec, current_names, register
from fla.shapes import check_shapes, pool_shapes

SHAPES = {"x": "B T D", "f": "B T D", "initial_state": "N D"}


def naive_recurrent_toyscan(x, f, initial_state=None, output_final_state=False):
    """The two lines above, token by token."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out_dtype, x, f = x.dtype, x.to(dtype), f.to(dtype)
    state = x.new_zeros(len(x), x.shape[2]) if initial_state is None else initial_state.to(dtype)
    outputs = [x[:, :0]]
    for t in range(x.shape[1]):
        state = f[:, t].exp() * state + x[:, t]
        outputs.append(state[:, None])
    return torch.cat(outputs, 1).to(out_dtype), state if output_final_state else None


@current_names
def chunk_toyscan(x, f, initial_state=None, output_final_state=False, cu_seqlens=None, *, backend=None):
    """The toy scan, for training and prefill."""
    return _toyscan(
        "chunk", x, f, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        backend=backend, op="chunk_toyscan",
    )


@current_names
def fused_recurrent_toyscan(
    x, f, initial_state=None, output_final_state=False, cu_seqlens=None,
    *, inplace_final_state=False, state_indices=None, backend=None,
):
    """The toy scan token by token, also on states of the caller."""
    return _toyscan(
        "recurrent", x, f, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state, state_indices=state_indices, backend=backend,
        op="fused_recurrent_toyscan",
    )


def _toyscan(form, x, f, **options):
    tensors = {"x": x, "f": f, "initial_state": options["initial_state"]}
    shapes = pool_shapes(SHAPES, options.get("state_indices"))
    check_shapes(shapes, same_dtype=("x",), required=("x", "f"), cu_seqlens=options["cu_seqlens"], **tensors)
    return toyscan.scan(form, x, f, **options)


SPEC = register(
    OpSpec(
        name="toyscan",
        family="toyscan",
        shapes=SHAPES,
        reference=naive_recurrent_toyscan,
        forms={"chunk": chunk_toyscan, "fused_recurrent": fused_recurrent_toyscan},
        inputs=lambda x: x | {"f": F.logsigmoid(x["f"]) / 4},
        gates=("f",),
        required=("x", "f"),
        same_dtype=("x",),
    )
)
'''
