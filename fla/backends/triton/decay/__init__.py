"""The family `decay` on Triton: the one-pass forward, the backward by roles, the recurrent kernel for decoding.

Files: `_decay.py` (decays inside a chunk), `chunk_forward.py`, `chunk_backward.py` (scalar kinds),
`vector_backward.py`, `gate_gradient.py`, `recurrent.py`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fla.backends import interpreting
from fla.backends.decay import Gradients, Problem
from fla.backends.triton.decay import chunk_backward, chunk_forward, recurrent, vector_backward
from fla.backends.triton.decay._decay import VECTOR, kind_of

MAX_HEAD_DIM = 128


def forward(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """Outputs in v's dtype, the final state in float32 or None. ValueError for what the kernels do not cover."""
    _check(problem)
    with _device(problem.q):
        if problem.form == "recurrent":
            return recurrent.forward(problem, output_final_state)
        return chunk_forward.forward(problem, *kind_of(problem), output_final_state)


def backward(problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool) -> Gradients:
    """Gradients. A recurrent form runs the chunk form's backward where the maths is the same."""
    if problem.scale == 0.0:  # the kernels carry state gradients in units of scale; without outputs any unit will do
        problem, do = replace(problem, scale=1.0), torch.zeros_like(do)
    with _device(problem.q):
        if problem.gv is not None:
            return recurrent.backward(problem, do, dht, needs_gates)
        kind, gate = kind_of(problem)
        compute = vector_backward if kind == VECTOR.value else chunk_backward
        dq, dk, dv, dg, dh0 = compute.backward(problem, kind, gate, do, dht, needs_gates)
    return Gradients(dq, dk, dv, dg if problem.gk is None else None, dg if problem.gk is not None else None, None, dh0)


def _check(problem: Problem) -> None:
    K, V = problem.q.shape[-1], problem.v.shape[-1]
    if max(K, V) > MAX_HEAD_DIM:
        raise ValueError(
            f"the Triton backend takes head dimensions up to {MAX_HEAD_DIM}, got K = {K} (of q) and V = {V} (of v); "
            "use backend='torch'"
        )
    dtype = problem.q.dtype
    if dtype not in (torch.float16, torch.bfloat16) and not (dtype == torch.float32 and interpreting()):
        raise ValueError(f"the Triton backend takes float16 and bfloat16, got q of {dtype}; use backend='torch'")


def _device(tensor: Tensor):
    return torch.cuda.device_of(tensor)
