"""The last step of the gate gradients, from rows `r_t` (dq's, minus dk's or dv's) that a kernel left:

    dg_t = sum_{s >= t} r_s + change          0 where g_t < -16 nats

The rows of a head with one decay a token come of states that were rounded once, and of all that lies behind a token
their sums would keep too few digits: 0.4 to 0.8 % off after 1,024 tokens, 0.5 to 3 % after 8,192 (bf16). So they begin
anew at every boundary of windows, from `<S, dS>` of the states that the roles leave there:

    dg_t = sum_{t <= s < p} r_s + <S_p, dS_p>          p: the first boundary behind t

A program walks a sequence, or a part of one, of one head backwards.
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._launch import ceil_div, empty_as, launch
from fla.backends.triton._lib import (
    DEAD_LOG_DECAY,
    INTERPRETED,
    LOG2E,
    MIN_LOG_DECAY,
    load_rows,
    sequence,
    store_rows,
)
from fla.backends.triton.decay._decay import (
    CHUNK,
    SCALAR,
    SHORT,
    SHORT_CHUNK,
    TILE,
    UNIT,
    VECTOR,
    WINDOW,
    boundaries,
    boundary,
    head_base,
    is_behind,
    is_far,
    segment,
)
from fla.backends.triton.decay.prepare import Prepared

LONG = tl.constexpr(4096)  # numbers at once that are only added up


@triton.jit(do_not_specialize=["T", "H", "L"])
def scalar_gate_gradient_kernel(
    g, sums, rows, dg, cu_seqlens, scale, T, H, L, K: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr,
    TERMS: tl.constexpr, CHANGES: tl.constexpr, HAS_CHANGE: tl.constexpr,
):  # fmt: skip
    """Per head: `rows` as `chunk_backward_kernel` leaves them, TERMS of them (the latter half to be subtracted).
    Without packing a program has a window of them; of a pack it walks the windows of a sequence. The sum begins anew
    at every boundary of windows: of a far head, which leaves no states there, with all the rows behind it."""
    windows = tl.maximum(tl.cdiv(T, WINDOW), 1) if cu_seqlens is None else 1
    i_state, states = tl.program_id(0).to(tl.int64) // windows, tl.num_programs(0) // windows
    i_n, i_h = i_state // H, i_state % H
    start, length = sequence(cu_seqlens, i_n, T)
    base = head_base(cu_seqlens, start, i_h, T, H)
    tokens = start * 0 + (T if cu_seqlens is not None else states // H * T)  # 64 bits, like start
    S = tl.cdiv(T, L)
    far = is_far(sums, cu_seqlens, i_state, states, start, length, T, H, DTYPE, SCALAR)
    b_sum = tl.zeros([1], tl.float64)
    if HAS_CHANGE:
        b_sum += _last_change(rows, i_state, states, tl.maximum(tl.cdiv(length, L) - 1, 0), S, length, K, CHANGES)
    rows += (CHANGES * S * K) * states
    left = boundaries(rows, TERMS * tokens * H, DTYPE)
    rows += base
    first, last = 0, tl.cdiv(length, WINDOW)
    if cu_seqlens is None:
        first = tl.program_id(0) % windows
        last = first + 1
        if far != 0:
            for t in range(last * WINDOW, length, LONG):
                o_t = t + tl.arange(0, LONG)
                b_sum += tl.sum(_rows_of(rows, o_t, o_t < length, tokens * H, TERMS).to(tl.float64), 0)
    for i in range(first, last):
        i_w = first + last - 1 - i
        t_last = tl.minimum((i_w + 1) * WINDOW, length)
        if (far == 0) & (t_last < length):
            b_sum = (
                tl.zeros([1], tl.float64) + _inner_product(boundary(left, t_last, start, i_h, H, K, V), K * V) * scale
            )
        o_t = t_last - 1 - tl.arange(0, WINDOW)
        m_t = o_t >= i_w * WINDOW
        b_r = _rows_of(rows, o_t, m_t, tokens * H, TERMS)
        b_g = tl.load(g + (start + o_t) * H + i_h, mask=m_t, other=0.0).to(tl.float32)
        b_dg = (b_sum + tl.cumsum(b_r.to(tl.float64), 0)).to(tl.float32)
        b_dg = tl.where(b_g < DEAD_LOG_DECAY, 0.0, b_dg)
        tl.store(dg + (start + o_t) * H + i_h, b_dg.to(dg.dtype.element_ty), mask=m_t)
        b_sum += tl.sum(b_r.to(tl.float64), 0)


@triton.jit
def _last_change(changes, i_state, states, i_last, S, length, K: tl.constexpr, CHANGES: tl.constexpr):
    """`<S_T, dS_T>` of a sequence, 0 of one without tokens."""
    BK: tl.constexpr = 64 if K <= 64 else 128 if K <= 128 else 256 if K <= 256 else 512
    o_k = tl.arange(0, BK)
    b_sum = tl.zeros([BK], tl.float64)
    for i in tl.static_range(CHANGES):
        p_change = changes + ((i * states + i_state) * S + i_last) * K + o_k
        b_sum += tl.load(p_change, mask=tl.where(length > 0, o_k < K, False), other=0.0).to(tl.float64)
    return tl.sum(b_sum, 0)


@triton.jit
def _inner_product(p, SIZE: tl.constexpr):
    """`<x, y>` for `x` at `p` and `y` behind it."""
    o = tl.arange(0, LONG)
    b_sum = tl.zeros([LONG], tl.float32)
    for i in tl.range(0, SIZE, LONG, num_stages=2):
        b_x = tl.load(p + i + o, mask=i + o < SIZE, other=0.0).to(tl.float32)
        b_sum += b_x * tl.load(p + SIZE + i + o, mask=i + o < SIZE, other=0.0).to(tl.float32)
    return tl.sum(b_sum, 0).to(tl.float64)


@triton.jit
def _rows_of(rows, o_t, mask, size, TERMS: tl.constexpr):
    b_r = o_t.to(tl.float32) * 0.0
    for i in tl.static_range(TERMS):
        b_term = tl.load(rows + i * size + o_t, mask=mask, other=0.0)
        b_r += b_term if i < TERMS // 2 else -b_term
    return b_r


@triton.jit
def _suffix_sums(b_r, b_carry, C: tl.constexpr):
    """Sums of the rows `b_r` `[C, D]` from each to the last, and `b_carry` (its rows are equal) plus all of them: as
    products with matrices of ones, of high and low halves (a running sum along the tokens is several times slower)."""
    o_c = tl.arange(0, C)
    b_U = (o_c[:, None] <= o_c[None, :]).to(tl.float32)
    if INTERPRETED:
        return tl.dot(b_U, b_r) + b_carry, tl.sum(b_r, 0)[None, :] + b_carry
    else:
        b_high = b_r.to(tl.bfloat16)
        b_low = (b_r - b_high.to(tl.float32)).to(tl.bfloat16)
        b_sums = tl.dot(b_U.to(tl.bfloat16), b_low, acc=tl.dot(b_U.to(tl.bfloat16), b_high, acc=b_carry))
        b_ones = tl.full([C, C], 1.0, tl.bfloat16)
        return b_sums, tl.dot(b_ones, b_low, acc=tl.dot(b_ones, b_high, acc=b_carry))


@triton.jit
def centred(b_g, KIND: tl.constexpr, PARTS: tl.constexpr):
    """`G` (SHORT: `G - m`) `[C, BK]` of a gate tile, log2, as `prepare.py` has it.

    The running sum is a product with a matrix of 0 and +-1: exact for 16-bit gates, float32 ones enter as PARTS numbers
    of 8 bits. (A running sum along the token axis is several times slower.)"""
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    o_c = tl.arange(0, C)
    b_w = tl.maximum(b_g.to(tl.float32), MIN_LOG_DECAY / 2 if KIND == SHORT else MIN_LOG_DECAY)
    b_A = (o_c[:, None] >= o_c[None, :]).to(tl.float32)
    if KIND == SHORT:
        b_A -= (o_c < C // 2)[None, :].to(tl.float32)
    if INTERPRETED:
        b_Gm = tl.dot(b_A, b_w)
    elif b_g.dtype == tl.float16:
        b_Gm = tl.dot(b_A.to(tl.float16), b_w.to(tl.float16))
    else:
        b_part = b_w.to(tl.bfloat16)
        b_Gm = tl.dot(b_A.to(tl.bfloat16), b_part)
        if b_g.dtype != tl.bfloat16:
            for _ in tl.static_range(PARTS - 1):
                b_w -= b_part.to(tl.float32)
                b_part = b_w.to(tl.bfloat16)
                b_Gm = tl.dot(b_A.to(tl.bfloat16), b_part, acc=b_Gm)
    return b_Gm * LOG2E


@triton.jit
def _finish_segment(
    qn, kn, g, rows, dq, dk, dg, at, tokens, H, i_k, K: tl.constexpr, NV: tl.constexpr, KIND: tl.constexpr
):
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    UP: tl.constexpr = 1.0 / UNIT if KIND == VECTOR else 1.0
    DOWN: tl.constexpr = UNIT if KIND == VECTOR else 1.0
    start, t_begin, t_end, i_state, states, i_s, S = at
    i_h = i_state % H
    o_c, o_k = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE)
    b_sum = tl.zeros([C, TILE], tl.float32)
    if dg is not None:
        for i in tl.static_range(NV):
            p_change = rows + ((i * states + i_state) * S + i_s) * K + o_k
            b_sum += tl.load(p_change, mask=o_k < K, other=0.0)[None, :]
    rows += NV * states * S * K
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=2):
        t = t_begin + (tl.cdiv(t_end - t_begin, C) - 1 - i) * C
        m_c = t + o_c < t_end
        row = ((start + t) * H + i_h) * K
        b_g = load_rows(g + row, o_c, m_c, H, o_k, K)
        b_Gm = centred(b_g, KIND, 3 if qn.dtype.element_ty == tl.float32 else 2)
        b_dq, b_dk = tl.zeros([C, TILE], tl.float32), tl.zeros([C, TILE], tl.float32)
        for i_v in tl.static_range(NV):
            b_dq += load_rows(rows + i_v * tokens * H * K + row, o_c, m_c, H, o_k, K)
            b_dk += load_rows(rows + (NV + i_v) * tokens * H * K + row, o_c, m_c, H, o_k, K)
        store_rows(dq + row, o_c, m_c, H, o_k, K, b_dq * (tl.exp2(b_Gm) * UP))
        store_rows(dk + row, o_c, m_c, H, o_k, K, b_dk * (tl.exp2(-b_Gm) * DOWN))
        if dg is not None:
            b_r = load_rows(qn + row, o_c, m_c, H, o_k, K) * b_dq - load_rows(kn + row, o_c, m_c, H, o_k, K) * b_dk
            b_dg, b_sum = _suffix_sums(b_r, b_sum, C)
            store_rows(dg + row, o_c, m_c, H, o_k, K, tl.where(b_g.to(tl.float32) < DEAD_LOG_DECAY, 0.0, b_dg))


@triton.jit(do_not_specialize=["T", "H", "L"])
def finish_vector_kernel(
    qn, kn, g, factors, rows, dq, dk, dg, cu_seqlens, T, H, L,
    K: tl.constexpr, NV: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of what `chunk_backward_kernel` left for the vector kind, dQn and dKn, a chunk at a time:

    dq = dQn e^{G - m}      dk = dKn e^{m - G}      r = Qn dQn - Kn dKn      the sum restarted at every segment's end

    with `m` as in `prepare.py` (of VECTOR, `e^m` is UNIT).
    """
    KIND: tl.constexpr = KINDS % 8
    FAR: tl.constexpr = KINDS // 8
    TK: tl.constexpr = (K + TILE - 1) // TILE
    S = tl.cdiv(T, L)
    i_k, i_s = tl.program_id(0) % TK, tl.program_id(0) // TK % S
    i_state, states = tl.program_id(0).to(tl.int64) // (TK * S), tl.num_programs(0) // (TK * S)
    start, length, t_begin, t_end = segment(cu_seqlens, i_state // H, i_s, T, L)
    if is_behind(i_s, t_begin, length):
        return
    tokens = start * 0 + (T if cu_seqlens is not None else states // H * T)
    at = (start, t_begin, t_end, i_state, states, i_s, S)
    if FAR == 0:
        _finish_segment(qn, kn, g, rows, dq, dk, dg, at, tokens, H, i_k, K, NV, KIND)
    else:
        if is_far(factors, cu_seqlens, i_state, states, start, length, T, H, qn.dtype.element_ty, KIND):
            _finish_segment(qn, kn, g, rows, dq, dk, dg, at, tokens, H, i_k, K, NV, FAR)
        else:
            _finish_segment(qn, kn, g, rows, dq, dk, dg, at, tokens, H, i_k, K, NV, KIND)


def finish_vector(problem: Problem, prepared: Prepared, rows: torch.Tensor, NV: int, L: int, needs_gate: bool):
    """dq, dk, dg or None of a vector problem, from the buffer `rows` of `chunk_backward_kernel`."""
    N, H, K, _ = problem.state_shape
    T = problem.q.shape[1]
    q, k, g = problem.q, problem.k, problem.gk
    dq, dk = empty_as(q), empty_as(k)
    dg = empty_as(g) if needs_gate else None
    grid = N * H * ceil_div(T, L) * ceil_div(K, TILE.value)
    arguments = (prepared.q, prepared.k, g, prepared.gate, rows, dq, dk, dg, problem.cu_seqlens, T, H, L)
    launch(finish_vector_kernel, grid, arguments, {"K": K, "NV": NV, "KINDS": prepared.kinds})
    return dq, dk, dg


def boundaries_size(problem: Problem) -> int:
    """Floats for the states at the boundaries of windows, and what aligns them (`boundaries`)."""
    (B, T, H, K), V = problem.q.shape, problem.v.shape[3]
    slots = B * T // WINDOW.value + 1 if WINDOW.value < T else 0
    states = slots * H * 2 * K * V
    return 16 + (states // 2 if problem.q.dtype == torch.bfloat16 else states)


def close_gate_gradient(
    problem: Problem, prepared: Prepared, rows: torch.Tensor, has_change: bool, terms: int, changes: int, L: int
) -> torch.Tensor:
    """dg `[B, T, H]`, of the buffer `rows` of `chunk_backward_kernel`."""
    N, H, K, V = problem.state_shape
    dg = empty_as(problem.g)
    DTYPE = tl.bfloat16 if problem.q.dtype == torch.bfloat16 else tl.float16
    constants = {"K": K, "V": V, "DTYPE": DTYPE, "TERMS": terms, "CHANGES": changes, "HAS_CHANGE": has_change}
    T = problem.q.shape[1]
    windows = ceil_div(T, WINDOW.value) if problem.cu_seqlens is None else 1
    arguments = (problem.g, prepared.gate, rows, dg, problem.cu_seqlens, problem.scale, T, H, L)
    launch(scalar_gate_gradient_kernel, N * H * windows, arguments, constants)
    return dg
