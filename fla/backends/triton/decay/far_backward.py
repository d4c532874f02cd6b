"""The roles of the backward for heads whose decay, the same for all channels, is too strong for one middle a chunk
(FAR_CONSTANT, FAR_SCALAR): an exponential for every pair of tokens, and states decayed by whole chunks.

    dq:  dP = tril(dO V^T * Gam)    dQ = scale (dP K + e^G dO S^T)
    dk:  dK = scale (dP^T Q + e^{G_C - G} V dS^T)
    dv:  P = tril(Q K^T * Gam)      dV = scale (P^T dO + e^{G_C - G} K dS)        dS <- e^{G_C} dS + Q^T (e^G dO)

Their frame is that of `chunk_backward.py`.
"""

import triton
import triton.language as tl

from fla.backends.triton._lib import dot_split, load_rows, load_state, store_rows, store_state
from fla.backends.triton.decay._decay import (
    CHUNK,
    TILE,
    pair_decay,
    scalar_decay,
    state_before,
    state_gradient_after,
)

STAGES = tl.constexpr(2)  # loads by pointers have room for no more beside a second program


@triton.jit
def far_dq(
    q, k, v, g, do, h0, dht, dq, rows, change, local, at, scale, H, i_k, i_v,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    start, t_begin, t_end, length, base, states, i_state, i_s, S, count = at
    i_h = i_state % H
    o_c, o_k, o_v = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE), i_v * BV + tl.arange(0, BV)
    m_pair = o_c[:, None] >= o_c[None, :]
    b_S = state_before(h0, local, i_state, i_s, S, o_k[None, :], o_v[:, None], K, V)
    for t in tl.range(t_begin, t_end, C, num_stages=STAGES):
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_k = load_rows(k + row * K, o_c, m_c, H, o_k, K)
        b_v = load_rows(v + row * V, o_c, m_c, H, o_v, V).to(DTYPE)
        b_do = load_rows(do + row * V, o_c, m_c, H, o_v, V).to(DTYPE)
        b_G, total = scalar_decay(g, base, i_h, t, t_end, True, KIND)
        if rows is not None:
            b_q = load_rows(q + row * K, o_c, m_c, H, o_k, K)
        b_P = (tl.dot(b_do, tl.trans(b_v)) * pair_decay(b_G, m_pair, False)).to(DTYPE)
        b_dq = tl.dot(b_P, b_k)
        if rows is None:
            b_inter = tl.dot(b_do, b_S.to(DTYPE))
        else:
            b_inter = dot_split(b_do, b_S, DTYPE)
            b_qs = (b_q * tl.exp2(b_G)[:, None]).to(DTYPE)
            tl.store(rows + base + t + o_c, tl.sum(b_q * b_dq + b_qs * b_inter, 1) * scale, mask=m_c)
        b_inter *= tl.exp2(b_G)[:, None]
        b_k = (b_k * tl.exp2(total - b_G)[:, None]).to(DTYPE)
        b_S *= tl.exp2(total)
        store_rows(dq + row * K, o_c, m_c, H, o_k, K, (b_dq + b_inter) * scale)
        b_S = tl.dot(tl.trans(b_v), b_k, acc=b_S)
    if change is not None:
        # <S, dS> with the S of these rounded operands: with any other the gate gradient's terms do not cancel
        if dht is not None:
            if t_end == length:
                b_dS = load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V)
                tl.store(change + o_k, tl.sum(b_S * b_dS, 0), mask=o_k < K)


@triton.jit
def far_dk(
    q, k, v, g, do, dht, dk, dh0, rows, change, local, at, scale, H, i_k, i_v,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    start, t_begin, t_end, length, base, states, i_state, i_s, S, count = at
    i_h = i_state % H
    o_c, o_k, o_v = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE), i_v * BV + tl.arange(0, BV)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = state_gradient_after(dht, local, states, i_state, i_s, S, count, scale, o_k[None, :], o_v[:, None], K, V)
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=STAGES):
        t = t_begin + (tl.cdiv(t_end - t_begin, C) - 1 - i) * C
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_q = load_rows(q + row * K, o_c, m_c, H, o_k, K)
        b_v = load_rows(v + row * V, o_c, m_c, H, o_v, V).to(DTYPE)
        b_do = load_rows(do + row * V, o_c, m_c, H, o_v, V).to(DTYPE)
        b_G, total = scalar_decay(g, base, i_h, t, t_end, True, KIND)
        if rows is not None:
            b_k = load_rows(k + row * K, o_c, m_c, H, o_k, K)
        b_P = (tl.dot(b_v, tl.trans(b_do)) * pair_decay(b_G, m_pair, True)).to(DTYPE)
        b_dk = tl.dot(b_P, b_q)
        if rows is None:
            b_inter = tl.dot(b_v, b_dS.to(DTYPE))
        else:
            b_inter = dot_split(b_v, b_dS, DTYPE)
            b_ks = (b_k * tl.exp2(total - b_G)[:, None]).to(DTYPE)
            tl.store(rows + base + t + o_c, tl.sum(b_k * b_dk + b_ks * b_inter, 1) * scale, mask=m_c)
        b_inter *= tl.exp2(total - b_G)[:, None]
        b_q = (b_q * tl.exp2(b_G)[:, None]).to(DTYPE)
        b_dS *= tl.exp2(total)
        store_rows(dk + row * K, o_c, m_c, H, o_k, K, (b_dk + b_inter) * scale)
        b_dS = tl.dot(tl.trans(b_do), b_q, acc=b_dS)
    if dh0 is not None:
        if i_s == 0:
            store_state(dh0, i_state, o_k[None, :], o_v[:, None], K, V, b_dS * scale)


@triton.jit
def far_dv(
    q, k, g, do, dht, dv, local, at, scale, H, i_k, i_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    start, t_begin, t_end, length, base, states, i_state, i_s, S, count = at
    i_h = i_state % H
    o_c, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * TILE + tl.arange(0, TILE)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = state_gradient_after(dht, local, states, i_state, i_s, S, count, scale, o_k[:, None], o_v[None, :], K, V)
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=STAGES):
        t = t_begin + (tl.cdiv(t_end - t_begin, C) - 1 - i) * C
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_q = load_rows(q + row * K, o_c, m_c, H, o_k, K)
        b_k = load_rows(k + row * K, o_c, m_c, H, o_k, K)
        b_do = load_rows(do + row * V, o_c, m_c, H, o_v, V).to(DTYPE)
        b_P = tl.dot(b_k, tl.trans(b_q))
        b_G, total = scalar_decay(g, base, i_h, t, t_end, True, KIND)
        b_P = (b_P * pair_decay(b_G, m_pair, True)).to(DTYPE)
        b_dv = tl.dot(b_k, b_dS.to(DTYPE))
        b_dv *= tl.exp2(total - b_G)[:, None]
        b_dv = tl.dot(b_P, b_do, acc=b_dv)
        store_rows(dv + row * V, o_c, m_c, H, o_v, V, b_dv * scale)
        b_do = (b_do * tl.exp2(b_G)[:, None]).to(DTYPE)
        b_dS *= tl.exp2(total)
        b_dS = tl.dot(tl.trans(b_q), b_do, acc=b_dS)
