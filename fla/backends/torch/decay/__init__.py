"""The family `decay` in plain PyTorch: chunked and vectorised, for CPUs and any other device.

Gates run in float64, so that `exp(G_i - G_j)` of a running sum `G` keeps the budget at any strength; a step below
-1000 is a zero either way. Everything else runs in float32 (float64 for float64 inputs, and for float32 inputs in a
backward that gives gate gradients: those are differences of large sums).
"""

import torch
from torch import Tensor

from fla.backends.decay import Gradients, Problem
from fla.backends.torch.decay import chunk, steps


def forward(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """Outputs in v's dtype, and the final state or None."""
    compute = steps if problem.gv is not None else chunk
    return compute.forward(problem, output_final_state, problem.state_dtype)


def backward(problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool) -> Gradients:
    """Gradients in the compute dtype; the caller casts them."""
    compute = steps if problem.gv is not None else chunk
    dtype = torch.float64 if needs_gates and problem.q.dtype == torch.float32 else problem.state_dtype
    return compute.backward(problem, do, dht, needs_gates, dtype)
