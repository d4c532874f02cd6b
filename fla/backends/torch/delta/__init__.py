"""The family `delta` in plain PyTorch: chunked and vectorised, for CPUs and any other device.

Gates are computed in float64, so that `exp(G_i - G_j)` of a running sum `G` is accurate however strong the decay is.
Gates below -1000 are raised to -1000, whose exponential is 0 as well. All else is computed in float32, with these
exceptions in float64:

- float64 inputs;
- float32 inputs with fewer than 16 key channels. The tokens of a chunk then erase nearly all that the state held, and
  what is left would be a small difference of large sums;
- float32 inputs with 256 key channels or more: the rounding error of a matrix product grows with its length, and the
  gradient of beta, one number from four such products, has no room for that;
- the backward of float32 inputs if it gives gradients of decays of channels, which are differences of large sums.
"""

import torch
from torch import Tensor

from fla.backends.delta import Problem
from fla.backends.torch._step import stepping
from fla.backends.torch.delta import chunk, steps
from fla.backends.torch.delta.prepare import prepare, raw_gradients

GATES = ("g", "gk", "gv", "A_log", "dt_bias")
NARROW, WIDE = 16, 256  # key channels


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, None]:
    """Nothing is kept for the backward, which computes again what it needs."""
    compute = steps if _goes_token_by_token(problem) else chunk
    o, state = compute.forward(problem, prepare(problem, _dtype(problem)))
    return o.to(problem.output_dtype), state.to(problem.state_dtype) if output_final_state else None, None


def backward(
    problem: Problem, saved: tuple, do: Tensor, dht: Tensor | None, needs: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Gradients in the dtype of the computation, which the caller casts."""
    compute = steps if _goes_token_by_token(problem) else chunk
    needs_gates = any(name in needs for name in GATES)
    of_channels = problem.gk is not None or compute is steps
    dtype = _dtype(problem, needs_gates and of_channels)
    inputs = prepare(problem, dtype)
    found, dh0 = compute.backward(problem, inputs, do.to(dtype), dht, needs_gates)
    return {**raw_gradients(problem, inputs, found, dtype), "initial_state": dh0}


def chunk_states(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """`o`, the final state or None, and the states before each chunk."""
    o, state, starts = chunk.forward_with_states(problem, prepare(problem, _dtype(problem)))
    final = state.to(problem.state_dtype) if output_final_state else None
    return o.to(problem.output_dtype), final, starts.to(problem.state_dtype)


def _dtype(problem: Problem, differences: bool = False) -> torch.dtype:
    """The dtype to compute in; `differences`: small ones of large sums are wanted."""
    if problem.q.dtype == torch.float32 and (differences or not NARROW <= problem.q.shape[-1] < WIDE):
        return torch.float64
    return problem.state_dtype


def _goes_token_by_token(problem: Problem) -> bool:
    """Whether the recurrence has decays or write strengths of value channels, which chunks do not."""
    return problem.gv is not None or (problem.beta is not None and problem.beta.dim() == 4)


step = stepping(forward)
