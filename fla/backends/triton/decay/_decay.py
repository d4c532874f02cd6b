"""What the chunk kernels share: decay kinds, and decays inside a chunk.

With `G_i` the running log2 decay in a chunk and `m` its middle, `exp2(G_i - G_j) = exp2(G_i - m) exp2(m - G_j)`: a
factor a row and one a column, and nothing an element of the scores. Kinds with a decay per head (CONSTANT) or per
head and token (SCALAR) take `m = G_C / 2` and scale rows on the way; with a decay per key channel, q and k come scaled
(`prepare.py`): VECTOR takes the constant `m = log2 UNIT`, the middle of the range that fits, which is known before the
gates are read and leaves one factor a chunk for the state, `exp2(G_C)`; all its states are held in units of `1 / UNIT`.
That holds while the factors fit in their dtype. Heads with stronger decays are of another kind: FAR_* (an exponential a
pair) or SHORT (chunks of 16 tokens, each with a middle of its own). A launch has both (KINDS), and each of its programs
takes the one that its head needs.

A kernel's argument `pack` is `begins` `[T]` where KINDS says that a pack is JOINED, otherwise it is `cu_seqlens`
(`../_sequence.py`).
"""

import triton
import triton.language as tl

from fla.backends.triton._lib import load_state, log2_decay
from fla.backends.triton._sequence import CHUNK, first_chunk_slot, num_chunk_slots, state_gradient_after

SHORT_CHUNK = tl.constexpr(16)  # tokens a chunk where a vector decay is too strong for one middle
MARKS_AT_ONCE = tl.constexpr(256)  # marks that a program reads at once
WIDEST = 256  # key channels that one program of the forward holds
# channels of V (dq, dk) or of K (dv) that one program of the backward holds, where its roles are not alone in a launch
WIDEST_BACKWARD = 128
NONE, CONSTANT, SCALAR, VECTOR, SHORT, FAR_CONSTANT, FAR_SCALAR = (tl.constexpr(i) for i in range(7))  # decay kinds
MIDDLE = tl.constexpr(2.0**-58)  # of VECTOR: e^-40, the middle of `prepare.py`'s RANGE; a power of 2 scales exactly
FAR_UNIT = (
    8  # KINDS of a launch: the near one + 8 * the far one, 0 where there is none (the interpreter wants it a number)
)
JOINED = FAR_UNIT * FAR_UNIT  # added to KINDS where a pack is one row
# log2 decay of a chunk up to which its halves fit in bf16, and a product of two halves in float32
NEAR = tl.constexpr(-80.0 * 1.4426950408889634)
NEAR_FP16 = tl.constexpr(-8.0 * 1.4426950408889634)  # the same in fp16, where small numbers lose digits early


@triton.jit
def is_near(total, DTYPE: tl.constexpr):
    """Whether rows can be scaled to a chunk's middle, for a chunk (or the strongest of many) of this log2 decay."""
    return total >= (NEAR_FP16 if tl.float16 == DTYPE else NEAR)


@triton.jit
def is_far(g, cu_seqlens, i_state, num_states, start, length, T, H, DTYPE: tl.constexpr, KIND: tl.constexpr):
    """1 if a head decays too fast for the near one of a pair of kinds, else 0. `prepare.py` marks the chunks that do in
    front of what it stores."""
    i_n, i_h = i_state // H, i_state % H
    if KIND == NONE:
        return 0
    elif (KIND == CONSTANT) or (KIND == FAR_CONSTANT):
        return 1 - is_near(log2_decay(tl.load(g + i_h)) * CHUNK, DTYPE).to(tl.int32)
    else:
        return (largest_mark(g, cu_seqlens, i_n, i_h, num_states // H, start, length, T) > 0).to(tl.int32)


@triton.jit
def first_factor_slot(cu_seqlens, start, i_n, T):
    """Where the factors of a sequence's chunks begin, in a numbering that needs no sums over sequences. It is that of
    short chunks, of which there are most: factors of one kind never lie where another head's of the other kind do."""
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, SHORT_CHUNK)
    else:
        return start // SHORT_CHUNK + i_n


@triton.jit
def running_decay(g, o_head, i_h, t, t_end, is_chunk, KIND: tl.constexpr):
    """`G` `[C]` and its last value for the chunk at `t` of a kind with a decay per head. Behind the end `G` repeats its
    last value. Where there is no chunk, both are 0."""
    o_c = tl.arange(0, CHUNK)
    if (KIND == CONSTANT) or (KIND == FAR_CONSTANT):
        step = tl.where(is_chunk, log2_decay(tl.load(g + i_h)), 0.0)
        b_G = step * tl.minimum(o_c + 1, t_end - t).to(tl.float32)
        total = step * tl.minimum(CHUNK, t_end - t).to(tl.float32)
    elif (KIND == SCALAR) or (KIND == FAR_SCALAR):
        b_G = tl.load(g + o_head + tl.minimum(t + o_c, t_end - 1), mask=tl.where(is_chunk, o_c >= 0, False), other=0.0)
        total = tl.load(g + o_head + tl.minimum(t + CHUNK, t_end) - 1, mask=is_chunk, other=0.0)
    else:
        b_G = tl.zeros([CHUNK], tl.float32)
        total = 0.0
    return b_G, total


@triton.jit
def centred_decay(g, o_head, i_h, t, t_end, is_chunk, KIND: tl.constexpr):
    """`G - m` `[C]` of a chunk and the factor of a state from one end of it to its middle, `exp2(G_C / 2)`."""
    b_G, total = running_decay(g, o_head, i_h, t, t_end, is_chunk, KIND)
    return b_G - 0.5 * total, tl.exp2(0.5 * total)


@triton.jit
def marks_length(cu_seqlens, T, H, num_states):
    """Floats in front of what `prepare.py` stores: the marks `[H, slots]`, rounded up to 16 bytes."""
    return tl.cdiv(num_chunk_slots(cu_seqlens, T, num_states // H) * H, 4) * 4


@triton.jit
def largest_mark(g, cu_seqlens, i_n, i_h, N, start, length, T):
    """The largest mark of a sequence's chunks in one head."""
    g += i_h * num_chunk_slots(cu_seqlens, T, N) + first_chunk_slot(cu_seqlens, start, i_n, T)
    o_i = tl.arange(0, MARKS_AT_ONCE)
    b_mark = tl.zeros([MARKS_AT_ONCE], tl.float32)
    for i in range(0, tl.cdiv(length, CHUNK), MARKS_AT_ONCE):
        b_mark = tl.maximum(b_mark, tl.load(g + i + o_i, mask=i + o_i < tl.cdiv(length, CHUNK), other=0.0))
    return tl.max(b_mark, 0)


@triton.jit
def decay_to_middle(p, o_k, is_chunk, K: tl.constexpr):
    """Of the chunk at `p`, SHORT's factor of the state to its middle. 1 where there is no chunk."""
    return tl.load(p + o_k, mask=tl.where(is_chunk, o_k < K, False), other=1.0)


@triton.jit
def decay_to_end(p, o_k, is_chunk, K: tl.constexpr):
    """Of the chunk at `p`, the factor of the state to its end: from its middle (SHORT), from its start (VECTOR)."""
    return decay_to_middle(p + K, o_k, is_chunk, K)


@triton.jit
def scale_rows(x, b_Gm, KIND: tl.constexpr):
    """`x` times `exp2(b_u)`, a factor a row, where the kind scales rows on the way."""
    if (KIND == CONSTANT) or (KIND == SCALAR):
        return x * tl.exp2(b_Gm)[:, None]
    else:
        return x


@triton.jit
def pair_decay(b_G, m_causal):
    """`exp2(G_i - G_j)` where `m_pair`, else 0."""
    return tl.where(m_causal, tl.exp2(tl.where(m_causal, b_G[:, None] - b_G[None, :], 0.0)), 0.0)


@triton.jit
def store_end_term(
    end_term, b_S, dht, segment_sums, place, scale, o_k, o_v, K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr
):
    """`<S, dS>` of every channel of K, for the state at the end of a segment (`at`: which one). It takes the S of a
    role's rounded operands: with any other the gate gradient's terms do not cancel."""
    t_end, length, num_states, i_state, i_s, S, num_segments = place
    if (KIND == VECTOR) or (KIND == SHORT):
        b_dS = state_gradient_after(
            dht, segment_sums, num_states, i_state, i_s, S, num_segments, scale, o_k[None, :], o_v[:, None], K, V
        )
        if KIND == VECTOR:
            b_S *= 1.0 / MIDDLE
        tl.store(end_term + o_k, tl.sum(b_S * b_dS, 0) * scale, mask=o_k < K)
    elif dht is not None:
        if t_end == length:
            b_dS = load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V)
            tl.store(end_term + o_k, tl.sum(b_S * b_dS, 0), mask=o_k < K)
