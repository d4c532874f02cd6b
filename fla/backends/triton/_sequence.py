"""Where a program's piece of the work lies: the floor on which the kernels of every chunked family stand.

A program computes one head of one sequence, or of one SEGMENT of it: a sequence may be cut into segments of L tokens,
each a program of its own. The kernels walk their tokens in chunks of CHUNK.

The short sequences of a pack may be JOINED (`_packs.py`): they are computed as one row whose chunks hold several of
them. A kernel then gets `begins` `[T]`, the first token of each token's sequence, and the helpers that take `begins`
mask by it. Without it (None) they compile to nothing.

Between the segments of a sequence the state is handed on by SLOTS `[N H, S]`: what a segment adds to a state, `[K, V]`,
and then how it decays what came before, `[K]`.
"""

import functools

import triton
import triton.language as tl

from fla.backends.triton._launch import ceil_div
from fla.backends.triton._lib import load_state

CHUNK = tl.constexpr(64)  # tokens a chunk
TILE = tl.constexpr(64)  # channels of a tile: narrower ones are unsafe on Hopper
SHORTEST = 16  # chunks a segment has at least
ENOUGH = 128  # programs that need no segments, which cost a second read of half the inputs
FULL = 200  # programs to come to with segments


@triton.jit
def sequence(cu_seqlens, i_n, T):
    """First token (64 bits) and number of tokens of sequence `i_n`."""
    if cu_seqlens is None:
        start = i_n.to(tl.int64) * T
        length = T
    else:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def segment(cu_seqlens, i_n, i_s, T, L):
    """First token (64 bits) of sequence `i_n`, its length, and the bounds of its segment `i_s` relative to it."""
    start, length = sequence(cu_seqlens, i_n, T)
    return start, length, i_s * L, tl.minimum(length, (i_s + 1) * L)


@triton.jit
def is_behind(i_s, t_begin, length):
    """Whether a segment lies behind its sequence (a sequence without tokens still has its first one)."""
    return (t_begin >= length) & (i_s > 0)


@triton.jit
def head_base(cu_seqlens, start, i_h, T, H):
    """Where a head's numbers begin in what is stored head by head (`[B, H, T]`; of a pack `[H, T]`)."""
    if cu_seqlens is None:
        return start * H + i_h * T
    else:
        return start + i_h * T


@triton.jit
def chunk_slots(cu_seqlens, T, N):
    """Numbers for chunks (`chunk_slot`), at least one for each."""
    return N * tl.cdiv(T, CHUNK) if cu_seqlens is None else T // CHUNK + N


@triton.jit
def chunk_slot(cu_seqlens, start, i_n, T):
    """The number of a sequence's first chunk, of which no other sequence's chunks have any."""
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, CHUNK)
    else:
        return start // CHUNK + i_n


@triton.jit
def find_chunk(cu_seqlens, slot, N, T):
    """The sequence to which the chunk numbered `slot` belongs, its first token (64 bits), its length, and the chunk's
    first token in it."""
    if cu_seqlens is None:
        i_n = slot // tl.cdiv(T, CHUNK)
    else:
        i_n, last = slot * 0, slot * 0 + N - 1
        while i_n < last:
            middle = (i_n + last + 1) // 2
            inside = chunk_slot(cu_seqlens, tl.load(cu_seqlens + middle), middle, T) <= slot
            i_n = tl.where(inside, middle, i_n)
            last = tl.where(inside, last, middle - 1)
    start, length = sequence(cu_seqlens, i_n, T)
    return i_n, start, length, (slot - chunk_slot(cu_seqlens, start, i_n, T)).to(tl.int32) * CHUNK


@triton.jit
def starts_of(begins, t, t_end, C: tl.constexpr):
    """Where the sequences begin to which the tokens of the chunk at `t` belong, `[C]`, and where that of its last token
    does: counted from `t`, so negative for a sequence that comes from before. (Not read where nothing is joined.)"""
    if begins is None:
        return 0, 0
    else:
        b_first = tl.load(begins + tl.minimum(t + tl.arange(0, C), t_end - 1)) - t
        return b_first, tl.load(begins + tl.minimum(t + C, t_end) - 1) - t


@triton.jit
def of_one_sequence(m_pair, begins, b_first, REVERSE: tl.constexpr):
    """Those pairs of rows and earlier columns (REVERSE: later ones) that belong to one sequence."""
    if begins is None:
        return m_pair
    else:
        o_c = tl.arange(0, m_pair.shape[0])
        if REVERSE:
            return m_pair & (o_c[:, None] >= b_first[None, :])
        else:
            return m_pair & (o_c[None, :] >= b_first[:, None])


@triton.jit
def from_before(x, begins, b_first):
    """The rows of `x` whose sequence comes from before the chunk, the others as zeros."""
    if begins is None:
        return x
    else:
        return tl.where((b_first < 0)[:, None], x, 0.0).to(x.dtype)


@triton.jit
def going_on(x, begins, last):
    """The rows of `x` that belong to the chunk's last sequence, which may go on behind it, the others as zeros."""
    if begins is None:
        return x
    else:
        return tl.where((tl.arange(0, x.shape[0]) >= last)[:, None], x, 0.0).to(x.dtype)


@triton.jit
def passing(x, begins, last):
    """`x` if one sequence takes in the whole chunk and the token before it, else zeros."""
    if begins is None:
        return x
    else:
        # by bits: a `where` between an accumulator and its next dot is what Triton 3.6 fails on for Blackwell
        bits = x.to(tl.int32, bitcast=True) & tl.where(last < 0, -1, 0)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def state_before(h0, local, i_state, i_s, S, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """The state at the start of segment `i_s` at two broadcastable index tensors: the initial state and what the
    segments before left, each decayed by those between."""
    b_S = (o_k + o_v).to(tl.float32) * 0.0
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k, o_v, K, V)
    if local is not None:
        for s in range(0, i_s):
            b_S = add_segment(b_S, local + (i_state * S + s) * (K * V + K), o_k, o_v, K, V)
    return b_S


@triton.jit
def state_gradient_after(dht, local, states, i_state, i_s, S, count, scale, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """The gradient of the state at the end of segment `i_s` of `count`, in units of `scale`: `state_before`, reversed.
    Its slots lie behind those of all `states`."""
    b_dS = (o_k + o_v).to(tl.float32) * 0.0
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k, o_v, K, V) / scale
    if local is not None:
        for s in range(0, count - 1 - i_s):
            slot = local + ((states + i_state) * S + count - 1 - s) * (K * V + K)
            b_dS = add_segment(b_dS, slot, o_k, o_v, K, V)
    return b_dS


@triton.jit
def add_segment(b_S, slot, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """`b_S` decayed by a segment, plus what the segment adds. A slot holds its `[K, V]` sum, then its `[K]` decay."""
    b_decay = tl.load(slot + K * V + o_k, mask=o_k < K, other=0.0)
    return b_S * b_decay + load_state(slot, 0, o_k, o_v, K, V)


@functools.cache
def padded(size: int) -> int:
    """The tile that holds a head dimension."""
    return max(TILE.value, triton.next_power_of_2(size))


@functools.lru_cache(maxsize=4096)
def segment_length(T: int, programs: int) -> int:
    """Tokens a segment, for so many programs of a forward without segments (heads times tiles of V). At least T: no
    segments."""
    pieces = 1
    if programs < ENOUGH:
        while programs * pieces < FULL and 2 * pieces * SHORTEST * CHUNK.value <= T:
            pieces *= 2
    return ceil_div(ceil_div(T, pieces), CHUNK.value) * CHUNK.value
