"""The family `decay` on Triton: the one-pass forward, the backward by roles, the recurrent kernel for decoding.

Files: `prepare.py` (what is computed of the gates first), `_decay.py` (what the chunk kernels share), `segments.py`,
`slices.py`, `chunk_forward.py`, `chunk_backward.py`, `far_backward.py`, `gate_gradient.py`; `step.py`, `recurrent.py`.

float32 is computed token by token in both forms: every one of its digits, for every gate, which no dot gives.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fla.backends.decay import Gradients, Problem
from fla.backends.triton.decay import chunk_backward, chunk_forward, recurrent, step


def forward(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """Outputs in v's dtype, the final state in float32 or None. ValueError for what the kernels do not cover."""
    step.check(problem)
    if problem.form == "recurrent" or problem.q.dtype == torch.float32:
        return recurrent.forward(problem, output_final_state)
    return chunk_forward.forward(problem, output_final_state)


def backward(problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool) -> Gradients:
    """Gradients. A recurrent form runs the chunk form's backward where the maths is the same."""
    if problem.scale == 0.0:  # the kernels carry state gradients in units of scale; without outputs any unit will do
        problem, do = replace(problem, scale=1.0), torch.zeros_like(do)
    if problem.gv is not None or problem.q.dtype == torch.float32:
        return recurrent.backward(problem, do, dht, needs_gates)
    dq, dk, dv, dg, dh0 = chunk_backward.backward(problem, do, dht, needs_gates)
    vector = problem.gk is not None
    return Gradients(dq, dk, dv, None if vector else dg, dg if vector else None, None, dh0, final=True)
