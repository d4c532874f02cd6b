"""Backward of the vector decay kind (one decay per key channel), by the same roles as `chunk_backward.py`.

With queries relative to a pivot `a` and keys to a pivot `b` (`_decay.py`; in range both are the chunk's middle):

    Qn = Q e^{G - a}   Kn = K e^{b - G}
    dq (forward in time):  dQ = scale e^{G - a} (tril(dO V^T) Kn + dO (e^a S)^T)
    dk (reverse):          dK = scale e^{b - G} (triu(V dO^T) Qn + V (e^{G_C - b} dS)^T)
    dv (reverse):          dV = scale (triu(Kn Qn^T) dO + Kn (e^{G_C - b} dS))
    reverse states:        dS <- e^{G_C} dS + e^a Qn^T dO           in units of `scale`

Out of range the score products are formed pair by pair (`far_scores`, `far_gradient`). All states are held V first.
The rows of the gate gradient are `Qn * dQn - Kn * dKn` with the rounded operands that the dots used (kernels.md 7.11).
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import dot_split, load_state, load_tile, sequence, store_state, store_tile
from fla.backends.triton.decay._decay import C, far_gradient, far_scores, safe_range, vector_decay
from fla.backends.triton.decay.chunk_backward import TILE
from fla.backends.triton.decay.gate_gradient import close_gate_gradient


@triton.jit
def _dq_role(q, k, v, g, do, h0, dq, rows, start, length, scale, i_state, i_h, H, i_tile,
             K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, RANGE: tl.constexpr):  # fmt: skip
    o_c, o_k, o_v = tl.arange(0, C), i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BV)
    m_pair = o_c[:, None] >= o_c[None, :]
    b_S = tl.zeros([BV, TILE], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[None, :], o_v[:, None], K, V)
    for t in range(0, length, C):
        m_t = t + o_c < length
        row = (start + t + o_c) * H + i_h
        b_k = load_tile(k, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V)
        b_do = load_tile(do, row, m_t, o_v, V)
        b_Gm, b_m, b_total, b_pq, b_pk, far = vector_decay(load_tile(g, row, m_t, o_k, K), RANGE)
        b_dP = tl.where(m_pair, tl.dot(b_do, tl.trans(b_v)), 0.0).to(b_k.dtype)
        b_kn = (b_k * tl.exp2((b_pk - b_m)[None, :] - b_Gm)).to(b_k.dtype)
        b_S *= tl.exp2(b_pq)[None, :]
        b_dqn = dot_split(b_do, b_S, b_do.dtype)
        if far:
            b_direct = far_gradient(b_dP.to(tl.float32), k, g, row, m_t, m_pair, o_k, K, False)
        else:
            b_direct = tl.zeros([C, TILE], tl.float32)
            b_dqn = tl.dot(b_dP, b_kn, acc=b_dqn)
        b_up = tl.exp2(b_Gm + (b_m - b_pq)[None, :])
        store_tile(dq, row, m_t, o_k, K, (b_dqn * b_up + b_direct) * scale)
        if rows is not None:
            b_q = load_tile(q, row, m_t, o_k, K)
            b_row = (b_q * b_up).to(b_q.dtype) * b_dqn + b_q * b_direct
            store_tile(rows, 2 * row, m_t, o_k, K, b_row * scale)
        b_S *= tl.exp2(b_pk - b_pq)[None, :]
        b_S = tl.dot(tl.trans(b_v), b_kn, acc=b_S)
        b_S *= tl.exp2(b_total - b_pk)[None, :]


@triton.jit
def _dk_role(q, k, v, g, do, dht, dk, dh0, rows, start, length, scale, i_state, i_h, H, i_tile,
             K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, RANGE: tl.constexpr):  # fmt: skip
    o_c, o_k, o_v = tl.arange(0, C), i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BV)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = tl.zeros([BV, TILE], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V) / scale
    for i_t in range(0, tl.cdiv(length, C)):
        t = (tl.cdiv(length, C) - 1 - i_t) * C
        m_t = t + o_c < length
        row = (start + t + o_c) * H + i_h
        b_q = load_tile(q, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V)
        b_do = load_tile(do, row, m_t, o_v, V)
        b_Gm, b_m, b_total, b_pq, b_pk, far = vector_decay(load_tile(g, row, m_t, o_k, K), RANGE)
        b_dP = tl.where(m_pair, tl.dot(b_v, tl.trans(b_do)), 0.0).to(b_q.dtype)
        b_qn = (b_q * tl.exp2(b_Gm + (b_m - b_pq)[None, :])).to(b_q.dtype)
        b_dS *= tl.exp2(b_total - b_pk)[None, :]
        b_dkn = dot_split(b_v, b_dS, b_v.dtype)
        if far:
            b_direct = far_gradient(b_dP.to(tl.float32), q, g, row, m_t, m_pair, o_k, K, True)
        else:
            b_direct = tl.zeros([C, TILE], tl.float32)
            b_dkn = tl.dot(b_dP, b_qn, acc=b_dkn)
        b_down = tl.exp2((b_pk - b_m)[None, :] - b_Gm)
        store_tile(dk, row, m_t, o_k, K, (b_dkn * b_down + b_direct) * scale)
        if rows is not None:
            b_k = load_tile(k, row, m_t, o_k, K)
            b_row = (b_k * b_down).to(b_k.dtype) * b_dkn + b_k * b_direct
            store_tile(rows, 2 * row + 1, m_t, o_k, K, b_row * scale)
        b_dS *= tl.exp2(b_pk - b_pq)[None, :]
        b_dS = tl.dot(tl.trans(b_do), b_qn, acc=b_dS)
        b_dS *= tl.exp2(b_pq)[None, :]
    if dh0 is not None:
        store_state(dh0, i_state, o_k[None, :], o_v[:, None], K, V, b_dS * scale)


@triton.jit
def _dv_role(q, k, g, do, dht, dv, start, length, scale, i_state, i_h, H, i_tile,
             K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, RANGE: tl.constexpr):  # fmt: skip
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_tile * TILE + tl.arange(0, TILE)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = tl.zeros([TILE, BK], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V) / scale
    for i_t in range(0, tl.cdiv(length, C)):
        t = (tl.cdiv(length, C) - 1 - i_t) * C
        m_t = t + o_c < length
        row = (start + t + o_c) * H + i_h
        b_q = load_tile(q, row, m_t, o_k, K)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_do = load_tile(do, row, m_t, o_v, V)
        b_Gm, b_m, b_total, b_pq, b_pk, far = vector_decay(load_tile(g, row, m_t, o_k, K), RANGE)
        b_qn = (b_q * tl.exp2(b_Gm + (b_m - b_pq)[None, :])).to(b_q.dtype)
        b_kn = (b_k * tl.exp2((b_pk - b_m)[None, :] - b_Gm)).to(b_k.dtype)
        if far:
            b_P = far_scores(k, q, g, row, m_t, m_pair, K, True)
        else:
            b_P = tl.dot(b_kn, tl.trans(b_qn))
        b_P = tl.where(m_pair, b_P, 0.0).to(b_do.dtype)
        b_dS *= tl.exp2(b_total - b_pk)[None, :]
        b_dv = tl.dot(b_kn, tl.trans(b_dS.to(b_k.dtype)))
        b_dv = tl.dot(b_P, b_do, acc=b_dv)
        store_tile(dv, row, m_t, o_v, V, b_dv * scale)
        b_dS *= tl.exp2(b_pk - b_pq)[None, :]
        b_dS = tl.dot(tl.trans(b_do), b_qn, acc=b_dS)
        b_dS *= tl.exp2(b_pq)[None, :]


@triton.jit(do_not_specialize=["T", "H"])
def vector_backward_kernel(
    q, k, v, g, do, h0, dht, dq, dk, dv, dh0, rows, cu_seqlens, scale, T, H, K: tl.constexpr, V: tl.constexpr, RANGE: tl.constexpr
):  # fmt: skip
    NK: tl.constexpr = (K + TILE - 1) // TILE
    NV: tl.constexpr = (V + TILE - 1) // TILE
    BK: tl.constexpr = 64 if K <= 64 else 128
    BV: tl.constexpr = 64 if V <= 64 else 128
    i_role = tl.program_id(0) % (2 * NK + NV)
    i_state = tl.program_id(0).to(tl.int64) // (2 * NK + NV)
    i_n, i_h = i_state // H, i_state % H
    start, length = sequence(cu_seqlens, i_n, T)
    if i_role < NK:
        _dq_role(q, k, v, g, do, h0, dq, rows, start, length, scale, i_state, i_h, H, i_role, K, V, BV, RANGE)
    elif i_role < 2 * NK:
        _dk_role(
            q, k, v, g, do, dht, dk, dh0, rows, start, length, scale, i_state, i_h, H, i_role - NK, K, V, BV, RANGE
        )
    else:
        _dv_role(q, k, g, do, dht, dv, start, length, scale, i_state, i_h, H, i_role - 2 * NK, K, V, BK, RANGE)


def backward(problem: Problem, kind: int, gate, do, dht, change):
    """dq, dk, dv, dg `[B, T, H, K]` or None, dh0 or None. `change` `[N, H, K]` = rowsum(S_T * dS_T) asks for dg."""
    q, k, v = problem.q, problem.k, problem.v
    N, H, K, V = problem.state_shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dh0 = None if problem.initial_state is None else q.new_empty(problem.state_shape, dtype=torch.float32)
    rows = None if change is None else q.new_empty(*q.shape[:3], 2, K, dtype=torch.float32)
    grid = (N * H * (2 * triton.cdiv(K, TILE.value) + triton.cdiv(V, TILE.value)),)
    vector_backward_kernel[grid](
        q, k, v, gate, do, problem.initial_state, dht, dq, dk, dv, dh0, rows, problem.cu_seqlens, problem.scale, q.shape[1], H,
        K=K, V=V, RANGE=safe_range(q.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    dg = None if rows is None else close_gate_gradient(problem, gate, rows, change)
    return dq, dk, dv, dg, dh0
