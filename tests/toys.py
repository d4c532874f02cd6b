"""Toys as DESIGN.md asks for them: an op, a family with an op, a model. Each is one file and one line in a package's
list; a family is one file more, and one for each backend that computes it."""

OP_LINE = "from fla.ops.toy import chunk_toy, fused_recurrent_toy\n"
OP = '''"""Toy op: half of the state is forgotten at every token.

    S_t = S_{t-1} / 2 + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t
"""

import math

import torch

from fla.backends import decay
from fla.ops._spec import OpSpec, register
from fla.shapes import check_shapes

SHAPES = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "initial_state": "N H K V"}


def naive_recurrent_toy(q, k, v, scale=None, initial_state=None, output_final_state=False):
    """The two lines above, token by token."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, (q, k, v) = v.dtype, (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):
        state = state / 2 + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state)[:, None])
    return torch.cat(outputs, 1).to(out_dtype), state if output_final_state else None


def chunk_toy(
    q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, *, backend=None
):
    """The toy op, parallel over chunks."""
    return _toy(decay.chunk, q, k, v, scale, initial_state, output_final_state, cu_seqlens, backend)


def fused_recurrent_toy(
    q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, *, backend=None
):
    """The toy op, token by token."""
    return _toy(decay.recurrent, q, k, v, scale, initial_state, output_final_state, cu_seqlens, backend)


def _toy(form, q, k, v, scale, initial_state, output_final_state, cu_seqlens, backend):
    check_shapes(SHAPES, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, initial_state=initial_state)
    g_gamma = torch.full(q.shape[2:3], math.log(FORGET), dtype=torch.float64, device=q.device)
    return form(
        q, k, v, g_gamma=g_gamma, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, backend=backend, op="toy",
    )


FORGET = 0.5
SPEC = register(
    OpSpec(
        name="toy",
        family="decay",
        shapes=SHAPES,
        reference=naive_recurrent_toy,
        forms={"chunk": chunk_toy, "fused_recurrent": fused_recurrent_toy},
    )
)
'''

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

MODEL_LINE = "from fla.models.toy import ToyConfig, ToyForCausalLM, ToyModel\n"
MODEL = '''"""Toy language model over a layer that has no model of its own."""

from fla.layers.simple_gla import SimpleGatedLinearAttention
from fla.models._decoder import (
    DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, GatedMLP, register_causal_lm,
)


class ToyConfig(DecoderConfig):
    """Fields of `DecoderConfig`, and the toy's own."""

    model_type = "toy"

    attn_mode: str = "chunk"
    num_heads: int = 4
    gate_logit_normalizer: int = 8


class ToyMLP(GatedMLP):
    """The gated MLP of a `ToyBlock`."""


class ToyBlock(DecoderBlock):
    """`SimpleGatedLinearAttention` and `ToyMLP`."""

    mixer_cls, mlp_cls = SimpleGatedLinearAttention, ToyMLP


class ToyModel(DecoderModel):
    """The toy without a head."""

    config_class, block_cls = ToyConfig, ToyBlock


@register_causal_lm
class ToyForCausalLM(DecoderForCausalLM):
    """The toy language model."""

    config_class, model_cls = ToyConfig, ToyModel
'''
