"""The family `decay` on Triton: the one-pass forward, the backward by roles, the recurrent kernel for decoding.

Files: `prepare.py` (what is computed of the gates first), `_decay.py` (what the chunk kernels share), `packs.py`,
`segments.py`, `slices.py`, `chunk_forward.py`, `chunk_backward.py`, `far_backward.py`, `gate_gradient.py`; `step.py`,
`recurrent.py`.

float32 is computed token by token in both forms: every one of its digits, for every gate, which no dot gives. So is a
chunk's worth of tokens of few heads with gates, where one launch is all that the time goes into.
"""

import functools
from dataclasses import fields, replace

import torch
from torch import Tensor

from fla.backends.decay import Gradients, Problem
from fla.backends.triton._ahead import under_way
from fla.backends.triton.decay import chunk_backward, chunk_forward, recurrent, step
from fla.backends.triton.decay._decay import CHUNK

SMALL = 64  # heads of all sequences, up to which 64 tokens one by one take no longer than a launch (an H200: 40 us)


def forward(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """Outputs in v's dtype, the final state in float32 or None. ValueError for what the kernels do not cover."""
    step.check(problem)
    under_way.call = functools.partial(_rehearse, problem, output_final_state)
    try:
        return _forward(problem, output_final_state)
    finally:
        under_way.call = None  # it holds the problem's tensors


def _forward(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    if problem.form == "recurrent" or problem.q.dtype == torch.float32 or _is_small(problem):
        return recurrent.forward(problem, output_final_state)
    return chunk_forward.forward(problem, output_final_state)


def _rehearse(problem: Problem, output_final_state: bool) -> None:
    """The launches of this forward, and of the backward that will follow it, on tensors without memory."""
    given = {x.name: getattr(problem, x.name) for x in fields(problem)}
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}
    made = Problem(**(given | {"g_gamma": problem.g_gamma}))  # that one is known by its identity (`is_mild`)
    o, _ = _forward(made, output_final_state)
    if problem.keeps:
        gates = (problem.g, problem.gk, problem.gv)
        backward(made, o.to(made.v.dtype), None, any(gate is not None for gate in gates))


def _is_small(problem: Problem) -> bool:
    """Whether a token by token forward in one launch beats the launches that gates need (from shapes alone)."""
    if problem.g is None and problem.gk is None:
        return False
    return problem.q.shape[1] <= CHUNK.value and problem.num_states * problem.q.shape[2] <= SMALL


def backward(problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool) -> Gradients:
    """Gradients. A recurrent form runs the chunk form's backward where the maths is the same."""
    if problem.scale == 0.0:  # the kernels carry state gradients in units of scale; without outputs any unit will do
        problem, do = replace(problem, scale=1.0), torch.zeros_like(do)
    if problem.gv is not None or problem.q.dtype == torch.float32:
        return recurrent.backward(problem, do, dht, needs_gates)
    dq, dk, dv, dg, dh0 = chunk_backward.backward(problem, do, dht, needs_gates)
    vector = problem.gk is not None
    return Gradients(dq, dk, dv, None if vector else dg, dg if vector else None, None, dh0, final=True)
