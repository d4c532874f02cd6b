"""Running a recurrence from the last token of every sequence to the first, by any backend: the tokens are turned
around, the recurrence runs forward, and its output is turned back."""

import torch
from torch import Tensor

from fla.varlen import check_cu_seqlens


def turned_around(
    tensors: tuple[Tensor | None, ...], initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """`tensors` `[B, T, ...]` in reverse order of tokens, and the states and bounds that belong to them.

    A packed row is read from its end, so that its sequences come in reverse order too.
    """
    if cu_seqlens is not None:
        first = next(x for x in tensors if x is not None)
        if not torch.compiler.is_compiling():
            check_cu_seqlens(cu_seqlens, first.shape[1])  # an error shows them as they were given
        cu_seqlens = first.shape[1] - cu_seqlens.flip(0)
        initial_state = None if initial_state is None else initial_state.flip(0)
    return [None if x is None else x.flip(1) for x in tensors], initial_state, cu_seqlens


def turned_back(o: Tensor, state: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None]:
    """Outputs and final states in the order of the tokens and sequences that `turned_around` got."""
    return o.flip(1), state.flip(0) if packed and state is not None else state


def refuse_steps(inplace_final_state: bool) -> None:
    """Raise ValueError: decoding on states that the caller owns has no `reverse`."""
    option = "inplace_final_state" if inplace_final_state else "state_indices"
    raise ValueError(f"reverse must be False with {option}, got True: decoding goes on from the last token")
