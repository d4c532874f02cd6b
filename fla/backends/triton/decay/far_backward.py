"""The backward for heads whose decay is too strong for one middle a chunk (FAR_*, SHORT): one body for any role.

All roles are one computation, in one of two directions. With rows `a` and `b` of one width (a slice of D channels),
rows `c` and `out` of another (a tile of E), and a state `Z` `[D, E]`:

                out = scale (X + into Z)         X = (masked A B^T) C         Z <- through Z + B^T (on C)

    dq:     A, B, C = dO, V, K       masked to j <= i       forward in time       Z = S
    dk:               V, dO, Q                 j >= i       reverse               Z = dS
    dv:               K, Q, dO                 j >= i       reverse               Z = dS, transposed

FAR_CONSTANT, FAR_SCALAR (one decay for all channels): an exponential for every pair of tokens, `exp(G_i - G_j)` (the
reverse roles: `exp(G_j - G_i)`), beside the mask. A row's decay from the chunk's start, `e^G`, is `into` of dq and `on`
of the others; that to its end, `e^{G_C - G}`, is `on` of dq and `into` of the others; `through` is `e^{G_C}`.

SHORT (a decay per channel of K): chunks of 16 tokens, with q and k as `prepare.py` scaled them. Z is held at the middle
of a chunk, and goes from middle to middle by two factors a channel.

Such heads are rare, and a kernel with a body for each role takes much longer to compile than it saves them: what a role
does otherwise is chosen at run time. The frame is that of `chunk_backward.py`.
"""

import triton
import triton.language as tl

from fla.backends.triton._lib import dot_split, load_rows, operand, store_rows, store_state
from fla.backends.triton._sequence import (
    CHUNK,
    TILE,
    keep_if_spanning,
    same_sequence_pairs,
    sequence_starts,
    state_before,
    state_gradient_after,
)
from fla.backends.triton.decay._decay import (
    SHORT,
    SHORT_CHUNK,
    decay_to_middle,
    pair_decay,
    running_decay,
    store_end_term,
)

STAGES = tl.constexpr(2)  # loads by pointers have room for no more beside a second program


@triton.jit
def _load_either(x, y, is_y, row, o_c, m_c, H, o_d, D, DTYPE: tl.constexpr):
    """`load_rows` from token `row` (64 bits) on, of `y` if `is_y`, else of `x`, in DTYPE. Where they differ in type
    (of fp16, prepared q and k are float32) both are loaded, one of them all masked: a branch's loads would not be on
    their way ahead of time."""
    if x.dtype == y.dtype:
        return load_rows(tl.where(is_y, y, x) + row * D, o_c, m_c, H, o_d, D).to(DTYPE)
    else:
        b_x = load_rows(x + row * D, o_c, tl.where(is_y, False, m_c), H, o_d, D).to(DTYPE)
        b_y = load_rows(y + row * D, o_c, tl.where(is_y, m_c, False), H, o_d, D).to(DTYPE)
        return tl.where(is_y, b_y, b_x)


@triton.jit
def _store_either(x, y, is_y, row, o_c, m_c, H, o_d, D, b_x):
    """The inverse of `_load`."""
    if x.dtype == y.dtype:
        store_rows(tl.where(is_y, y, x) + row * D, o_c, m_c, H, o_d, D, b_x)
    else:
        store_rows(x + row * D, o_c, tl.where(is_y, False, m_c), H, o_d, D, b_x)
        store_rows(y + row * D, o_c, tl.where(is_y, m_c, False), H, o_d, D, b_x)


@triton.jit
def _factors(p, is_chunk, is_dv, o_d, o_e, K: tl.constexpr):
    """SHORT's factors at `p` for both axes of a state. One of them is that of K; those of the other are 1."""
    b_d = decay_to_middle(p, o_d, is_chunk, tl.where(is_dv, K, 0))
    b_e = decay_to_middle(p, o_e, is_chunk, tl.where(is_dv, 0, K))
    return b_d, b_e


@triton.jit
def _same_sequence_pairs(m_causal, begins, b_starts, is_dq):
    if begins is None:
        return m_causal
    else:
        return tl.where(
            is_dq,
            same_sequence_pairs(m_causal, begins, b_starts, False),
            same_sequence_pairs(m_causal, begins, b_starts, True),
        )


@triton.jit
def _keep_connected(x, begins, b_starts, last_start, from_start):
    """The rows of `x` whose sequence reaches the chunk's start (`from_start`), or else its end; the others as zeros."""
    if begins is None:
        return x
    else:
        m_row = tl.where(from_start, b_starts < 0, tl.arange(0, x.shape[0]) >= last_start)
        return tl.where(m_row[:, None], x, 0.0).to(x.dtype)


@triton.jit
def far_role(
    q, k, v, g, do, h0, dht, dq_or_dk, dv, dh0, rows, end_term, segment_sums, begins, place, scale, H,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`at` ends with the role: whether it is dq, whether it is dv, its slice of D, its tile of E. `d_key`: dq or dk.

    (How things are put here that look as good otherwise was chosen by what spills least.)"""
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    BD: tl.constexpr = 64 if K <= 64 and V <= 64 else 128
    DTYPE: tl.constexpr = q.dtype.element_ty
    start, t_begin, t_end, length, o_head, num_states, i_state, i_s, S, num_segments, role = place
    is_dq, is_dv, i_d, i_e = role
    if K == V:  # then both are known to the compiler
        D: tl.constexpr = K
        E: tl.constexpr = K
    else:
        D, E = tl.where(is_dv, K, V), tl.where(is_dv, V, K)
    i_h = i_state % H
    o_c, o_d, o_e = tl.arange(0, C), i_d * BD + tl.arange(0, BD), i_e * TILE + tl.arange(0, TILE)
    chunks = tl.cdiv(t_end - t_begin, C)
    sign = tl.where(is_dq, 1, -1)
    t_first = tl.where(is_dq, t_begin, t_begin + (chunks - 1) * C)
    m_causal = tl.where(is_dq, o_c[:, None] >= o_c[None, :], o_c[:, None] <= o_c[None, :])
    if is_dq:
        b_Z = state_before(h0, segment_sums, i_state, i_s, S, o_e[None, :], o_d[:, None], K, V)
    elif is_dv:
        b_Z = state_gradient_after(
            dht, segment_sums, num_states, i_state, i_s, S, num_segments, scale, o_d[:, None], o_e[None, :], K, V
        )
    else:
        b_Z = state_gradient_after(
            dht, segment_sums, num_states, i_state, i_s, S, num_segments, scale, o_e[None, :], o_d[:, None], K, V
        )
    if KIND == SHORT:
        # a chunk's factor to its middle, then that from there on: in the order of time, or in reverse
        p_factor_in, p_factor_out = g + tl.where(is_dq, 0, K), g + tl.where(is_dq, K, 0)
        b_d, b_e = _factors(p_factor_in + t_first // C * (2 * K * H), t_begin < t_end, is_dv, o_d, o_e, K)
        b_Z = b_Z * b_d[:, None] * b_e[None, :]
    b_starts, last_start = sequence_starts(begins, t_first, t_end, C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t = tl.where(is_dq, t_first + i * C, t_first - i * C)
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_a = _load_either(tl.where(is_dq, do, v), k, is_dv, row, o_c, m_c, H, o_d, D, DTYPE)
        b_b = _load_either(tl.where(is_dq, v, do), q, is_dv, row, o_c, m_c, H, o_d, D, DTYPE)
        b_c = _load_either(tl.where(is_dq, k, q), do, is_dv, row, o_c, m_c, H, o_e, E, DTYPE)
        m_scores = _same_sequence_pairs(m_causal, begins, b_starts, is_dq)
        if KIND == SHORT:
            b_P = tl.where(m_scores, tl.dot(b_a, tl.trans(b_b)), 0.0)
        else:
            b_G, total = running_decay(g, o_head, i_h, t, t_end, True, KIND)
            b_from_state, b_to_state = tl.where(is_dq, b_G, total - b_G), tl.where(is_dq, total - b_G, b_G)
            b_P = tl.dot(b_a, tl.trans(b_b)) * pair_decay(b_G * sign, m_scores)
        b_X = tl.dot(operand(b_P, DTYPE), b_c)
        if end_term is None:
            b_state_part = tl.dot(b_a, operand(b_Z, DTYPE))
        else:
            b_state_part = dot_split(b_a, b_Z, DTYPE)
        b_state_part = _keep_connected(b_state_part, begins, b_starts, last_start, is_dq)
        if KIND == SHORT:
            b_d_out, b_e_out = _factors(p_factor_out + t // C * (2 * K * H), True, is_dv, o_d, o_e, K)
            b_d, b_e = _factors(p_factor_in + (t // C + sign) * (2 * K * H), i + 1 < chunks, is_dv, o_d, o_e, K)
        else:
            if rows is not None:  # of dq and dk
                m_row = tl.where(is_dv, False, m_c)
                b_x = load_rows(tl.where(is_dq, q, k) + row * K, o_c, m_row, H, o_e, K)
                b_xs = (b_x * tl.exp2(b_from_state)[:, None]).to(DTYPE)
                tl.store(rows + o_head + t + o_c, tl.sum(b_x * b_X + b_xs * b_state_part, 1) * scale, mask=m_row)
            b_state_part *= tl.exp2(b_from_state)[:, None]
            b_c = (b_c * tl.exp2(b_to_state)[:, None]).to(DTYPE)
            b_Z *= tl.exp2(total)
        _store_either(dq_or_dk, dv, is_dv, row, o_c, m_c, H, o_e, E, b_X * scale + b_state_part * scale)
        b_Z = tl.dot(
            tl.trans(b_b),
            _keep_connected(b_c, begins, b_starts, last_start, is_dq == 0),
            acc=keep_if_spanning(b_Z, begins, last_start),
        )
        b_starts, last_start = sequence_starts(begins, tl.maximum(t + sign * C, t_begin), t_end, C)
        if KIND == SHORT:
            b_Z = b_Z * b_d_out[:, None] * b_e_out[None, :]
            b_Z = b_Z * b_d[:, None] * b_e[None, :]  # apart: the product of both factors may be no number of float32
    if end_term is not None:
        if is_dq:
            end = (t_end, length, num_states, i_state, i_s, S, num_segments)
            store_end_term(end_term, b_Z, dht, segment_sums, end, scale, o_e, o_d, K, V, KIND)
    if dh0 is not None:
        if (i_s == 0) & (is_dq == 0) & (is_dv == 0):
            store_state(dh0, i_state, o_e[None, :], o_d[:, None], K, V, b_Z * scale)
