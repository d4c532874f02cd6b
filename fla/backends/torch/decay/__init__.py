"""The family `decay` in plain PyTorch: chunked and vectorised, for CPUs and any other device.

Gates run in float64, so that `exp(G_i - G_j)` of a running sum `G` keeps the budget at any strength; a step below
-1000 is a zero either way. Everything else runs in float32 (float64 for float64 inputs, and for float32 inputs in a
backward that gives gate gradients: those are differences of large sums).
"""

import torch
from torch import Tensor

from fla.backends.decay import DEAD_LOG_DECAY, Problem
from fla.backends.torch._step import stepping
from fla.backends.torch.decay import chunk, steps

GATES = ("g", "gk", "gv")


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, None]:
    """Nothing is kept: the backward computes again what it needs."""
    compute = steps if problem.gv is not None else chunk
    return (*compute.forward(problem, output_final_state, problem.state_dtype), None)


def backward(
    problem: Problem, saved: tuple, do: Tensor, dht: Tensor | None, needs: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Gradients in the compute dtype; the caller casts them."""
    compute = steps if problem.gv is not None else chunk
    needs_gates = any(name in needs for name in GATES)
    dtype = torch.float64 if needs_gates and problem.q.dtype == torch.float32 else problem.state_dtype
    found = compute.backward(problem, do, dht, needs_gates, dtype)
    if problem.q.dtype != torch.float64:
        for name in GATES:
            gate, gradient = getattr(problem, name), found.get(name)
            if gate is not None and gradient is not None:  # below this it is rounding noise
                found[name] = gradient.masked_fill(gate < DEAD_LOG_DECAY, 0.0)
    return found


step = stepping(forward)
