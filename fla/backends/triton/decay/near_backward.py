"""The backward for near tokens (`_decay.py`): a body for each role.

With S the state before a chunk and dS the gradient of the state after it, each in its unit, with m and G as in
`_decay.py`, and with

    Qn = e^{G - m} Q        Kn = e^{m - G} K        dOn = e^{G - m} dO

the roles compute, for a chunk of tokens,

    dq, forward in time, a tile of K:    dQ = scale e^{G - m} (tril(dO V^T) Kn + dO S^T)
    dk, in reverse, a tile of K:         dK = scale e^{m - G} (triu(V dO^T) Qn + V (e^{G_C} dS)^T)
    dv, in reverse, a tile of V:         dV = scale e^{m - G} (triu(K Q^T) dOn + K (e^{G_C} dS))

dq carries S as the forward does (`chunk_forward.py`). dk and dv carry dS in units of `scale`, up to that of h0:

    dS <- e^{G_C} dS + Qn^T dO

For VECTOR, Qn and Kn come from `prepare.py`, the roles leave dQn and dKn for `gate_gradient.py`, and

    dV = scale (triu(Kn Qn^T) dO + Kn (e^{G_C} dS))

Of a head that has far tokens, SCALAR stores the gradients of the tokens before the first of these. dq ends there. In
reverse all tokens are walked nevertheless, for dS, which no decay puts out of range.

`place` ends with the first far token.

Each direction forms its scores in one orientation, and the left operand of what enters a state is a loaded tile: Triton
3.4 to 3.7.0 computes a dot wrong whose left operand is a transposed accumulator.
"""

import triton
import triton.language as tl

from fla.backends.triton._lib import (
    DESCRIPTORS,
    POINTERS,
    dot_split,
    load_tile,
    operand,
    store_rows,
    store_state,
    tile_source,
)
from fla.backends.triton._sequence import (
    CHUNK,
    TILE,
    keep_if_spanning,
    keep_last_sequence,
    keep_started_before,
    same_sequence_pairs,
    sequence_starts,
    state_before,
    state_gradient_after,
)
from fla.backends.triton.decay._decay import (
    NONE,
    SCALAR,
    VECTOR,
    decay_to_end,
    middle,
    own_alone,
    running_decay,
    scale_rows,
    store_end_term,
    without_last_write,
    without_own,
)


@triton.jit
def dq_role(
    q, k, v, g, do, h0, dht, dq, row_sums, end_term, sums, begins, place, scale, H,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, LOAD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    LOAD_B: tl.constexpr = POINTERS if LOAD == POINTERS else DESCRIPTORS  # right operands of dots
    LOAD_AB: tl.constexpr = LOAD if (KIND == NONE) or (KIND == VECTOR) else LOAD_B  # what is left and right
    # a number here pipelines all loads, not those of dots alone (loads by pointers leave no registers for it)
    STAGES: tl.constexpr = 2 if KIND == SCALAR and LOAD != POINTERS else None
    SUMS: tl.constexpr = (row_sums is not None) and (KIND == SCALAR)
    start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_k, i_v, first = place
    i_h = i_state % H
    o_c, o_k, o_v = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE), i_v * BV + tl.arange(0, BV)
    m_causal = o_c[:, None] >= o_c[None, :]
    b_S = state_before(h0, sums, i_state, i_s, S, o_k[None, :], o_v[:, None], K, V)  # [BV, TILE]
    if KIND == VECTOR:
        b_to_end = decay_to_end(g + t_begin // C * (2 * K * H), o_k, t_begin < t_end, K)
    else:
        b_G, total = running_decay(g, o_head, i_h, t_begin, t_end, t_begin < t_end, KIND)
    b_S *= middle(DTYPE, KIND)
    b_starts, last = sequence_starts(begins, t_begin, t_end, C)
    if SUMS:
        q_source = tile_source(q, start * H + i_h, t_end, H, K, C, TILE, LOAD_B)
    k_source = tile_source(k, start * H + i_h, t_end, H, K, C, TILE, LOAD_B)
    v_source = tile_source(v, start * H + i_h, t_end, H, V, C, BV, LOAD_AB)
    do_source = tile_source(do, start * H + i_h, t_end, H, V, C, BV, LOAD)
    for t in tl.range(t_begin, t_end, C, num_stages=STAGES):
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_k = load_tile(k_source, t, i_k * TILE, row, o_c, m_c, H, o_k, K, C, TILE, LOAD_B)  # [C, TILE]
        b_v = load_tile(v_source, t, i_v * BV, row, o_c, m_c, H, o_v, V, C, BV, LOAD_AB).to(DTYPE)  # [C, BV]
        b_do = load_tile(do_source, t, i_v * BV, row, o_c, m_c, H, o_v, V, C, BV, LOAD).to(DTYPE)  # [C, BV]
        if end_term is None:
            b_dq = tl.dot(b_do, operand(b_S, DTYPE))  # [C, TILE]
        else:
            b_dq = dot_split(b_do, b_S, DTYPE)
        b_dq = keep_started_before(b_dq, begins, b_starts)
        m_scores = same_sequence_pairs(m_causal, begins, b_starts, False)
        b_P = operand(tl.where(m_scores, tl.dot(b_do, tl.trans(b_v)), 0.0), DTYPE)  # [C, C]
        if KIND == VECTOR:
            b_to_end_next = decay_to_end(g + (t // C + 1) * (2 * K * H), o_k, t_end - t > C, K)
            b_dq = tl.dot(b_P, b_k, acc=b_dq)
            store_rows(dq + row * K, o_c, m_c, H, o_k, K, b_dq * scale)
            b_S = tl.dot(
                tl.trans(b_v), keep_last_sequence(b_k, begins, last), acc=keep_if_spanning(b_S, begins, last)
            ) * b_to_end[None, :]  # fmt: skip
            b_to_end = b_to_end_next
        else:
            if SUMS:
                b_q = load_tile(q_source, t, i_k * TILE, row, o_c, m_c, H, o_k, K, C, TILE, LOAD_B)  # [C, TILE]
            b_G_next, total_next = running_decay(g, o_head, i_h, t + C, t_end, t_end - t > C, KIND)
            b_k = scale_rows(b_k, -b_G, middle(DTYPE, KIND), KIND).to(DTYPE)
            b_dq = tl.dot(without_own(b_P, SUMS), b_k, acc=b_dq)
            if SUMS:
                b_q = scale_rows(b_q, b_G, 1.0 / middle(DTYPE, KIND), KIND).to(DTYPE)
                tl.store(row_sums + o_head + t + o_c, tl.sum(b_q * b_dq, 1) * scale, mask=m_c)
                b_dq = tl.dot(own_alone(b_P), b_k, acc=b_dq)
            b_dq = scale_rows(b_dq, b_G, 1.0 / middle(DTYPE, KIND), KIND)
            store_rows(dq + row * K, o_c, m_c, H, o_k, K, b_dq * scale)
            b_S = tl.dot(tl.trans(b_v), keep_last_sequence(b_k, begins, last), acc=keep_if_spanning(b_S, begins, last))
            if KIND != NONE:
                b_S *= tl.exp2(total)
                b_G, total = b_G_next, total_next
        b_starts, last = sequence_starts(begins, t + C, t_end, C)
    if end_term is not None:
        if SUMS and (dht is not None):
            b_S = without_last_write(
                b_S, k, v, g, (start, t_end, i_h), o_head, H, o_k, o_v, K, V, DTYPE, KIND
            )  # fmt: skip
        end = (t_end, length, i_state, num_states, i_s, S, num_segments)
        store_end_term(end_term, b_S, dht, sums, end, scale, o_k, o_v, K, V, KIND, DTYPE)


@triton.jit
def dk_role(
    q, k, v, g, do, dht, dk, dh0, row_sums, end_term, sums, begins, place, scale, H,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, LOAD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    LOAD_B: tl.constexpr = POINTERS if LOAD == POINTERS else DESCRIPTORS  # right operands of dots
    LOAD_AB: tl.constexpr = LOAD if (KIND == NONE) or (KIND == VECTOR) else LOAD_B  # what is left and right
    STAGES: tl.constexpr = 2 if KIND == SCALAR and LOAD != POINTERS else None
    SUMS: tl.constexpr = (row_sums is not None) and (KIND == SCALAR)
    start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_k, i_v, first = place
    i_h = i_state % H
    o_c, o_k, o_v = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE), i_v * BV + tl.arange(0, BV)
    m_causal = o_c[:, None] <= o_c[None, :]
    b_dS = state_gradient_after(  # [BV, TILE]
        dht, sums, num_states, i_state, i_s, S, num_segments, scale, o_k[None, :], o_v[:, None], K, V
    )
    t_last = t_begin + (tl.cdiv(t_end - t_begin, C) - 1) * C
    t_stored = tl.minimum(t_end, first) if KIND == SCALAR else t_end
    if KIND == VECTOR:
        b_dS *= decay_to_end(g + t_last // C * (2 * K * H), o_k, t_begin < t_end, K)[None, :]
    else:
        b_G, total = running_decay(g, o_head, i_h, t_last, t_end, t_begin < t_end, KIND)
        b_dS *= tl.exp2(total)
    b_dS *= 1.0 / middle(DTYPE, KIND)
    b_starts, last = sequence_starts(begins, t_last, t_end, C)
    q_source = tile_source(q, start * H + i_h, t_end, H, K, C, TILE, LOAD_B)
    if SUMS:
        k_source = tile_source(k, start * H + i_h, t_end, H, K, C, TILE, LOAD_B)
    v_source = tile_source(v, start * H + i_h, t_end, H, V, C, BV, LOAD)
    do_source = tile_source(do, start * H + i_h, t_end, H, V, C, BV, LOAD_AB)
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=STAGES):
        t = t_last - i * C
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_q = load_tile(q_source, t, i_k * TILE, row, o_c, m_c, H, o_k, K, C, TILE, LOAD_B)  # [C, TILE]
        b_v = load_tile(v_source, t, i_v * BV, row, o_c, m_c, H, o_v, V, C, BV, LOAD).to(DTYPE)  # [C, BV]
        b_do = load_tile(do_source, t, i_v * BV, row, o_c, m_c, H, o_v, V, C, BV, LOAD_AB).to(DTYPE)  # [C, BV]
        if end_term is None:
            b_dk = tl.dot(b_v, operand(b_dS, DTYPE))  # [C, TILE]
        else:
            b_dk = dot_split(b_v, b_dS, DTYPE)
        b_dk = keep_last_sequence(b_dk, begins, last)
        m_scores = same_sequence_pairs(m_causal, begins, b_starts, True)
        b_P = operand(tl.where(m_scores, tl.dot(b_v, tl.trans(b_do)), 0.0), DTYPE)  # [C, C]
        if KIND == VECTOR:
            b_to_end = decay_to_end(g + (t // C - 1) * (2 * K * H), o_k, t > t_begin, K)
            b_dk = tl.dot(b_P, b_q, acc=b_dk)
            store_rows(dk + row * K, o_c, m_c, H, o_k, K, b_dk * scale)
            b_dS = tl.dot(
                tl.trans(b_do), keep_started_before(b_q, begins, b_starts), acc=keep_if_spanning(b_dS, begins, last)
            )
            b_dS *= b_to_end[None, :]
        else:
            if SUMS:
                b_k = load_tile(k_source, t, i_k * TILE, row, o_c, m_c, H, o_k, K, C, TILE, LOAD_B)  # [C, TILE]
            b_G_next, total_next = running_decay(g, o_head, i_h, t - C, t_end, t > t_begin, KIND)
            m_stored = t + o_c < t_stored
            b_q = scale_rows(b_q, b_G, 1.0 / middle(DTYPE, KIND), KIND).to(DTYPE)
            b_dk = tl.dot(without_own(b_P, SUMS), b_q, acc=b_dk)
            if SUMS:
                b_k = scale_rows(b_k, -b_G, middle(DTYPE, KIND), KIND).to(DTYPE)
                b_sum = tl.where(t + o_c == length - 1, 0.0, tl.sum(b_k * b_dk, 1))  # see `without_last_write`
                tl.store(row_sums + o_head + t + o_c, b_sum * scale, mask=m_stored)
                b_dk = tl.dot(own_alone(b_P), b_q, acc=b_dk)
            b_dk = scale_rows(b_dk, -b_G, middle(DTYPE, KIND), KIND)
            store_rows(dk + row * K, o_c, m_stored, H, o_k, K, b_dk * scale)
            b_dS = tl.dot(
                tl.trans(b_do), keep_started_before(b_q, begins, b_starts), acc=keep_if_spanning(b_dS, begins, last)
            )
            if KIND != NONE:
                b_dS *= tl.exp2(total_next)
                b_G, total = b_G_next, total_next
        b_starts, last = sequence_starts(begins, tl.maximum(t - C, t_begin), t_end, C)
    if dh0 is not None:
        if i_s == 0:
            b_dS *= middle(DTYPE, KIND)
            store_state(dh0, i_state, o_k[None, :], o_v[:, None], K, V, b_dS * scale)


@triton.jit
def dv_role(
    q, k, g, do, dht, dv, sums, begins, place, scale, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, LOAD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    LOAD_B: tl.constexpr = POINTERS if LOAD == POINTERS else DESCRIPTORS  # right operands of dots
    LOAD_AB: tl.constexpr = LOAD if (KIND == NONE) or (KIND == VECTOR) else LOAD_B  # what is left and right
    STAGES: tl.constexpr = 2 if KIND == SCALAR and LOAD != POINTERS else None
    start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_k, i_v, first = place
    i_h = i_state % H
    o_c, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * TILE + tl.arange(0, TILE)
    m_causal = o_c[:, None] <= o_c[None, :]
    b_dS = state_gradient_after(  # [BK, TILE]
        dht, sums, num_states, i_state, i_s, S, num_segments, scale, o_k[:, None], o_v[None, :], K, V
    )
    t_last = t_begin + (tl.cdiv(t_end - t_begin, C) - 1) * C
    t_stored = tl.minimum(t_end, first) if KIND == SCALAR else t_end
    if KIND == VECTOR:
        b_dS *= decay_to_end(g + t_last // C * (2 * K * H), o_k, t_begin < t_end, K)[:, None]
    else:
        b_G, total = running_decay(g, o_head, i_h, t_last, t_end, t_begin < t_end, KIND)
        b_dS *= tl.exp2(total)
    b_dS *= 1.0 / middle(DTYPE, KIND)
    b_starts, last = sequence_starts(begins, t_last, t_end, C)
    q_source = tile_source(q, start * H + i_h, t_end, H, K, C, BK, LOAD_AB)
    k_source = tile_source(k, start * H + i_h, t_end, H, K, C, BK, LOAD)
    do_source = tile_source(do, start * H + i_h, t_end, H, V, C, TILE, LOAD_B)
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=STAGES):
        t = t_last - i * C
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_q = load_tile(q_source, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, LOAD_AB)  # [C, BK]
        b_k = load_tile(k_source, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, LOAD)  # [C, BK]
        b_do = load_tile(do_source, t, i_v * TILE, row, o_c, m_c, H, o_v, V, C, TILE, LOAD_B).to(DTYPE)  # [C, TILE]
        b_dv = keep_last_sequence(tl.dot(b_k, operand(b_dS, DTYPE)), begins, last)  # [C, TILE]
        m_scores = same_sequence_pairs(m_causal, begins, b_starts, True)
        b_P = operand(tl.where(m_scores, tl.dot(b_k, tl.trans(b_q)), 0.0), DTYPE)  # [C, C]
        if KIND == VECTOR:
            b_to_end = decay_to_end(g + (t // C - 1) * (2 * K * H), o_k, t > t_begin, K)
            b_dv = tl.dot(b_P, b_do, acc=b_dv)
            store_rows(dv + row * V, o_c, m_c, H, o_v, V, b_dv * scale)
            b_dS = tl.dot(
                tl.trans(b_q), keep_started_before(b_do, begins, b_starts), acc=keep_if_spanning(b_dS, begins, last)
            )
            b_dS *= b_to_end[:, None]
        else:
            b_G_next, total_next = running_decay(g, o_head, i_h, t - C, t_end, t > t_begin, KIND)
            m_stored = t + o_c < t_stored
            b_do = scale_rows(b_do, b_G, 1.0 / middle(DTYPE, KIND), KIND).to(DTYPE)
            b_dv = tl.dot(b_P, b_do, acc=b_dv)
            b_dv = scale_rows(b_dv, -b_G, middle(DTYPE, KIND), KIND)
            store_rows(dv + row * V, o_c, m_stored, H, o_v, V, b_dv * scale)
            b_dS = tl.dot(
                tl.trans(b_q), keep_started_before(b_do, begins, b_starts), acc=keep_if_spanning(b_dS, begins, last)
            )
            if KIND != NONE:
                b_dS *= tl.exp2(total_next)
                b_G, total = b_G_next, total_next
        b_starts, last = sequence_starts(begins, tl.maximum(t - C, t_begin), t_end, C)
