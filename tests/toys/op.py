"""A toy op of the family `decay`: one file, and one line in the list of ops."""

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
