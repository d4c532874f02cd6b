"""Backward of the scalar decay kinds: two directions, no stored state, one launch in which a program plays one role.

    dq (forward in time, a tile of K):   dP = tril(dO V^T * Gam)      dQ = scale (dP K + e^G dO S^T)          S as in
    the forward
    dk (reverse, a tile of K):           dK = scale (dP^T Q + e^{G_C - G} V dS^T)
    dv (reverse, a tile of V):           dV = scale (P^T dO + e^{G_C - G} K dS)
    reverse states:                      dS <- e^{G_C} dS + Q^T (e^G dO)             in units of `scale`; dS at the
    start is d h0

Each direction forms its scores in one orientation, so no accumulator is ever transposed as a left operand. Roles dq
and dk hold their state V first, dv K first: what enters a state is then a loaded tile on the left and a scaled one on
the right.

Gate gradient: `dg_t = sum_{s >= t} (q dq - k dk)_s + <S_T, dS_T>`. The row products use the same rounded operands
that the dots used, and the states enter their dots as high and low halves, else the difference drowns in rounding
(kernels.md 7.11).
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import dot_split, load_state, load_tile, sequence, store_state, store_tile
from fla.backends.triton.decay._decay import CHUNK, NONE, TILE, decayed, scalar_decay
from fla.backends.triton.decay.gate_gradient import GateTerms, close_gate_gradient


@triton.jit
def _dq_role(
    q, k, v, g, do, h0, dht, dq, rows, change, first, length, scale, i_state, H, i_tile,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    BV: tl.constexpr = 64 if V <= 64 else 128
    o_c, o_k, o_v = tl.arange(0, CHUNK), i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BV)
    m_pair = o_c[:, None] >= o_c[None, :]
    b_S = tl.zeros([BV, TILE], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[None, :], o_v[:, None], K, V)
    for t in range(0, length, CHUNK):
        m_t = t + o_c < length
        row = first + (t + o_c) * H.to(tl.int64)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V)
        b_do = load_tile(do, row, m_t, o_v, V)
        b_G, total = scalar_decay(g, row, m_t, i_state % H, length - t, KIND)
        b_dP = decayed(tl.dot(b_do, tl.trans(b_v)), b_G, m_pair, KIND, False).to(b_k.dtype)
        b_dq = tl.dot(b_dP, b_k)
        if rows is None:
            b_inter = tl.dot(b_do, b_S.to(b_do.dtype))
        else:
            b_inter = dot_split(b_do, b_S, b_do.dtype)
            b_q = load_tile(q, row, m_t, o_k, K)
            b_qs = (b_q * tl.exp2(b_G)[:, None]).to(b_q.dtype)
            b_row = tl.sum(b_q * b_dq + b_qs * b_inter, 1) * scale
            tl.store(rows + row * (2 * tl.cdiv(K, TILE)) + i_tile, b_row, mask=m_t)
        if KIND != NONE:
            b_inter *= tl.exp2(b_G)[:, None]
            b_k = (b_k * tl.exp2(total - b_G)[:, None]).to(b_k.dtype)
            b_S *= tl.exp2(total)
        store_tile(dq, row, m_t, o_k, K, (b_dq + b_inter) * scale)
        b_S = tl.dot(tl.trans(b_v), b_k, acc=b_S)
    if rows is not None and dht is not None:
        # <S_T, dS_T> with the S_T of these rounded operands: with any other the gate gradient's terms do not cancel
        b_dS = load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V)
        tl.store(change + i_state * K + o_k, tl.sum(b_S * b_dS, 0), mask=o_k < K)


@triton.jit
def _dk_role(
    q, k, v, g, do, dht, dk, dh0, rows, first, length, scale, i_state, H, i_tile,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    BV: tl.constexpr = 64 if V <= 64 else 128
    o_c, o_k, o_v = tl.arange(0, CHUNK), i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BV)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = tl.zeros([BV, TILE], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V) / scale
    for i_t in range(0, tl.cdiv(length, CHUNK)):
        t = (tl.cdiv(length, CHUNK) - 1 - i_t) * CHUNK
        m_t = t + o_c < length
        row = first + (t + o_c) * H.to(tl.int64)
        b_q = load_tile(q, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V)
        b_do = load_tile(do, row, m_t, o_v, V)
        b_G, total = scalar_decay(g, row, m_t, i_state % H, length - t, KIND)
        b_dP = decayed(tl.dot(b_v, tl.trans(b_do)), b_G, m_pair, KIND, True).to(b_q.dtype)
        b_dk = tl.dot(b_dP, b_q)
        if rows is None:
            b_inter = tl.dot(b_v, b_dS.to(b_v.dtype))
        else:
            b_inter = dot_split(b_v, b_dS, b_v.dtype)
            b_k = load_tile(k, row, m_t, o_k, K)
            b_ks = (b_k * tl.exp2(total - b_G)[:, None]).to(b_k.dtype)
            b_row = tl.sum(b_k * b_dk + b_ks * b_inter, 1) * scale
            tl.store(rows + row * (2 * tl.cdiv(K, TILE)) + tl.cdiv(K, TILE) + i_tile, b_row, mask=m_t)
        if KIND != NONE:
            b_inter *= tl.exp2(total - b_G)[:, None]
            b_q = (b_q * tl.exp2(b_G)[:, None]).to(b_q.dtype)
            b_dS *= tl.exp2(total)
        store_tile(dk, row, m_t, o_k, K, (b_dk + b_inter) * scale)
        b_dS = tl.dot(tl.trans(b_do), b_q, acc=b_dS)
    if dh0 is not None:
        store_state(dh0, i_state, o_k[None, :], o_v[:, None], K, V, b_dS * scale)


@triton.jit
def _dv_role(
    q, k, g, do, dht, dv, first, length, scale, i_state, H, i_tile,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    BK: tl.constexpr = 64 if K <= 64 else 128
    o_c, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, BK), i_tile * TILE + tl.arange(0, TILE)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = tl.zeros([BK, TILE], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[:, None], o_v[None, :], K, V) / scale
    for i_t in range(0, tl.cdiv(length, CHUNK)):
        t = (tl.cdiv(length, CHUNK) - 1 - i_t) * CHUNK
        m_t = t + o_c < length
        row = first + (t + o_c) * H.to(tl.int64)
        b_q = load_tile(q, row, m_t, o_k, K)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_do = load_tile(do, row, m_t, o_v, V)
        b_G, total = scalar_decay(g, row, m_t, i_state % H, length - t, KIND)
        b_P = decayed(tl.dot(b_k, tl.trans(b_q)), b_G, m_pair, KIND, True).to(b_do.dtype)
        b_dv = tl.dot(b_k, b_dS.to(b_k.dtype))
        if KIND != NONE:
            b_dv *= tl.exp2(total - b_G)[:, None]
        b_dv = tl.dot(b_P, b_do, acc=b_dv)
        store_tile(dv, row, m_t, o_v, V, b_dv * scale)
        if KIND != NONE:
            b_do = (b_do * tl.exp2(b_G)[:, None]).to(b_do.dtype)
            b_dS *= tl.exp2(total)
        b_dS = tl.dot(tl.trans(b_q), b_do, acc=b_dS)


@triton.jit(do_not_specialize=["T", "H"])
def scalar_backward_kernel(
    q, k, v, g, do, h0, dht, dq, dk, dv, dh0, rows, cu_seqlens, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + TILE - 1) // TILE
    ROLES: tl.constexpr = 2 * NK + (V + TILE - 1) // TILE
    i_role, i_state = tl.program_id(0) % ROLES, tl.program_id(0).to(tl.int64) // ROLES
    start, length = sequence(cu_seqlens, i_state // H, T)
    first = start * H + i_state % H
    change = rows
    if rows is not None:
        rows += tl.num_programs(0).to(tl.int64) // ROLES * K
    if i_role < NK:
        _dq_role(q, k, v, g, do, h0, dht, dq, rows, change, first, length, scale, i_state, H, i_role, K, V, KIND)
    elif i_role < 2 * NK:
        _dk_role(q, k, v, g, do, dht, dk, dh0, rows, first, length, scale, i_state, H, i_role - NK, K, V, KIND)
    else:
        _dv_role(q, k, g, do, dht, dv, first, length, scale, i_state, H, i_role - 2 * NK, K, V, KIND)


def backward(problem: Problem, kind: int, gate, do, dht, needs_gate: bool):
    """dq, dk, dv, dg `[B, T, H]` or None, dh0 or None."""
    q, k, v = problem.q, problem.k, problem.v
    N, H, K, V = problem.state_shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dh0 = None if problem.initial_state is None else q.new_empty(problem.state_shape, dtype=torch.float32)
    tiles = triton.cdiv(K, TILE.value)
    terms = GateTerms(problem, 2 * tiles, dht) if needs_gate else None
    scalar_backward_kernel[(N * H * (2 * tiles + triton.cdiv(V, TILE.value)),)](
        q, k, v, gate, do, problem.initial_state, dht, dq, dk, dv, dh0, terms and terms.buffer, problem.cu_seqlens,
        problem.scale, q.shape[1], H, K=K, V=V, KIND=kind, num_warps=4, num_stages=2,
    )  # fmt: skip
    dg = None if terms is None else close_gate_gradient(problem, gate, terms.rows, terms.change.sum(-1))
    return dq, dk, dv, dg, dh0
