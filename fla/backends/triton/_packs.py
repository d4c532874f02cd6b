"""A pack of short sequences is joined: computed as one row whose chunks hold several sequences each.

With a program for each sequence, the last chunk of each is half empty on average. A joined pack takes as many chunks as
one sequence of its length. Let f_i be the first token of the sequence that token i belongs to:

- The scores of a chunk are those of the pairs j <= i with j >= f_i.
- The state before a chunk reaches the rows i whose f_i lies before the chunk.
- The state after a chunk takes the rows i whose f_i is that of the chunk's last row. It keeps what it held before the
  chunk if that f_i lies before the chunk, and drops it otherwise.

Gradients of states follow the same rules in reverse. Packs with initial or final states are not joined: each of their
sequences has programs of its own. (A NaN or an infinity reaches all tokens of its chunk. In a joined pack these may
belong to other sequences.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends.triton._launch import ceil_div, launch

BLOCK = tl.constexpr(1024)
SHORT_AVERAGE = 4096  # a pack is joined if its sequences have at most so many tokens on average


@triton.jit(do_not_specialize=["T", "N"])
def begins_kernel(cu_seqlens, begins, T, N):
    """Writes `begins` `[T]`: the first token of each token's sequence."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_n = tl.zeros([BLOCK], tl.int32)  # bisection for the last sequence that begins at or before the token
    b_last = b_n + N - 1
    while tl.max(b_last - b_n, 0) > 0:
        b_middle = (b_n + b_last + 1) // 2
        inside = tl.load(cu_seqlens + b_middle).to(tl.int64) <= o_t
        b_n = tl.where(inside, b_middle, b_n)
        b_last = tl.where(inside, b_last, b_middle - 1)
    tl.store(begins + o_t, tl.load(cu_seqlens + b_n).to(tl.int32), mask=o_t < T)


def join(cu_seqlens: Tensor | None, T: int, has_states: bool) -> Tensor | None:
    """`begins` `[T]` if the pack of T tokens is to be joined, else None.

    Shapes alone decide. `has_states`: whether there are initial or final states, or gradients of them.
    """
    if cu_seqlens is None or has_states:
        return None
    N = cu_seqlens.shape[0] - 1
    if N == 0 or T > N * SHORT_AVERAGE:
        return None
    begins = cu_seqlens.new_empty(T, dtype=torch.int32)
    launch(begins_kernel, ceil_div(T, BLOCK.value), (cu_seqlens, begins, T, N), {})
    return begins
