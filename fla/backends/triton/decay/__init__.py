"""The family `decay` on Triton: chunk by chunk in 16 bits, token by token otherwise.

| file | what is in it |
| --- | --- |
| `_decay.py` | what the chunk kernels share: the kinds of decay |
| `prepare.py` | what is computed of the gates first, and what a forward keeps for its backward |
| `segments.py` | what each segment of a sequence adds to the states |
| `chunk_forward.py` | the chunked forward |
| `chunk_backward.py`, `near_backward.py`, `far_backward.py`, `gate_gradient.py` | the chunked backward |
| `recurrent_forward.py`, `recurrent_backward.py` | token by token; the forward also decodes |

float32 is computed token by token in both forms, because no dot keeps all of its digits for every gate. So is a forward
of few heads with gates over at most a chunk of tokens: one launch takes less time than the several of the chunk form.
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

FEW_HEADS = 64  # with so many states, 64 tokens one by one take no longer than a launch (40 us on an H200)


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    """The outputs in v's dtype, the final state in float32 or None, and if `keep` what the backward takes.

    ValueError for what the kernels do not cover.
    """
    check_supported(problem)
    return with_rehearsal(_forward, backward, problem, output_final_state, keep)


def _forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    if problem.form == "recurrent" or problem.q.dtype == torch.float32 or _is_small(problem):
        o, ht = recurrent_forward.forward(problem, output_final_state)
        return o, ht, Saved(problem) if keep else None
    return chunk_forward.forward(problem, output_final_state, keep)


def _is_small(problem: Problem) -> bool:
    """Whether a forward token by token, in one launch, beats the several launches that gates need.

    Shapes alone decide.
    """
    if problem.g is None and problem.gk is None:
        return False
    return problem.q.shape[1] <= CHUNK.value and problem.num_states * problem.q.shape[2] <= FEW_HEADS


def backward(
    problem: Problem, saved: tuple[Tensor | None, ...], do: Tensor, dht: Tensor | None, needs
) -> dict[str, Tensor]:
    """The gradients by the names of the inputs.

    The recurrent form takes the backward of the chunk form where the maths is the same. The gradient of a gate below
    -16 nats is 0.
    """
    if problem.scale == 0.0:  # kernels divide by scale; with do = 0, any other scale gives the same
        problem, do = replace(problem, scale=1.0), torch.zeros_like(do)
    needs_gates = "g" in needs or "gk" in needs or "gv" in needs
    if problem.gv is not None or problem.q.dtype == torch.float32:
        return recurrent_backward.backward(problem, do, dht, needs_gates)
    return chunk_backward.backward(problem, saved, do, dht, needs_gates)
