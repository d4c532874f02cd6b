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
from torch import Tensor

from fla.backends.triton._launch import ceil_div, launch

BLOCK = tl.constexpr(1024)
SHORT_AVERAGE = 4096  # tokens a sequence on average, up to which a pack is joined


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


def join(cu_seqlens: Tensor | None, T: int, has_states: bool) -> Tensor | None:
    """`begins` `[T]` if the T tokens are a pack of short sequences, which is to be computed as one row, else None.

    This is decided from shapes alone. `has_states`: whether initial or final states, or gradients of them, are in play.
    """
    if cu_seqlens is None or has_states:
        return None
    N = cu_seqlens.shape[0] - 1
    if N == 0 or T > N * SHORT_AVERAGE:
        return None
    begins = cu_seqlens.new_empty(T, dtype=torch.int32)
    launch(begins_kernel, ceil_div(T, BLOCK.value), (cu_seqlens, begins, T, N), {})
    return begins
