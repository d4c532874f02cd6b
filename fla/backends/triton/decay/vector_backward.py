"""Backward of the vector decay kind (one decay per key channel), by the same roles as `chunk_backward.py`.

Relative to the chunk's middle `m` (`_decay.py`), with all states held V first:

    Qn = Q e^{G - m}   Kn = K e^{m - G}
    dq (forward in time):  dQ = scale e^{G - m} (tril(dO V^T) Kn + dO (e^m S)^T)
    dk (reverse):          dK = scale e^{m - G} (triu(V dO^T) Qn + V (e^{G_C - m} dS)^T)
    dv (reverse):          dV = scale (triu(Kn Qn^T) dO + Kn (e^{G_C - m} dS))
    reverse states:        dS <- e^m (e^{G_C - m} dS + Qn^T dO)     in units of `scale`

The rows of the gate gradient are `Qn * dQn - Kn * dKn` with the rounded operands that the dots used (kernels.md 7.11).
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import dot_split, load_state, load_tile, operand, sequence, store_state, store_tile
from fla.backends.triton.decay._decay import (
    CHUNK,
    SHORT,
    TILE,
    flag_far,
    run_vector_kernel,
    vector_decay,
)
from fla.backends.triton.decay.gate_gradient import GateTerms, close_gate_gradient


@triton.jit
def _dq_role(
    q, k, v, g, do, h0, dht, dq, rows, change, far, first, length, scale, i_state, H, i_tile,
    K: tl.constexpr, V: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = SHORT if RANGE is None else CHUNK
    # short chunks of fp16 go through the tensor cores as tf32: fp16's digits, but a range that a strong decay fits in
    OPERAND: tl.constexpr = tl.float32 if RANGE is None and q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    BV: tl.constexpr = 64 if V <= 64 else 128
    o_c, o_k, o_v = tl.arange(0, C), i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BV)
    m_pair = o_c[:, None] >= o_c[None, :]
    b_S = tl.zeros([BV, TILE], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[None, :], o_v[:, None], K, V)
    for t in range(0, length, C):
        m_t = t + o_c < length
        row = first + (t + o_c) * H.to(tl.int64)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V).to(OPERAND)
        b_do = load_tile(do, row, m_t, o_v, V).to(OPERAND)
        b_Gm, b_m, b_total = vector_decay(load_tile(g, row, m_t, o_k, K), C)
        if RANGE is not None:
            flag_far(far, i_state, b_m, b_total, RANGE)
        b_S *= tl.exp2(b_m)[None, :]
        b_dqn = dot_split(b_do, b_S, OPERAND)
        b_dP = operand(tl.where(m_pair, tl.dot(b_do, tl.trans(b_v)), 0.0), OPERAND)
        b_kn = operand(b_k * tl.exp2(-b_Gm), OPERAND)
        b_dqn = tl.dot(b_dP, b_kn, acc=b_dqn)
        store_tile(dq, row, m_t, o_k, K, b_dqn * tl.exp2(b_Gm) * scale)
        if rows is not None:
            b_qn = operand(load_tile(q, row, m_t, o_k, K) * tl.exp2(b_Gm), OPERAND)
            store_tile(rows, 2 * row, m_t, o_k, K, b_qn * b_dqn * scale)
        b_S = tl.dot(tl.trans(b_v), b_kn, acc=b_S)
        b_S *= tl.exp2(b_total - b_m)[None, :]
    if rows is not None and dht is not None:
        # <S_T, dS_T> with the S_T of these rounded operands: with any other the gate gradient's terms do not cancel
        b_dS = load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V)
        tl.store(change + i_state * K + o_k, tl.sum(b_S * b_dS, 0), mask=o_k < K)


@triton.jit
def _dk_role(
    q, k, v, g, do, dht, dk, dh0, rows, far, first, length, scale, i_state, H, i_tile,
    K: tl.constexpr, V: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = SHORT if RANGE is None else CHUNK
    OPERAND: tl.constexpr = tl.float32 if RANGE is None and q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    BV: tl.constexpr = 64 if V <= 64 else 128
    o_c, o_k, o_v = tl.arange(0, C), i_tile * TILE + tl.arange(0, TILE), tl.arange(0, BV)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = tl.zeros([BV, TILE], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V) / scale
    for i_t in range(0, tl.cdiv(length, C)):
        t = (tl.cdiv(length, C) - 1 - i_t) * C
        m_t = t + o_c < length
        row = first + (t + o_c) * H.to(tl.int64)
        b_q = load_tile(q, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V).to(OPERAND)
        b_do = load_tile(do, row, m_t, o_v, V).to(OPERAND)
        b_Gm, b_m, b_total = vector_decay(load_tile(g, row, m_t, o_k, K), C)
        if RANGE is not None:
            flag_far(far, i_state, b_m, b_total, RANGE)
        b_dS *= tl.exp2(b_total - b_m)[None, :]
        b_dkn = dot_split(b_v, b_dS, OPERAND)
        b_dP = operand(tl.where(m_pair, tl.dot(b_v, tl.trans(b_do)), 0.0), OPERAND)
        b_qn = operand(b_q * tl.exp2(b_Gm), OPERAND)
        b_dkn = tl.dot(b_dP, b_qn, acc=b_dkn)
        store_tile(dk, row, m_t, o_k, K, b_dkn * tl.exp2(-b_Gm) * scale)
        if rows is not None:
            b_kn = operand(load_tile(k, row, m_t, o_k, K) * tl.exp2(-b_Gm), OPERAND)
            store_tile(rows, 2 * row + 1, m_t, o_k, K, b_kn * b_dkn * scale)
        b_dS = tl.dot(tl.trans(b_do), b_qn, acc=b_dS)
        b_dS *= tl.exp2(b_m)[None, :]
    if dh0 is not None:
        store_state(dh0, i_state, o_k[None, :], o_v[:, None], K, V, b_dS * scale)


@triton.jit
def _dv_role(
    q, k, g, do, dht, dv, far, first, length, scale, i_state, H, i_tile,
    K: tl.constexpr, V: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = SHORT if RANGE is None else CHUNK
    OPERAND: tl.constexpr = tl.float32 if RANGE is None and q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    BK: tl.constexpr = 64 if K <= 64 else 128
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_tile * TILE + tl.arange(0, TILE)
    m_pair = o_c[:, None] <= o_c[None, :]
    b_dS = tl.zeros([TILE, BK], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[None, :], o_v[:, None], K, V) / scale
    for i_t in range(0, tl.cdiv(length, C)):
        t = (tl.cdiv(length, C) - 1 - i_t) * C
        m_t = t + o_c < length
        row = first + (t + o_c) * H.to(tl.int64)
        b_q = load_tile(q, row, m_t, o_k, K)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_do = load_tile(do, row, m_t, o_v, V).to(OPERAND)
        b_Gm, b_m, b_total = vector_decay(load_tile(g, row, m_t, o_k, K), C)
        if RANGE is not None:
            flag_far(far, i_state, b_m, b_total, RANGE)
        b_qn = operand(b_q * tl.exp2(b_Gm), OPERAND)
        b_kn = operand(b_k * tl.exp2(-b_Gm), OPERAND)
        b_P = tl.where(m_pair, tl.dot(b_kn, tl.trans(b_qn)), 0.0).to(OPERAND)
        b_dS *= tl.exp2(b_total - b_m)[None, :]
        b_dv = tl.dot(b_kn, tl.trans(b_dS.to(OPERAND)))
        b_dv = tl.dot(b_P, b_do, acc=b_dv)
        store_tile(dv, row, m_t, o_v, V, b_dv * scale)
        b_dS = tl.dot(tl.trans(b_do), b_qn, acc=b_dS)
        b_dS *= tl.exp2(b_m)[None, :]


@triton.jit(do_not_specialize=["T", "H"])
def vector_backward_kernel(
    q, k, v, g, do, h0, dht, dq, dk, dv, dh0, rows, cu_seqlens, far, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + TILE - 1) // TILE
    ROLES: tl.constexpr = 2 * NK + (V + TILE - 1) // TILE
    i_role, i_state = tl.program_id(0) % ROLES, tl.program_id(0).to(tl.int64) // ROLES
    if RANGE is None:
        if tl.load(far + i_state) == 0:
            return
    start, length = sequence(cu_seqlens, i_state // H, T)
    first = start * H + i_state % H
    change = rows
    if rows is not None:
        rows += tl.num_programs(0).to(tl.int64) // ROLES * K
    if i_role < NK:
        _dq_role(
            q, k, v, g, do, h0, dht, dq, rows, change, far, first, length, scale, i_state, H, i_role, K, V, RANGE
        )  # fmt: skip
    elif i_role < 2 * NK:
        _dk_role(
            q, k, v, g, do, dht, dk, dh0, rows, far, first, length, scale, i_state, H, i_role - NK, K, V, RANGE
        )  # fmt: skip
    else:
        _dv_role(q, k, g, do, dht, dv, far, first, length, scale, i_state, H, i_role - 2 * NK, K, V, RANGE)


def backward(problem: Problem, kind: int, gate, do, dht, needs_gate: bool):
    """dq, dk, dv, dg `[B, T, H, K]` or None, dh0 or None."""
    q, k, v = problem.q, problem.k, problem.v
    N, H, K, V = problem.state_shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dh0 = None if problem.initial_state is None else q.new_empty(problem.state_shape, dtype=torch.float32)
    terms = GateTerms(problem, 2 * K, dht) if needs_gate else None
    grid = (N * H * (2 * triton.cdiv(K, TILE.value) + triton.cdiv(V, TILE.value)),)
    arguments = (q, k, v, gate, do, problem.initial_state, dht, dq, dk, dv, dh0, terms and terms.buffer)
    arguments = (*arguments, problem.cu_seqlens)
    stages = 1 if q.dtype == torch.float16 else 2  # in fp16 two spill
    run_vector_kernel(vector_backward_kernel, grid, arguments, problem, stages=stages, K=K, V=V)
    dg = None if terms is None else close_gate_gradient(problem, gate, terms.rows, terms.change)
    return dq, dk, dv, dg, dh0
