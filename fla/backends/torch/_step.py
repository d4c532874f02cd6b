"""Decoding on states that the caller owns: gather the states, run the family's `forward`, write the results back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fla.backends._step import gather
from fla.varlen import prepare_sequence_ids


def stepping(forward: Callable[..., tuple[Tensor, Tensor | None, Any]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The `step` of a backend that has this `forward`; `fla.backends._step` says what it must do."""

    def step(
        problem: Any, state_indices: Tensor | None, output_final_state: bool, in_place: bool, v_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        pool: Tensor = problem.initial_state
        states = gather(pool, state_indices)
        problem = replace(problem, initial_state=states.mT if v_first else states)
        with torch.autocast(problem.device_type, enabled=False):
            o, final, _ = forward(problem, True, False)
        assert final is not None
        final = final.mT if v_first else final
        skipped = None if state_indices is None else state_indices < 0
        if skipped is not None:
            rows = skipped[:, None] if problem.cu_seqlens is None else skipped[_sequence_ids(problem)][None]
            o = o.masked_fill(rows[(..., *[None] * (o.dim() - 2))], 0.0)
            if not in_place:
                final = final.masked_fill(skipped[(..., *[None] * (final.dim() - 1))], 0.0)
        if not in_place:
            return o, final.contiguous() if output_final_state else None
        if skipped is None or state_indices is None:
            pool.copy_(final)
        else:
            pool[state_indices[~skipped].long()] = final[~skipped]
        return o, None

    return step


def _sequence_ids(problem: Any) -> Tensor:
    return prepare_sequence_ids(problem.cu_seqlens, problem.sizes[1]).long()
