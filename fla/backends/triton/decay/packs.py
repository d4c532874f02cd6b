"""The short sequences of a pack, computed as one row whose chunks hold several of them.

A program for each sequence wastes what is empty in its last chunk, half a chunk on average. As one row a pack takes as
many chunks as a single sequence of its length. With `f_i` the first token of the sequence of token i:

    scores                          the pairs j <= i with j >= f_i
    the state before a chunk        reaches the rows with f_i before the chunk
    the state behind it             takes the rows with the f of the chunk's last row, and keeps what it had if that f
                                    lies before the chunk

and the same in reverse for gradients of states. Sequences with initial or final states have programs of their own. (As
within a sequence, a NaN or an infinity reaches all tokens of its chunk, here those of other sequences too.)
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._launch import ceil_div, launch

BLOCK = tl.constexpr(1024)
SHORT_AVERAGE = 4096  # tokens a sequence on average, up to which a pack is joined
# with decays per channel; fp16's operands are float32, which leaves no registers for masks
VECTOR_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16,)


@triton.jit(do_not_specialize=["T", "N"])
def begins_kernel(cu_seqlens, begins, T, N):
    """`begins` `[T]`: the first token of the sequence of each token."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_n = tl.zeros([BLOCK], tl.int32)  # the last sequence that begins at the token or before it, found by halving
    b_last = b_n + N - 1
    while tl.max(b_last - b_n, 0) > 0:
        b_middle = (b_n + b_last + 1) // 2
        inside = tl.load(cu_seqlens + b_middle).to(tl.int64) <= o_t
        b_n = tl.where(inside, b_middle, b_n)
        b_last = tl.where(inside, b_last, b_middle - 1)
    tl.store(begins + o_t, tl.load(cu_seqlens + b_n).to(tl.int32), mask=o_t < T)


def join(problem: Problem, has_states: bool) -> None:
    """Has the problem computed as one row, if it is a pack of short sequences. Decided from shapes alone.

    `has_states`: whether final states, or gradients of them, are in play."""
    if problem.cu_seqlens is None or problem.initial_state is not None or has_states or problem.begins is not None:
        return
    if problem.gk is not None and problem.q.dtype not in VECTOR_DTYPES:
        return
    T, N = problem.q.shape[1], problem.num_states
    if N == 0 or T > N * SHORT_AVERAGE:
        return
    begins = problem.cu_seqlens.new_empty(T, dtype=torch.int32)
    launch(begins_kernel, ceil_div(T, BLOCK.value), (problem.cu_seqlens, begins, T, N), {})
    problem.begins = begins
