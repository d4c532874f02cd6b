"""What the chunk kernels share: the kinds of decay, and decays inside a chunk.

Let G_i be the running log decay of a chunk, up to its token i and including it, and G_C its last value. The scores of a
chunk need the factors e^{G_i - G_j}. With any number m, the middle of the chunk,

    e^{G_i - G_j} = e^{G_i - m} e^{m - G_j}

so that one factor a row of Q and one a row of K do, instead of one for every pair of tokens. Each factor must fit in
its dtype. Tokens whose G is too low for that are far, and are computed by another kind than near ones:

    near kind    decay                                    rows are scaled by
    NONE         none                                     -
    CONSTANT     one a head                               kernels, as they go
    SCALAR       one a head and token                     kernels, as they go
    VECTOR       one a head, token and key channel        `prepare.py`

    far kind                                              computed with
    FAR_CONSTANT, FAR_SCALAR                              an exponential for every pair of tokens
    SHORT (of VECTOR)                                     chunks of 16 tokens, and m = G_{C/2} of each

The m of near kinds is a constant, log MIDDLE, the middle of the range that fits. No gate of a later token then changes
how the rows of a token are rounded, and a state has one factor a chunk, e^{G_C}. States are held in units of
1 / MIDDLE, their gradients in units of MIDDLE.

A launch is for a near and a far kind (KINDS), and each of its programs takes the kinds that its head needs. SCALAR
computes the tokens of a sequence that come before the first far one, and FAR_SCALAR those from it on, so that what
comes later does not change how a token is computed. Of the other kinds a head is near or far as a whole. `prepare.py`
marks the chunks that decay too fast.

Kernels use log2 and `exp2`. Their argument `pack` is `begins` `[T]` for a joined pack, else `cu_seqlens` or None
(`../_sequence.py`).
"""

import triton
import triton.language as tl

from fla.backends.triton._lib import load_state, log2_decay
from fla.backends.triton._sequence import CHUNK, first_chunk_slot, num_chunk_slots, state_gradient_after

SHORT_CHUNK = tl.constexpr(16)  # tokens a chunk of kind SHORT
MARKS_AT_ONCE = tl.constexpr(256)  # marks that a program reads at once
WIDEST = 256  # key channels that one program of the forward holds, at most
# Channels of V (for dq and dk) or of K (for dv) that one program of the backward holds at most, where a launch has all
# three roles. With a launch for each role it is WIDEST.
WIDEST_BACKWARD = 128
NONE, CONSTANT, SCALAR, VECTOR, SHORT, FAR_CONSTANT, FAR_SCALAR = (tl.constexpr(i) for i in range(7))  # decay kinds
# e^m of near kinds: powers of 2, which scale exactly. The first is about e^-40, half of NEAR and `prepare.py`'s RANGE.
MIDDLE = tl.constexpr(2.0**-58)
MIDDLE_FP16 = tl.constexpr(2.0**-3)  # where operands are fp16, which has no such range
# KINDS of a launch = the near kind + FAR_UNIT * the far kind (0 where there is none) + JOINED for a joined pack
FAR_UNIT = 8
JOINED = FAR_UNIT * FAR_UNIT
# The same fields as bits, for kernels. (The interpreter takes `BITS & KINDS`, but neither `KINDS & BITS` nor `%`.)
NEAR_BITS, FAR_BITS, JOINED_BIT, FAR_SHIFT = (tl.constexpr(i) for i in (0b000111, 0b111000, 0b1000000, 3))
# Log2 decay in a chunk up to which tokens are near. Half of it fits in bf16, and a product of two halves in float32.
NEAR = tl.constexpr(-80.0 * 1.4426950408889634)
NEAR_FP16 = tl.constexpr(-6.0 * 1.4426950408889634)  # in fp16: rows are scaled by e^6 MIDDLE_FP16, about 50, at most
ALL_NEAR = tl.constexpr(2**31 - 1)  # the first far token where there is none


@triton.jit
def is_near(total, DTYPE: tl.constexpr):
    """Whether rows with this log2 decay since the start of their chunk can be scaled. DTYPE: of q."""
    return total >= (NEAR_FP16 if tl.float16 == DTYPE else NEAR)


@triton.jit
def middle(DTYPE: tl.constexpr, KIND: tl.constexpr):
    """e^m of a kind; 1 for those that scale no rows. DTYPE: of what its dots read."""
    if (KIND == CONSTANT) or ((KIND == SCALAR) or (KIND == VECTOR)):
        return MIDDLE_FP16 if tl.float16 == DTYPE else MIDDLE
    else:
        return 1.0


@triton.jit
def first_far(g, cu_seqlens, i_state, num_states, start, length, T, H, DTYPE: tl.constexpr, KIND: tl.constexpr):
    """The first token of a sequence that is far in a head; ALL_NEAR if there is none.

    `g` points at the marks of `prepare.py`, or at the decays of the heads for the kinds with a constant decay.
    """
    i_n, i_h = i_state // H, i_state % H
    if KIND == NONE:
        return ALL_NEAR
    elif (KIND == CONSTANT) or (KIND == FAR_CONSTANT):
        return tl.where(is_near(log2_decay(tl.load(g + i_h)) * CHUNK, DTYPE), ALL_NEAR, 0)
    else:
        first = first_marked(g, cu_seqlens, i_n, i_h, num_states // H, start, length, T)
        if (KIND == SCALAR) or (KIND == FAR_SCALAR):
            return first
        else:
            return tl.where(first < ALL_NEAR, 0, ALL_NEAR)


@triton.jit
def first_factor_slot(cu_seqlens, start, i_n, T):
    """The number of a sequence's first chunk among the factors of `prepare.py`. The next chunks count on from it.

    Both kinds of chunk share a numbering that has room for short ones, so that the factors of a near head never lie
    where those of a far head do. It needs no sums over sequences.
    """
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, SHORT_CHUNK)
    else:
        return start // SHORT_CHUNK + i_n


@triton.jit
def running_decay(g, o_head, i_h, t, t_end, is_chunk, KIND: tl.constexpr):
    """G `[C]` and G_C of the chunk at `t`, for a kind with one decay for all channels.

    From `t_end` on, G repeats its last value. Both are 0 where there is no chunk, and for NONE.
    """
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
def marks_length(cu_seqlens, T, H, num_states):
    """How many floats the marks `[H, slots]` take, rounded up to 16 bytes. `prepare.py` stores the rest after them."""
    return tl.cdiv(num_chunk_slots(cu_seqlens, T, num_states // H) * H, 4) * 4


@triton.jit
def first_marked(g, cu_seqlens, i_n, i_h, N, start, length, T):
    """The first token that a mark of a sequence's chunks names in one head, ALL_NEAR if there is none.

    A mark is how many tokens of its chunk come before the first far one: CHUNK if there is none.
    """
    g += i_h * num_chunk_slots(cu_seqlens, T, N) + first_chunk_slot(cu_seqlens, start, i_n, T)
    o_i = tl.arange(0, MARKS_AT_ONCE)
    b_first = tl.full([MARKS_AT_ONCE], ALL_NEAR, tl.int32)
    for i in range(0, tl.cdiv(length, CHUNK), MARKS_AT_ONCE):
        b_mark = tl.load(g + i + o_i, mask=i + o_i < tl.cdiv(length, CHUNK), other=CHUNK).to(tl.int32)
        b_first = tl.minimum(b_first, tl.where(b_mark < CHUNK, (i + o_i) * CHUNK + b_mark, ALL_NEAR))
    return tl.min(b_first, 0)


@triton.jit
def decay_to_middle(p, o_k, is_chunk, K: tl.constexpr):
    """The decay of a state from the start of a chunk to its middle, by key channel (SHORT). 1 if there is no chunk.

    `p` points at the chunk's factors `[2, K]`.
    """
    return tl.load(p + o_k, mask=tl.where(is_chunk, o_k < K, False), other=1.0)


@triton.jit
def decay_to_end(p, o_k, is_chunk, K: tl.constexpr):
    """The decay of a state to the end of a chunk, by key channel: from its middle (SHORT), from its start (VECTOR)."""
    return decay_to_middle(p + K, o_k, is_chunk, K)


@triton.jit
def scale_rows(x, b_G, factor, KIND: tl.constexpr):
    """`x` `[C, D]` times `exp2(b_G) factor` `[C]`, a factor a row, for the kinds that scale rows as they go.

    (`factor`, a power of 2, is not added to the exponent, because a product with it is exact.)
    """
    if (KIND == CONSTANT) or (KIND == SCALAR):
        return x * (tl.exp2(b_G) * factor)[:, None]
    else:
        return x


@triton.jit
def pair_decay(b_G, m_causal):
    """`exp2(G_i - G_j)` `[C, C]` where `m_causal`, else 0. Exponents are masked too: elsewhere they may overflow."""
    return tl.where(m_causal, tl.exp2(tl.where(m_causal, b_G[:, None] - b_G[None, :], 0.0)), 0.0)


@triton.jit
def own_alone(b_P):
    """The scores `[C, C]` of tokens with themselves; zeros elsewhere."""
    o_c = tl.arange(0, b_P.shape[0])
    return tl.where(o_c[:, None] == o_c[None, :], b_P, 0.0).to(b_P.dtype)


@triton.jit
def without_own(b_P, SUMS: tl.constexpr):
    """The scores without those of tokens with themselves, where there are row sums (SUMS).

    These scores add the same to both of a token's row sums, whose difference is small: they would leave it few digits.
    `own_alone` has them, for after the sums are made.
    """
    if SUMS:
        o_c = tl.arange(0, b_P.shape[0])
        return tl.where(o_c[:, None] == o_c[None, :], 0.0, b_P).to(b_P.dtype)
    else:
        return b_P


@triton.jit
def without_last_write(b_S, k, v, g, place, o_head, H, o_k, o_v, K, V, DTYPE: tl.constexpr, KIND: tl.constexpr):
    """`b_S` `[V, K]`, the state at the end of a sequence, without what the last token itself wrote to it (SCALAR).

    As its score with itself, that is the same in two terms whose difference is small: the end term and the row sum of
    dk, which leaves it out too. `place`: first row (64 bits), number of tokens, head.
    """
    start, length, i_h = place
    row = (start + length - 1) * H + i_h
    b_k = tl.load(k + row * K + o_k, mask=tl.where(length > 0, o_k < K, False), other=0.0)
    b_v = tl.load(v + row * V + o_v, mask=tl.where(length > 0, o_v < V, False), other=0.0).to(DTYPE)
    b_k = b_k.to(tl.float32)
    if KIND == SCALAR:
        decay = tl.load(g + o_head + length - 1, mask=length > 0, other=0.0)
        b_k = (b_k * (tl.exp2(-decay) * middle(DTYPE, KIND))).to(DTYPE).to(tl.float32) * tl.exp2(decay)
    return b_S - b_v.to(tl.float32)[:, None] * b_k[None, :]


@triton.jit
def store_end_term(
    end_term, b_S, dht, sums, place, scale, o_k, o_v, K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Stores the end term of the gate gradient of a segment, for the key channels `o_k` of `end_term` `[K]`.

    It is <S, dS>, summed over V, for the state at the segment's end. `b_S` `[V, K]` must be the state that the role
    itself computed from rounded operands: with any other, the terms of the gate gradient do not cancel. `place` has
    the segment's bounds and numbers, as they are named below.
    """
    b_S *= 1.0 / middle(DTYPE, KIND)
    t_end, length, i_state, num_states, i_s, S, num_segments = place
    if (KIND == VECTOR) or (KIND == SHORT):
        b_dS = state_gradient_after(
            dht, sums, num_states, i_state, i_s, S, num_segments, scale, o_k[None, :], o_v[:, None], K, V
        )
        tl.store(end_term + o_k, tl.sum(b_S * b_dS, 0) * scale, mask=o_k < K)
    elif dht is not None:
        if t_end == length:
            b_dS = load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V)
            tl.store(end_term + o_k, tl.sum(b_S * b_dS, 0), mask=o_k < K)
