"""The backward for far tokens, whose decay is too strong for near kinds (`_decay.py`): one body for all roles.

All roles are one computation, in one of two directions. Take rows A and B of one width (a slice of D channels), rows C
and the result of another (a tile of E), and a state Z `[D, E]`:

    result = scale (X + from_state A Z)
    X      = (masked A B^T) C
    Z      <- across Z + B^T (to_state C)

    role    A, B, C     mask      direction          Z
    dq      dO, V, K    j <= i    forward in time    S, transposed
    dk      V, dO, Q    j >= i    reverse            dS, transposed
    dv      K, Q, dO    j >= i    reverse            dS

FAR_CONSTANT and FAR_SCALAR have one decay for all channels. They multiply the scores by an exponential for every pair
of tokens: e^{G_i - G_j} for dq, e^{G_j - G_i} for the other roles. `from_state` and `to_state` are factors a row:

    role      from_state       to_state
    dq        e^G              e^{G_C - G}
    dk, dv    e^{G_C - G}      e^G

and `across` is e^{G_C}.

SHORT has a decay per key channel. It walks chunks of 16 tokens, with q and k as `prepare.py` scaled them. Z is held at
the middle of a chunk, and goes from middle to middle by two factors a channel.

FAR_SCALAR leaves the gradients of the tokens before the first far one to SCALAR. For their state, dq walks over them
too.

Far heads are rare. A kernel with a body for each role would take longer to compile than it could save, so that the
roles differ by choices made at run time. The frame is that of `near_backward.py`.
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
    FAR_SCALAR,
    SHORT,
    SHORT_CHUNK,
    decay_to_middle,
    own_alone,
    pair_decay,
    running_decay,
    store_end_term,
    without_last_write,
    without_own,
)

STAGES = tl.constexpr(2)  # with more, two programs do not fit on a multiprocessor


@triton.jit
def _load_either(x, y, is_y, row, o_c, m_c, H, o_d, D, DTYPE: tl.constexpr):
    """Rows `[C, D]` of `y` if `is_y`, else of `x`, in DTYPE, from token `row` (64 bits) on.

    Where x and y differ in dtype (in fp16, prepared q and k are float32) both are loaded, and one of them is masked
    out. The loads of a branch could not be issued ahead of time.
    """
    if x.dtype == y.dtype:
        return load_rows(tl.where(is_y, y, x) + row * D, o_c, m_c, H, o_d, D).to(DTYPE)
    else:
        b_x = load_rows(x + row * D, o_c, tl.where(is_y, False, m_c), H, o_d, D).to(DTYPE)
        b_y = load_rows(y + row * D, o_c, tl.where(is_y, m_c, False), H, o_d, D).to(DTYPE)
        return tl.where(is_y, b_y, b_x)


@triton.jit
def _store_either(x, y, is_y, row, o_c, m_c, H, o_d, D, b_x):
    """Stores `b_x` where `_load_either` would load it."""
    if x.dtype == y.dtype:
        store_rows(tl.where(is_y, y, x) + row * D, o_c, m_c, H, o_d, D, b_x)
    else:
        store_rows(x + row * D, o_c, tl.where(is_y, False, m_c), H, o_d, D, b_x)
        store_rows(y + row * D, o_c, tl.where(is_y, m_c, False), H, o_d, D, b_x)


@triton.jit
def _decays_to_middle(p, is_chunk, is_dv, o_d, o_e, K: tl.constexpr):
    """SHORT's decays at `p` for both axes of a state. Those of K are loaded, those of the other axis are 1."""
    b_decay_d = decay_to_middle(p, o_d, is_chunk, tl.where(is_dv, K, 0))
    b_decay_e = decay_to_middle(p, o_e, is_chunk, tl.where(is_dv, 0, K))
    return b_decay_d, b_decay_e


@triton.jit
def _same_sequence_pairs(m_causal, begins, b_starts, is_dq):
    """`same_sequence_pairs`, in the direction of the role."""
    if begins is None:
        return m_causal
    else:
        return tl.where(
            is_dq,
            same_sequence_pairs(m_causal, begins, b_starts, False),
            same_sequence_pairs(m_causal, begins, b_starts, True),
        )


@triton.jit
def _keep_connected(x, begins, b_starts, last, from_start):
    """`x` `[C, D]` with zeros in all rows but those whose sequence reaches the start of the chunk, or else its end.

    `from_start`: which of the two.
    """
    if begins is None:
        return x
    else:
        m_rows = tl.where(from_start, b_starts < 0, tl.arange(0, x.shape[0]) >= last)
        return tl.where(m_rows[:, None], x, 0.0).to(x.dtype)


@triton.jit
def far_role(
    q, k, v, g, do, h0, dht, dq_or_dk, dv, dh0, row_sums, end_term, sums, begins, place, scale, H,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One role for a tile of a segment. `dq_or_dk`: the gradient of the role, unless it is dv's.

    `place` ends with the first far token and `role`: whether it is dq, whether it is dv, the slice of D, the tile of E.
    (Where the order of
    statements looks arbitrary, it is the one that spills least.)
    """
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    BD: tl.constexpr = 64 if K <= 64 and V <= 64 else 128
    DTYPE: tl.constexpr = q.dtype.element_ty
    SUMS: tl.constexpr = (row_sums is not None) and (KIND == FAR_SCALAR)
    start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, first, role = place
    is_dq, is_dv, i_d, i_e = role
    if K == V:  # the compiler then knows both widths
        D: tl.constexpr = K
        E: tl.constexpr = K
    else:
        D, E = tl.where(is_dv, K, V), tl.where(is_dv, V, K)
    i_h = i_state % H
    o_c, o_d, o_e = tl.arange(0, C), i_d * BD + tl.arange(0, BD), i_e * TILE + tl.arange(0, TILE)
    chunks = tl.cdiv(t_end - t_begin, C)
    sign = tl.where(is_dq, 1, -1)
    t_first = tl.where(is_dq, t_begin, t_begin + (chunks - 1) * C)
    if KIND == FAR_SCALAR:
        chunks -= tl.where(is_dq, 0, tl.maximum(first - t_begin, 0) // C)
    m_causal = tl.where(is_dq, o_c[:, None] >= o_c[None, :], o_c[:, None] <= o_c[None, :])
    if is_dq:
        b_Z = state_before(h0, sums, i_state, i_s, S, o_e[None, :], o_d[:, None], K, V)
    elif is_dv:
        b_Z = state_gradient_after(
            dht, sums, num_states, i_state, i_s, S, num_segments, scale, o_d[:, None], o_e[None, :], K, V
        )
    else:
        b_Z = state_gradient_after(
            dht, sums, num_states, i_state, i_s, S, num_segments, scale, o_e[None, :], o_d[:, None], K, V
        )
    if KIND == SHORT:
        # decays on the way to a chunk's middle and from there on; dq walks with time, the other roles against it
        p_entering, p_leaving = g + tl.where(is_dq, 0, K), g + tl.where(is_dq, K, 0)
        b_entering_d, b_entering_e = _decays_to_middle(
            p_entering + t_first // C * (2 * K * H), t_begin < t_end, is_dv, o_d, o_e, K
        )
        b_Z = b_Z * b_entering_d[:, None] * b_entering_e[None, :]
    b_starts, last = sequence_starts(begins, t_first, t_end, C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t = tl.where(is_dq, t_first + i * C, t_first - i * C)
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_a = _load_either(tl.where(is_dq, do, v), k, is_dv, row, o_c, m_c, H, o_d, D, DTYPE)  # [C, BD]
        b_b = _load_either(tl.where(is_dq, v, do), q, is_dv, row, o_c, m_c, H, o_d, D, DTYPE)  # [C, BD]
        b_c = _load_either(tl.where(is_dq, k, q), do, is_dv, row, o_c, m_c, H, o_e, E, DTYPE)  # [C, TILE]
        m_scores = _same_sequence_pairs(m_causal, begins, b_starts, is_dq)
        if KIND == SHORT:
            b_P = tl.where(m_scores, tl.dot(b_a, tl.trans(b_b)), 0.0)  # [C, C]
        else:
            b_G, total = running_decay(g, o_head, i_h, t, t_end, True, KIND)
            b_from_state, b_to_state = tl.where(is_dq, b_G, total - b_G), tl.where(is_dq, total - b_G, b_G)
            b_P = tl.dot(b_a, tl.trans(b_b)) * pair_decay(b_G * sign, m_scores)
        b_P = operand(b_P, DTYPE)
        b_X = tl.dot(without_own(b_P, SUMS), b_c)  # [C, TILE]
        if end_term is None:
            b_state_part = tl.dot(b_a, operand(b_Z, DTYPE))  # [C, TILE]
        else:
            b_state_part = dot_split(b_a, b_Z, DTYPE)
        b_state_part = _keep_connected(b_state_part, begins, b_starts, last, is_dq)
        if KIND == SHORT:
            b_leaving_d, b_leaving_e = _decays_to_middle(p_leaving + t // C * (2 * K * H), True, is_dv, o_d, o_e, K)
            b_entering_d, b_entering_e = _decays_to_middle(
                p_entering + (t // C + sign) * (2 * K * H), i + 1 < chunks, is_dv, o_d, o_e, K
            )
        else:
            if KIND == FAR_SCALAR:
                m_c = m_c & (t + o_c >= first)
            if SUMS:  # dq and dk have row sums
                m_rows = tl.where(is_dv, False, m_c)
                b_x = load_rows(tl.where(is_dq, q, k) + row * K, o_c, m_rows, H, o_e, K)
                b_scaled = (b_x * tl.exp2(b_from_state)[:, None]).to(DTYPE)
                b_sum = tl.sum(b_x * b_X + b_scaled * b_state_part, 1)
                b_sum = tl.where(tl.where(is_dq, False, t + o_c == length - 1), 0.0, b_sum)  # see `without_last_write`
                tl.store(row_sums + o_head + t + o_c, b_sum * scale, mask=m_rows)
                b_X = tl.dot(own_alone(b_P), b_c, acc=b_X)
            b_state_part *= tl.exp2(b_from_state)[:, None]
            b_c = (b_c * tl.exp2(b_to_state)[:, None]).to(DTYPE)
            b_Z *= tl.exp2(total)
        _store_either(dq_or_dk, dv, is_dv, row, o_c, m_c, H, o_e, E, b_X * scale + b_state_part * scale)
        b_Z = tl.dot(
            tl.trans(b_b),
            _keep_connected(b_c, begins, b_starts, last, is_dq == 0),
            acc=keep_if_spanning(b_Z, begins, last),
        )
        b_starts, last = sequence_starts(begins, tl.maximum(t + sign * C, t_begin), t_end, C)
        if KIND == SHORT:
            # the two decays are applied one after the other, because their product may underflow
            b_Z = b_Z * b_leaving_d[:, None] * b_leaving_e[None, :]
            b_Z = b_Z * b_entering_d[:, None] * b_entering_e[None, :]
    if end_term is not None:
        if is_dq:
            if SUMS and (dht is not None):
                b_Z = without_last_write(
                    b_Z, k, v, g, (start, t_end, i_h), o_head, H, o_e, o_d, K, V, DTYPE, KIND
                )  # fmt: skip
            end = (t_end, length, i_state, num_states, i_s, S, num_segments)
            store_end_term(end_term, b_Z, dht, sums, end, scale, o_e, o_d, K, V, KIND, DTYPE)
    if dh0 is not None:
        if (i_s == 0) & (first == 0) & (is_dq == 0) & (is_dv == 0):
            store_state(dh0, i_state, o_e[None, :], o_d[:, None], K, V, b_Z * scale)
