"""The last step of the gate gradients, from rows `r_t` (dq's, minus dk's or dv's) that a kernel left:

    dg_t = sum_{s >= t} r_s + change          0 where g_t < -16 nats

A program walks a sequence, or a part of one, of one head backwards.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from fla.backends.decay import Problem
from fla.backends.triton._launch import Launcher, ceil_div, empty_as, launcher_of
from fla.backends.triton._lib import DEAD_LOG_DECAY, INTERPRETED, LOG2E, MIN_LOG_DECAY, load_rows, store_rows
from fla.backends.triton._sequence import (
    CHUNK,
    TILE,
    head_offset,
    is_past_end,
    keep_if_spanning,
    keep_last_sequence,
    padded,
    same_sequence_pairs,
    segment_bounds,
    sequence_bounds,
    sequence_starts,
)
from fla.backends.triton.decay._decay import MIDDLE, SHORT, SHORT_CHUNK, VECTOR, is_far
from fla.backends.triton.decay.prepare import Prepared

BLOCK = tl.constexpr(1024)  # tokens at once where a head has one number a token
SUM_BLOCK = tl.constexpr(4096)  # the same where they are only added up
MAX_PARTS = tl.constexpr(16)  # of a sequence at most: what all of them add up grows with their square


@triton.jit(do_not_specialize=["T", "H", "L"])
def scalar_gate_gradient_kernel(
    g, rows, dg, cu_seqlens, T, H, L, K: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr, END_TERMS: tl.constexpr,
    HAS_END_TERM: tl.constexpr,
):  # fmt: skip
    """Per head: `rows` as `chunk_backward_kernel` leaves them, TERMS of them (the latter half to be subtracted).
    Without packing a program has a part of them, and adds up the rows behind itself; of a pack it walks a sequence."""
    parts = tl.minimum(tl.cdiv(T, BLOCK), MAX_PARTS) if cu_seqlens is None else 1
    i_state, num_states = tl.program_id(0).to(tl.int64) // parts, tl.num_programs(0) // parts
    i_n, i_h = i_state // H, i_state % H
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    o_head = head_offset(cu_seqlens, start, i_h, T, H)
    tokens = start * 0 + (T if cu_seqlens is not None else num_states // H * T)  # 64 bits, like start
    S = tl.cdiv(T, L)
    b_sum = tl.zeros([1], tl.float64)
    if HAS_END_TERM:
        o_k = tl.arange(0, BK)
        i_last = tl.maximum(tl.cdiv(length, L) - 1, 0)
        for i in tl.static_range(END_TERMS):
            p_end_term = rows + ((i * num_states + i_state) * S + i_last) * K + o_k
            b_end_term = tl.load(p_end_term, mask=tl.where(length > 0, o_k < K, False), other=0.0).to(tl.float64)
            b_sum += tl.sum(b_end_term, 0)
    rows += (END_TERMS * S * K) * num_states + o_head
    first, last = 0, tl.cdiv(length, BLOCK)
    if cu_seqlens is None:
        blocks = tl.cdiv(last, parts)
        first = tl.program_id(0) % parts * blocks
        last = tl.minimum(last, first + blocks)
        for i in range(0, first * BLOCK, SUM_BLOCK):
            o_i = i + tl.arange(0, SUM_BLOCK)
            b_r = _sum_terms(rows, length - 1 - o_i, o_i < first * BLOCK, tokens * H, TERMS)
            b_sum += tl.sum(b_r.to(tl.float64), 0)
    for i_t in range(first, last):
        o_t = length - 1 - i_t * BLOCK - tl.arange(0, BLOCK)
        b_r = _sum_terms(rows, o_t, o_t >= 0, tokens * H, TERMS)
        b_g = tl.load(g + (start + o_t) * H + i_h, mask=o_t >= 0, other=0.0).to(tl.float32)
        b_dg = (b_sum + tl.cumsum(b_r.to(tl.float64), 0)).to(tl.float32)
        b_dg = tl.where(b_g < DEAD_LOG_DECAY, 0.0, b_dg)
        tl.store(dg + (start + o_t) * H + i_h, b_dg.to(dg.dtype.element_ty), mask=o_t >= 0)
        b_sum += tl.sum(b_r.to(tl.float64), 0)


@triton.jit
def _sum_terms(rows, o_t, mask, size, TERMS: tl.constexpr):
    b_r = o_t.to(tl.float32) * 0.0
    for i in tl.static_range(TERMS):
        b_term = tl.load(rows + i * size + o_t, mask=mask, other=0.0)
        b_r += b_term if i < TERMS // 2 else -b_term
    return b_r


@triton.jit
def _suffix_sums(b_r, b_carry, begins, b_starts, last_start, C: tl.constexpr):
    """Sums of the rows `b_r` `[C, D]` from each to the last of its sequence, in that of the chunk's end with `b_carry`
    (its rows are equal) behind it, and the carry for the chunk before: as products with matrices of ones, of high and
    low halves (a running sum along the tokens is several times slower). `b_first`, `last`: of `starts_of`."""
    o_c = tl.arange(0, C)
    b_U = same_sequence_pairs(o_c[:, None] <= o_c[None, :], begins, b_starts, True).to(tl.float32)
    b_ones = tl.full([C, C], 1.0, tl.float32)
    if begins is not None:
        b_ones = tl.where((b_starts < 0)[None, :], b_ones, 0.0)
    b_own, b_next = keep_last_sequence(b_carry, begins, last_start), keep_if_spanning(b_carry, begins, last_start)
    if INTERPRETED:
        return tl.dot(b_U, b_r) + b_own, tl.dot(b_ones, b_r) + b_next
    else:
        b_high = b_r.to(tl.bfloat16)
        b_low = (b_r - b_high.to(tl.float32)).to(tl.bfloat16)
        b_sums = tl.dot(b_U.to(tl.bfloat16), b_low, acc=tl.dot(b_U.to(tl.bfloat16), b_high, acc=b_own))
        b_ones = b_ones.to(tl.bfloat16)
        return b_sums, tl.dot(b_ones, b_low, acc=tl.dot(b_ones, b_high, acc=b_next))


@triton.jit
def centred_sum(b_g, KIND: tl.constexpr, SPLITS: tl.constexpr):
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
            for _ in tl.static_range(SPLITS - 1):
                b_w -= b_part.to(tl.float32)
                b_part = b_w.to(tl.bfloat16)
                b_Gm = tl.dot(b_A.to(tl.bfloat16), b_part, acc=b_Gm)
    return b_Gm * LOG2E


@triton.jit
def _finish_segment(
    qn, kn, g, rows, dq, dk, dg, begins, place, tokens, H, i_k, K: tl.constexpr, NV: tl.constexpr, KIND: tl.constexpr
):
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    DQ_FACTOR: tl.constexpr = 1.0 / MIDDLE if KIND == VECTOR else 1.0
    DK_FACTOR: tl.constexpr = MIDDLE if KIND == VECTOR else 1.0
    start, t_begin, t_end, i_state, num_states, i_s, S = place
    i_h = i_state % H
    o_c, o_k = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE)
    b_sum = tl.zeros([C, TILE], tl.float32)
    if dg is not None:
        for i in tl.static_range(NV):
            p_end_term = rows + ((i * num_states + i_state) * S + i_s) * K + o_k
            b_sum += tl.load(p_end_term, mask=o_k < K, other=0.0)[None, :]
    rows += NV * num_states * S * K
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=2):
        t = t_begin + (tl.cdiv(t_end - t_begin, C) - 1 - i) * C
        m_c = t + o_c < t_end
        row = ((start + t) * H + i_h) * K
        b_g = load_rows(g + row, o_c, m_c, H, o_k, K)
        b_Gm = centred_sum(b_g, KIND, 3 if qn.dtype.element_ty == tl.float32 else 2)
        b_dq, b_dk = tl.zeros([C, TILE], tl.float32), tl.zeros([C, TILE], tl.float32)
        for i_v in tl.static_range(NV):
            b_dq += load_rows(rows + i_v * tokens * H * K + row, o_c, m_c, H, o_k, K)
            b_dk += load_rows(rows + (NV + i_v) * tokens * H * K + row, o_c, m_c, H, o_k, K)
        store_rows(dq + row, o_c, m_c, H, o_k, K, b_dq * (tl.exp2(b_Gm) * DQ_FACTOR))
        store_rows(dk + row, o_c, m_c, H, o_k, K, b_dk * (tl.exp2(-b_Gm) * DK_FACTOR))
        if dg is not None:
            b_r = load_rows(qn + row, o_c, m_c, H, o_k, K) * b_dq - load_rows(kn + row, o_c, m_c, H, o_k, K) * b_dk
            b_starts, last_start = sequence_starts(begins, t, t_end, C)
            b_dg, b_sum = _suffix_sums(b_r, b_sum, begins, b_starts, last_start, C)
            store_rows(dg + row, o_c, m_c, H, o_k, K, tl.where(b_g.to(tl.float32) < DEAD_LOG_DECAY, 0.0, b_dg))


@triton.jit(do_not_specialize=["T", "H", "L"])
def finish_vector_kernel(
    qn, kn, g, factors, rows, dq, dk, dg, pack, T, H, L,
    K: tl.constexpr, NV: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of what `chunk_backward_kernel` left for the vector kind, dQn and dKn, a chunk at a time:

    dq = dQn e^{G - m}      dk = dKn e^{m - G}      r = Qn dQn - Kn dKn      the sum restarted at every segment's end

    with `m` as in `prepare.py` (of VECTOR, `e^m` is UNIT).
    """
    KIND: tl.constexpr = KINDS % 8
    FAR: tl.constexpr = KINDS // 8 % 8
    cu_seqlens = None if KINDS // 64 else pack
    begins = pack if KINDS // 64 else None
    TK: tl.constexpr = (K + TILE - 1) // TILE
    S = tl.cdiv(T, L)
    i_k, i_s = tl.program_id(0) % TK, tl.program_id(0) // TK % S
    i_state, num_states = tl.program_id(0).to(tl.int64) // (TK * S), tl.num_programs(0) // (TK * S)
    start, length, t_begin, t_end = segment_bounds(cu_seqlens, i_state // H, i_s, T, L)
    if is_past_end(i_s, t_begin, length):
        return
    tokens = start * 0 + (T if cu_seqlens is not None else num_states // H * T)
    place = (start, t_begin, t_end, i_state, num_states, i_s, S)
    if FAR == 0:
        _finish_segment(qn, kn, g, rows, dq, dk, dg, begins, place, tokens, H, i_k, K, NV, KIND)
    else:
        if is_far(factors, cu_seqlens, i_state, num_states, start, length, T, H, qn.dtype.element_ty, KIND):
            _finish_segment(qn, kn, g, rows, dq, dk, dg, begins, place, tokens, H, i_k, K, NV, FAR)
        else:
            _finish_segment(qn, kn, g, rows, dq, dk, dg, begins, place, tokens, H, i_k, K, NV, KIND)


def finish_vector(problem: Problem, prepared: Prepared, rows: Tensor, NV: int, L: int, needs_gate: bool):
    """dq, dk, dg or None of a vector problem, from the buffer `rows` of `chunk_backward_kernel`."""
    N, H, K, _ = prepared.state_shape
    T = problem.q.shape[1]
    q, k, g = problem.q, problem.k, problem.gk
    dq, dk = empty_as(q), empty_as(k)
    dg = empty_as(g) if needs_gate else None
    grid = N * H * ceil_div(T, L) * ceil_div(K, TILE.value)
    arguments = (prepared.q, prepared.k, g, prepared.gate, rows, dq, dk, dg, prepared.pack, T, H, L)
    _vector_plan(K, NV, prepared.kinds)(grid, arguments)
    return dq, dk, dg


@functools.lru_cache(maxsize=4096)
def _vector_plan(K: int, NV: int, kinds: int) -> Launcher:
    return launcher_of(finish_vector_kernel, {"K": K, "NV": NV, "KINDS": kinds})


def finish_scalar(
    problem: Problem, prepared: Prepared, rows: Tensor, has_end_term: bool, terms: int, changes: int, L: int
) -> Tensor:
    """dg `[B, T, H]`, of the buffer `rows` of `chunk_backward_kernel`."""
    N, H, K, _ = prepared.state_shape
    T, cu_seqlens = problem.q.shape[1], problem.cu_seqlens
    dg = empty_as(problem.g)
    if prepared.begins is not None:  # each sequence has its own sum, and <S, dS> is 0
        rows, changes = rows[changes * N * H * ceil_div(T, L) * K :], 0
        N = cu_seqlens.shape[0] - 1
    parts = min(ceil_div(T, BLOCK.value), MAX_PARTS.value) if cu_seqlens is None else 1
    launch = _scalar_plan(K, terms, changes, has_end_term)
    launch(N * H * parts, (problem.g, rows, dg, cu_seqlens, T, H, L))
    return dg


@functools.lru_cache(maxsize=4096)
def _scalar_plan(K: int, terms: int, changes: int, has_end_term: bool) -> Launcher:
    constants = {"K": K, "BK": padded(K), "TERMS": terms, "END_TERMS": changes, "HAS_END_TERM": has_end_term}
    return launcher_of(scalar_gate_gradient_kernel, constants)
