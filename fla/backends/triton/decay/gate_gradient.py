"""Gate gradients, from what the chunk kernels left.

Let g_t be the log decay of token t, for a head or for a key channel, and dS_t the gradient of the state S_t:

    S_t  = e^{g_t} S_{t-1} + k_t v_t^T
    dS_t = scale q_t do_t^T + e^{g_{t+1}} dS_{t+1}

Products below are summed over the channels that share the decay. Then

    dg_t = <e^{g_t} S_{t-1}, dS_t>
         = <S_t, dS_t> - k_t dk_t
         = q_t dq_t + <S_t, e^{g_{t+1}} dS_{t+1}> - k_t dk_t
         = q_t dq_t - k_t dk_t + dg_{t+1}
         = sum_{s >= t} (q_s dq_s - k_s dk_s) + end term

so that states of single tokens are not needed. The end term is <S, dS> for the state at the end of the sequence, where
dS is the gradient that reaches it from behind. The sum may be restarted at any token with the <S, dS> of that place:
the kind with a decay per key channel does so at the end of each segment.

dg is a small difference of large numbers, which rounding could drown. Therefore

- the row sums q dq and k dk use the same rounded operands as the dots that made dq and dk. In a simulation with bf16
  operands (T 2048, K = V = 128) this lowers the error of dg from 13 % to 2.5 %;
- the states enter those dots as high and low halves (`dot_split`), which lowers it to 0.3 %;
- with one decay a head, what is equal in two terms and large is in neither: a token's score with itself, in q dq and in
  k dk, and what the last token itself writes, in the end term and in k dk. At strong decays little else is left, and
  the sum of dg over all tokens, the gradient of a constant decay, would add up one error of theirs for every token;
- sums over tokens run in float64, or as dots with ones of high and low halves;
- dg_t is 0 where g_t is below -16 nats: there it is rounding noise.

A program walks a sequence, a segment or a part of a sequence of one head backwards.
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
from fla.backends.triton.decay._decay import (
    FAR_BITS,
    FAR_SHIFT,
    JOINED_BIT,
    MIDDLE,
    NEAR_BITS,
    SHORT,
    SHORT_CHUNK,
    VECTOR,
    first_far,
)
from fla.backends.triton.decay.prepare import Prepared

BLOCK = tl.constexpr(1024)  # tokens that the kernel for one decay a head takes at once
SUM_BLOCK = tl.constexpr(4096)  # the same where it only adds up
MAX_PARTS = tl.constexpr(16)  # parts a sequence at most: what all parts together add up grows with their square


@triton.jit(do_not_specialize=["T", "H", "L"])
def scalar_gate_gradient_kernel(
    g, work, dg, cu_seqlens, T, H, L, K: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr, END_TERMS: tl.constexpr,
    HAS_END_TERM: tl.constexpr,
):  # fmt: skip
    """dg `[B, T, H]` of one decay a head and token. `work`: as `chunk_backward_kernel` leaves it.

    There are TERMS row sums for a token; the latter half of them is subtracted. There are END_TERMS end terms for a
    state. Without a pack, each program has a part of a sequence, and first adds up all row sums behind its part. In a
    pack, each program has a sequence.
    """
    parts = tl.minimum(tl.cdiv(T, BLOCK), MAX_PARTS) if cu_seqlens is None else 1
    i_state, num_states = tl.program_id(0).to(tl.int64) // parts, tl.num_programs(0) // parts
    i_n, i_h = i_state // H, i_state % H
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    o_head = head_offset(cu_seqlens, start, i_h, T, H)
    tokens = start * 0 + (T if cu_seqlens is not None else num_states // H * T)  # 64 bits wide, like `start`
    S = tl.cdiv(T, L)
    b_sum = tl.zeros([1], tl.float64)
    if HAS_END_TERM:
        o_k = tl.arange(0, BK)
        i_last = tl.maximum(tl.cdiv(length, L) - 1, 0)
        for i in tl.static_range(END_TERMS):
            p_end_term = work + ((i * num_states + i_state) * S + i_last) * K + o_k
            b_end_term = tl.load(p_end_term, mask=tl.where(length > 0, o_k < K, False), other=0.0).to(tl.float64)
            b_sum += tl.sum(b_end_term, 0)
    work += (END_TERMS * S * K) * num_states + o_head
    first, last = 0, tl.cdiv(length, BLOCK)
    if cu_seqlens is None:
        blocks = tl.cdiv(last, parts)
        first = tl.program_id(0) % parts * blocks
        last = tl.minimum(last, first + blocks)
        for i in range(0, first * BLOCK, SUM_BLOCK):
            o_i = i + tl.arange(0, SUM_BLOCK)
            b_r = _sum_terms(work, length - 1 - o_i, o_i < first * BLOCK, tokens * H, TERMS)
            b_sum += tl.sum(b_r.to(tl.float64), 0)
    for i_t in range(first, last):
        o_t = length - 1 - i_t * BLOCK - tl.arange(0, BLOCK)
        b_r = _sum_terms(work, o_t, o_t >= 0, tokens * H, TERMS)
        b_g = tl.load(g + (start + o_t) * H + i_h, mask=o_t >= 0, other=0.0).to(tl.float32)
        b_dg = (b_sum + tl.cumsum(b_r.to(tl.float64), 0)).to(tl.float32)
        b_dg = tl.where(b_g < DEAD_LOG_DECAY, 0.0, b_dg)
        tl.store(dg + (start + o_t) * H + i_h, b_dg.to(dg.dtype.element_ty), mask=o_t >= 0)
        b_sum += tl.sum(b_r.to(tl.float64), 0)


@triton.jit
def _sum_terms(terms, o_t, mask, size, TERMS: tl.constexpr):
    """The row sums at `o_t`: the first half of the TERMS buffers of `size` numbers, minus the second half."""
    b_r = o_t.to(tl.float32) * 0.0
    for i in tl.static_range(TERMS):
        b_term = tl.load(terms + i * size + o_t, mask=mask, other=0.0)
        b_r += b_term if i < TERMS // 2 else -b_term
    return b_r


@triton.jit
def _suffix_sums(b_r, b_carry, begins, b_starts, last, C: tl.constexpr):
    """Sums of the rows `b_r` `[C, D]`, for each row over all rows from it to the last one of its sequence.

    `b_carry` `[C, D]` (with equal rows) is the sum of what follows the chunk in the sequence of the chunk's last token.
    Returns the sums, and the carry for the chunk before. Both are dots with matrices of ones, in which `b_r` enters as
    a high and a low half: a running sum along the tokens is several times slower. `b_starts`, `last`: as
    `sequence_starts` gives them.
    """
    o_c = tl.arange(0, C)
    b_U = same_sequence_pairs(o_c[:, None] <= o_c[None, :], begins, b_starts, True).to(tl.float32)
    b_ones = tl.full([C, C], 1.0, tl.float32)
    if begins is not None:
        b_ones = tl.where((b_starts < 0)[None, :], b_ones, 0.0)
    b_own, b_next = keep_last_sequence(b_carry, begins, last), keep_if_spanning(b_carry, begins, last)
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
    """G (for SHORT: G - m) `[C, BK]` of a tile of gates, in log2, as `prepare.py` has it.

    The running sum is a dot with a matrix of 0 and +-1, because a running sum along the tokens is several times slower.
    It is exact for 16-bit gates. float32 gates enter as SPLITS numbers of 8 bits each.
    """
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
    qn, kn, g, work, dq, dk, dg, begins, place, tokens, H, i_k, K: tl.constexpr, NV: tl.constexpr, KIND: tl.constexpr
):
    """dq, dk and dg for TILE key channels of a segment: see `finish_vector_kernel`."""
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    DQ_FACTOR: tl.constexpr = 1.0 / MIDDLE if KIND == VECTOR else 1.0
    DK_FACTOR: tl.constexpr = MIDDLE if KIND == VECTOR else 1.0
    start, t_begin, t_end, _, i_state, num_states, i_s, S = place
    i_h = i_state % H
    o_c, o_k = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE)
    b_sum = tl.zeros([C, TILE], tl.float32)
    if dg is not None:
        for i in tl.static_range(NV):
            p_end_term = work + ((i * num_states + i_state) * S + i_s) * K + o_k
            b_sum += tl.load(p_end_term, mask=o_k < K, other=0.0)[None, :]
    work += NV * num_states * S * K
    for i in tl.range(0, tl.cdiv(t_end - t_begin, C), num_stages=2):
        t = t_begin + (tl.cdiv(t_end - t_begin, C) - 1 - i) * C
        m_c = t + o_c < t_end
        row = ((start + t) * H + i_h) * K
        b_g = load_rows(g + row, o_c, m_c, H, o_k, K)  # [C, TILE], and so are all b_* below
        b_Gm = centred_sum(b_g, KIND, 3 if qn.dtype.element_ty == tl.float32 else 2)
        b_dq, b_dk = tl.zeros([C, TILE], tl.float32), tl.zeros([C, TILE], tl.float32)
        for i_v in tl.static_range(NV):
            b_dq += load_rows(work + i_v * tokens * H * K + row, o_c, m_c, H, o_k, K)
            b_dk += load_rows(work + (NV + i_v) * tokens * H * K + row, o_c, m_c, H, o_k, K)
        store_rows(dq + row, o_c, m_c, H, o_k, K, b_dq * (tl.exp2(b_Gm) * DQ_FACTOR))
        store_rows(dk + row, o_c, m_c, H, o_k, K, b_dk * (tl.exp2(-b_Gm) * DK_FACTOR))
        if dg is not None:
            b_r = load_rows(qn + row, o_c, m_c, H, o_k, K) * b_dq - load_rows(kn + row, o_c, m_c, H, o_k, K) * b_dk
            b_starts, last = sequence_starts(begins, t, t_end, C)
            b_dg, b_sum = _suffix_sums(b_r, b_sum, begins, b_starts, last, C)
            store_rows(dg + row, o_c, m_c, H, o_k, K, tl.where(b_g.to(tl.float32) < DEAD_LOG_DECAY, 0.0, b_dg))


@triton.jit(do_not_specialize=["T", "H", "L"])
def finish_vector_kernel(
    qn, kn, g, gate, work, dq, dk, dg, pack, T, H, L,
    K: tl.constexpr, NV: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg for a decay per key channel, from dQn and dKn in `work`, chunk by chunk:

        dq = dQn e^{G - m}
        dk = dKn e^{m - G}
        dg_t = sum_{s >= t} (Qn dQn - Kn dKn)_s + end term of the segment

    with m as in `prepare.py` (for VECTOR, e^m is MIDDLE).
    """
    KIND: tl.constexpr = NEAR_BITS & KINDS
    FAR: tl.constexpr = (FAR_BITS & KINDS) >> FAR_SHIFT
    cu_seqlens = None if JOINED_BIT & KINDS else pack
    begins = pack if JOINED_BIT & KINDS else None
    TK: tl.constexpr = (K + TILE - 1) // TILE
    S = tl.cdiv(T, L)
    i_k, i_s = tl.program_id(0) % TK, tl.program_id(0) // TK % S
    i_state, num_states = tl.program_id(0).to(tl.int64) // (TK * S), tl.num_programs(0) // (TK * S)
    start, length, t_begin, t_end = segment_bounds(cu_seqlens, i_state // H, i_s, T, L)
    if is_past_end(i_s, t_begin, length):
        return
    tokens = start * 0 + (T if cu_seqlens is not None else num_states // H * T)
    place = (start, t_begin, t_end, length, i_state, num_states, i_s, S)
    if FAR == 0:
        _finish_segment(qn, kn, g, work, dq, dk, dg, begins, place, tokens, H, i_k, K, NV, KIND)
    else:
        if first_far(gate, cu_seqlens, i_state, num_states, start, length, T, H, qn.dtype.element_ty, KIND) < length:
            _finish_segment(qn, kn, g, work, dq, dk, dg, begins, place, tokens, H, i_k, K, NV, FAR)
        else:
            _finish_segment(qn, kn, g, work, dq, dk, dg, begins, place, tokens, H, i_k, K, NV, KIND)


def finish_vector(problem: Problem, prepared: Prepared, work: Tensor, NV: int, L: int, needs_gate: bool):
    """dq, dk, and dg or None, for a decay per key channel. `work`: as `chunk_backward_kernel` leaves it."""
    N, H, K, _ = prepared.state_shape
    T = problem.q.shape[1]
    q, k, g = problem.q, problem.k, problem.gk
    dq, dk = empty_as(q), empty_as(k)
    dg = empty_as(g) if needs_gate else None
    grid = N * H * ceil_div(T, L) * ceil_div(K, TILE.value)
    arguments = (prepared.q, prepared.k, g, prepared.gate, work, dq, dk, dg, prepared.pack, T, H, L)
    _vector_plan(K, NV, prepared.kinds)(grid, arguments)
    return dq, dk, dg


@functools.lru_cache(maxsize=4096)
def _vector_plan(K: int, NV: int, kinds: int) -> Launcher:
    return launcher_of(finish_vector_kernel, {"K": K, "NV": NV, "KINDS": kinds})


def finish_scalar(
    problem: Problem, prepared: Prepared, work: Tensor, has_end_term: bool, terms: int, end_terms: int, L: int
) -> Tensor:
    """dg `[B, T, H]` for one decay a head and token. `work`: as `chunk_backward_kernel` leaves it.

    `terms`, `end_terms`: how many row sums a token has, and end terms a state.
    """
    N, H, K, _ = prepared.state_shape
    T, cu_seqlens = problem.q.shape[1], problem.cu_seqlens
    dg = empty_as(problem.g)
    if prepared.begins is not None:  # every sequence of the pack has its own sum, and no end term
        work, end_terms = work[end_terms * N * H * ceil_div(T, L) * K :], 0
        N = cu_seqlens.shape[0] - 1
    parts = min(ceil_div(T, BLOCK.value), MAX_PARTS.value) if cu_seqlens is None else 1
    launch = _scalar_plan(K, terms, end_terms, has_end_term)
    launch(N * H * parts, (problem.g, work, dg, cu_seqlens, T, H, L))
    return dg


@functools.lru_cache(maxsize=4096)
def _scalar_plan(K: int, terms: int, end_terms: int, has_end_term: bool) -> Launcher:
    constants = {"K": K, "BK": padded(K), "TERMS": terms, "END_TERMS": end_terms, "HAS_END_TERM": has_end_term}
    return launcher_of(scalar_gate_gradient_kernel, constants)
