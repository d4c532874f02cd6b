"""The family `decay` on Triton: the one-pass forward, the backward by roles, the recurrent kernels.

| file | what is in it |
| --- | --- |
| `prepare.py` | what is computed of the gates first, and what a forward keeps for its backward |
| `_decay.py` | what the chunk kernels share |
| `segments.py` | what segments of a sequence add to the states |
| `chunk_forward.py` | the chunked forward |
| `chunk_backward.py`, `far_backward.py`, `gate_gradient.py` | its backward |
| `recurrent_forward.py`, `recurrent_backward.py` | token by token; the former decodes too |

float32 is computed token by token in both forms: every one of its digits, for every gate, which no dot gives. So is a
chunk's worth of tokens of few heads with gates, where one launch is all that the time goes into.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fla.backends._recurrence import Saved
from fla.backends.decay import Problem
from fla.backends.triton._ahead import with_rehearsal
from fla.backends.triton._sequence import CHUNK
from fla.backends.triton.decay import chunk_backward, chunk_forward, recurrent_backward, recurrent_forward
from fla.backends.triton.decay.recurrent_forward import check_supported, step

__all__ = ["backward", "forward", "step"]

FEW_HEADS = 64  # heads of all sequences, up to which 64 tokens one by one take no longer than a launch (an H200: 40 us)


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    """Outputs in v's dtype, the final state in float32 or None, and if `keep` what the backward takes.

    ValueError for what the kernels do not cover."""
    check_supported(problem)
    return with_rehearsal(_forward, backward, problem, output_final_state, keep)


def _forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    if problem.form == "recurrent" or problem.q.dtype == torch.float32 or _is_small(problem):
        o, ht = recurrent_forward.forward(problem, output_final_state)
        return o, ht, Saved(problem) if keep else None
    return chunk_forward.forward(problem, output_final_state, keep)


def _is_small(problem: Problem) -> bool:
    """Whether a token by token forward in one launch beats the launches that gates need (from shapes alone)."""
    if problem.g is None and problem.gk is None:
        return False
    return problem.q.shape[1] <= CHUNK.value and problem.num_states * problem.q.shape[2] <= FEW_HEADS


def backward(
    problem: Problem, saved: tuple[Tensor | None, ...], do: Tensor, dht: Tensor | None, needs
) -> dict[str, Tensor]:
    """Gradients by the names of the inputs. A recurrent form runs the chunk form's backward where the maths is the
    same. A gate's gradient is 0 where the gate is below -16 nats."""
    if problem.scale == 0.0:  # the kernels carry state gradients in units of scale; without outputs any unit will do
        problem, do = replace(problem, scale=1.0), torch.zeros_like(do)
    needs_gates = "g" in needs or "gk" in needs or "gv" in needs
    if problem.gv is not None or problem.q.dtype == torch.float32:
        return recurrent_backward.backward(problem, do, dht, needs_gates)
    return chunk_backward.backward(problem, saved, do, dht, needs_gates)
