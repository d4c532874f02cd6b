"""The family `decay` in plain PyTorch: chunked and vectorised, for CPUs and any other device.

Gates are computed in float64, so that `exp(G_i - G_j)` of a running sum `G` is accurate however strong the decay is.
Gates below -1000 are raised to -1000, whose exponential is 0 as well. All else is computed in float32, with two
exceptions in float64: float64 inputs, and the backward of float32 inputs if it gives gate gradients, which are
differences of large sums.
"""

import torch
from torch import Tensor

from fla.backends._gates import DEAD_LOG_DECAY
from fla.backends.decay import Problem
from fla.backends.torch._step import stepping
from fla.backends.torch.decay import chunk, steps

GATES = ("g", "gk", "gv")


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, None]:
    """Nothing is kept for the backward, which computes again what it needs."""
    compute = steps if problem.gv is not None else chunk
    return (*compute.forward(problem, output_final_state, problem.state_dtype), None)


def backward(
    problem: Problem, saved: tuple, do: Tensor, dht: Tensor | None, needs: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Gradients in the dtype of the computation, which the caller casts."""
    compute = steps if problem.gv is not None else chunk
    needs_gates = any(name in needs for name in GATES)
    dtype = torch.float64 if needs_gates and problem.q.dtype == torch.float32 else problem.state_dtype
    found = compute.backward(problem, do, dht, needs_gates, dtype)
    if problem.q.dtype != torch.float64:
        for name in GATES:
            gate, gradient = getattr(problem, name), found.get(name)
            if gate is not None and gradient is not None:  # the gradient of a stronger decay is rounding noise
                found[name] = gradient.masked_fill(gate < DEAD_LOG_DECAY, 0.0)
    return found


step = stepping(forward)
