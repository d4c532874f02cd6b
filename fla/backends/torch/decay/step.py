"""Decoding on states that live in a pool, or that are overwritten: the recurrence itself is the ordinary forward."""

from dataclasses import replace

import torch
from torch import Tensor

from fla.backends.decay import Problem
from fla.backends.decay_step import gather
from fla.backends.torch.decay import chunk, steps
from fla.varlen import prepare_sequence_ids


def step(
    problem: Problem, state_indices: Tensor | None, output_final_state: bool, in_place: bool, v_first: bool
) -> tuple[Tensor, Tensor | None]:
    """`o`, and the fresh final states or None; `problem.initial_state` is a pool where `state_indices` say so."""
    pool = problem.initial_state
    assert pool is not None
    states = gather(pool, state_indices)
    problem = replace(problem, initial_state=states.mT if v_first else states)
    compute = chunk if problem.gv is None else steps
    with torch.autocast(problem.q.device.type, enabled=False):
        o, final = compute.forward(problem, True, problem.state_dtype)
    assert final is not None
    final = final.mT if v_first else final
    skipped = None if state_indices is None else state_indices < 0
    if skipped is not None:
        rows = skipped[:, None] if problem.cu_seqlens is None else skipped[_sequences(problem)][None]
        o = o.masked_fill(rows[..., None, None], 0.0)
        if not in_place:
            final = final.masked_fill(skipped[:, None, None, None], 0.0)
    if not in_place:
        return o, final.contiguous() if output_final_state else None
    if skipped is None or state_indices is None:
        pool.copy_(final)
    else:
        pool[state_indices[~skipped].long()] = final[~skipped]
    return o, None


def _sequences(problem: Problem) -> Tensor:
    assert problem.cu_seqlens is not None
    return prepare_sequence_ids(problem.cu_seqlens, problem.q.shape[1]).long()
