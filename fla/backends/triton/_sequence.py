"""Which tokens a program computes, for the kernels of every chunked family.

A program computes one head of one sequence, or of one segment of it: a sequence may be cut into segments of L tokens,
with a program for each. Kernels walk the tokens in chunks of CHUNK. There are N sequences (the rows of a batch, or the
sequences of a pack) and N H states.

The short sequences of a pack may be joined (`_packs.py`): they are computed as one row whose chunks hold several of
them. A kernel then gets `begins` `[T]`, the first token of each token's sequence, and the helpers that take `begins`
mask by it. Without joined sequences `begins` is None, and these helpers compile to nothing.

Segments hand their states on through `segment_sums`. Each segment of each state has a slot in it, `[N H, S]`. A slot
holds what the segment adds to the state, `[K, V]`, and then by what it decays the state before it, `[K]`.

The functions of a kernel hand on where they work as a tuple `place`. It begins with these eight fields, in this order;
what a file appends stands where the file unpacks it.

    start             first token of the sequence (64 bits)
    t_begin, t_end    bounds of the segment, counted from `start`
    length            tokens of the sequence
    i_state           number of the state (64 bits): i_n H + i_h, for head i_h of sequence i_n
    num_states        N H
    i_s               number of the segment within its sequence
    S                 segments that every sequence has slots for: those of a sequence of T tokens
"""

import functools

import triton
import triton.language as tl

from fla.backends.triton._launch import ceil_div
from fla.backends.triton._lib import load_state

CHUNK = tl.constexpr(64)  # tokens a chunk
TILE = tl.constexpr(64)  # channels a tile: narrower tiles are unsafe on Hopper
MIN_SEGMENT_CHUNKS = 16  # chunks a segment, at least
UNSEGMENTED_PROGRAMS = 128  # from so many programs on there are no segments: they read half of the inputs twice
SEGMENTED_PROGRAMS = 200  # where there are segments: their number doubles until there are so many programs


@triton.jit
def sequence_bounds(cu_seqlens, i_n, T):
    """The first token (64 bits) and the number of tokens of sequence `i_n`."""
    if cu_seqlens is None:
        start = i_n.to(tl.int64) * T
        length = T
    else:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def segment_bounds(cu_seqlens, i_n, i_s, T, L):
    """The first token (64 bits) of sequence `i_n`, its length, and the bounds of its segment `i_s`.

    The bounds are counted from the sequence's first token.
    """
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    return start, length, i_s * L, tl.minimum(length, (i_s + 1) * L)


@triton.jit
def is_past_end(i_s, t_begin, length):
    """Whether a segment lies past the end of its sequence. (A sequence without tokens still has its first segment.)"""
    return (t_begin >= length) & (i_s > 0)


@triton.jit
def head_offset(cu_seqlens, start, i_h, T, H):
    """Offset of a head's first token in what is stored head by head: `[B, H, T]`, or `[H, T]` for a pack."""
    if cu_seqlens is None:
        return start * H + i_h * T
    else:
        return start + i_h * T


@triton.jit
def num_chunk_slots(cu_seqlens, T, N):
    """How many numbers there are for chunks: at least as many as chunks. See `first_chunk_slot`."""
    return N * tl.cdiv(T, CHUNK) if cu_seqlens is None else T // CHUNK + N


@triton.jit
def first_chunk_slot(cu_seqlens, start, i_n, T):
    """The number of a sequence's first chunk; the next chunks count on from it.

    No two chunks have the same number. The numbering needs no sums over sequences, so some numbers remain unused.
    """
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, CHUNK)
    else:
        return start // CHUNK + i_n


@triton.jit
def find_chunk(cu_seqlens, slot, N, T):
    """Where the chunk numbered `slot` lies.

    Returns its sequence, the first token (64 bits) and the length of that, and the chunk's first token counted from the
    sequence's.
    """
    if cu_seqlens is None:
        i_n = slot // tl.cdiv(T, CHUNK)
    else:
        i_n, i_last = slot * 0, slot * 0 + N - 1
        while i_n < i_last:
            middle = (i_n + i_last + 1) // 2
            inside = first_chunk_slot(cu_seqlens, tl.load(cu_seqlens + middle), middle, T) <= slot
            i_n = tl.where(inside, middle, i_n)
            i_last = tl.where(inside, i_last, middle - 1)
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    return i_n, start, length, (slot - first_chunk_slot(cu_seqlens, start, i_n, T)).to(tl.int32) * CHUNK


@triton.jit
def sequence_starts(begins, t, t_end, C: tl.constexpr):
    """Where the sequences of the chunk at `t` start: `b_starts` `[C]` for each token, and `last` for the last token.

    Starts are counted from `t`, so they are negative for a sequence that started before the chunk. Where nothing is
    joined, nobody reads them.
    """
    if begins is None:
        return 0, 0
    else:
        b_starts = tl.load(begins + tl.minimum(t + tl.arange(0, C), t_end - 1)) - t
        return b_starts, tl.load(begins + tl.minimum(t + C, t_end) - 1) - t


@triton.jit
def same_sequence_pairs(m_causal, begins, b_starts, REVERSE: tl.constexpr):
    """Those pairs of `m_causal` `[C, C]` whose two tokens belong to one sequence.

    The pairs are of a row and an earlier column, or for REVERSE a later column.
    """
    if begins is None:
        return m_causal
    else:
        o_c = tl.arange(0, m_causal.shape[0])
        if REVERSE:
            return m_causal & (o_c[:, None] >= b_starts[None, :])
        else:
            return m_causal & (o_c[None, :] >= b_starts[:, None])


@triton.jit
def keep_started_before(x, begins, b_starts):
    """`x` `[C, D]` with zeros in all rows but those of the sequence that started before the chunk."""
    if begins is None:
        return x
    else:
        return tl.where((b_starts < 0)[:, None], x, 0.0).to(x.dtype)


@triton.jit
def keep_last_sequence(x, begins, last):
    """`x` `[C, D]` with zeros in all rows but those of the chunk's last sequence, which may go on after the chunk."""
    if begins is None:
        return x
    else:
        return tl.where((tl.arange(0, x.shape[0]) >= last)[:, None], x, 0.0).to(x.dtype)


@triton.jit
def keep_if_spanning(x, begins, last):
    """`x` if one sequence spans the whole chunk and the token before it, else zeros."""
    if begins is None:
        return x
    else:
        # masks the bits: for Blackwell, Triton 3.6 fails on a `where` between an accumulator and its next dot
        bits = x.to(tl.int32, bitcast=True) & tl.where(last < 0, -1, 0)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def state_before(h0, sums, i_state, i_s, S, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """A tile of the state at the start of segment `i_s`, laid out as in `load_state`.

    It is the initial state and what the earlier segments added, each decayed by the segments in between.
    """
    b_S = (o_k + o_v).to(tl.float32) * 0.0
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k, o_v, K, V)
    if sums is not None:
        for s in range(0, i_s):
            b_S = apply_segment(b_S, sums + (i_state * S + s) * (K * V + K), o_k, o_v, K, V)
    return b_S


@triton.jit
def state_gradient_after(
    dht, sums, num_states, i_state, i_s, S, num_segments, scale, o_k, o_v, K: tl.constexpr, V: tl.constexpr
):
    """A tile of the gradient of the state at the end of segment `i_s` of `num_segments`, divided by `scale`.

    This is `state_before` reversed. The slots of gradients lie behind the slots of all states.
    """
    b_dS = (o_k + o_v).to(tl.float32) * 0.0
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k, o_v, K, V) / scale
    if sums is not None:
        for s in range(0, num_segments - 1 - i_s):
            slot = sums + ((num_states + i_state) * S + num_segments - 1 - s) * (K * V + K)
            b_dS = apply_segment(b_dS, slot, o_k, o_v, K, V)
    return b_dS


@triton.jit
def apply_segment(b_S, slot, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """`b_S` after a segment: decayed by it, plus what it adds. `slot` points at its sum `[K, V]` and decay `[K]`."""
    b_decay = tl.load(slot + K * V + o_k, mask=o_k < K, other=0.0)
    return b_S * b_decay + load_state(slot, 0, o_k, o_v, K, V)


@functools.cache
def padded(size: int) -> int:
    """Width of the tile that holds a head dimension."""
    return max(TILE.value, triton.next_power_of_2(size))


@functools.lru_cache(maxsize=4096)
def segment_length(T: int, programs: int) -> int:
    """Tokens a segment, given how many programs a forward without segments has (N H times the tiles of V).

    A result of at least T means that there are no segments.
    """
    pieces = 1
    if programs < UNSEGMENTED_PROGRAMS:
        while programs * pieces < SEGMENTED_PROGRAMS and 2 * pieces * MIN_SEGMENT_CHUNKS * CHUNK.value <= T:
            pieces *= 2
    return ceil_div(ceil_div(T, pieces), CHUNK.value) * CHUNK.value
