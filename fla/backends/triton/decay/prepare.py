"""What is computed of the gates before the chunk kernels run, once for all their programs.

Per token and head (SCALAR): a mark per head whether a chunk decays by too much for its halves (then the head is
FAR_SCALAR's), and `G` `[B, H, T]` float32, the running log2 decay within each chunk.

Per key channel (VECTOR): everything relative to the chunk's middle `m = G_{C/2}`, so that both factors stay in range up
to RANGE nats per half chunk (kernels.md 1.2):

    Qn = q e^{G - m}     Kn = k e^{m - G}     factors of the state: e^m and e^{G_C - m}

A head that decays faster than that anywhere is marked, prepared again with chunks of 16 tokens (a step clamped at -10
nats always fits there; what the clamp lets through is below 5e-5 of what was there), and computed by the launch of
kind SHORT. fp16 operands are kept as float32: fp16's digits (tf32 in the dots), but a range that decays fit in.
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem, is_mild
from fla.backends.triton._launch import ceil_div, launch
from fla.backends.triton._lib import (
    INTERPRETED,
    LOG2E,
    MIN_LOG_DECAY,
    load_rows,
    log2_decay,
    operand,
    sequence,
    store_rows,
)
from fla.backends.triton.decay._decay import (
    CHUNK,
    CONSTANT,
    FAR_CONSTANT,
    FAR_SCALAR,
    MARKS,
    NONE,
    SCALAR,
    SHORT,
    SHORT_CHUNK,
    TILE,
    VECTOR,
    first_slot,
    head_base,
    is_near,
    marks_size,
)

ROWS = tl.constexpr(4)  # chunks at once, scalar kind
RANGE = tl.constexpr(80.0)  # nats: bf16 and float32 end at e^88
PROGRAMS = 1056  # what keeps a GPU busy: four rounds of two a multiprocessor


@triton.jit(do_not_specialize=["T", "H", "R"])
def running_sums_kernel(g, q, sums, cu_seqlens, T, H, R):
    """`sums`: the marks, then `G`. R programs (at most MARKS) walk a sequence of one head. Of `q` the dtype counts."""
    i_r, i_state = tl.program_id(0) % R, tl.program_id(0).to(tl.int64) // R
    i_n, i_h = i_state // H, i_state % H
    start, length = sequence(cu_seqlens, i_n, T)
    p_sums = sums + marks_size(tl.num_programs(0) // R) + head_base(cu_seqlens, start, i_h, T, H)
    o_t = tl.arange(0, ROWS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    least = 0.0
    for t in range(i_r * (ROWS * CHUNK), length, R * ROWS * CHUNK):
        mask = t + o_t < length
        b_w = log2_decay(tl.load(g + (start + t + o_t) * H + i_h, mask=mask, other=0.0))
        least = tl.minimum(least, tl.min(tl.sum(b_w, 1), 0))
        tl.store(p_sums + t + o_t, tl.cumsum(b_w, 1), mask=mask)
    o_r = tl.arange(0, MARKS)
    b_mark = tl.full([MARKS], 1.0, tl.float32) * (is_near(least, q.dtype.element_ty) == 0).to(tl.float32)
    tl.store(sums + i_state * MARKS + o_r, b_mark, mask=o_r % R == i_r)


@triton.jit
def centred(b_g, C: tl.constexpr):
    """Of a gate tile `[C, BK]`: `G - m` `[C, BK]`, `m` and `G_C - m` `[BK]`, all log2.

    The running sum is a product with a matrix of 0 and +-1: exact for 16-bit gates, float32 ones enter as high and low
    halves. (A running sum along the token axis is several times slower.)"""
    o_c = tl.arange(0, C)
    first = o_c < C // 2
    b_w = tl.maximum(b_g.to(tl.float32), MIN_LOG_DECAY if C == CHUNK else MIN_LOG_DECAY / 2)
    b_A = (o_c[:, None] >= o_c[None, :]).to(tl.float32) - first[None, :].to(tl.float32)
    if INTERPRETED:
        b_Gm = tl.dot(b_A, b_w)
    elif b_g.dtype == tl.float16:
        b_Gm = tl.dot(b_A.to(tl.float16), b_w.to(tl.float16))
    else:
        b_high = b_w.to(tl.bfloat16)
        b_Gm = tl.dot(b_A.to(tl.bfloat16), b_high)
        if b_g.dtype != tl.bfloat16:
            b_Gm = tl.dot(b_A.to(tl.bfloat16), (b_w - b_high.to(tl.float32)).to(tl.bfloat16), acc=b_Gm)
    b_m = tl.sum(tl.where(first[:, None], b_w, 0.0), 0)
    return b_Gm * LOG2E, b_m * LOG2E, (tl.sum(b_w, 0) - b_m) * LOG2E


@triton.jit(do_not_specialize=["T", "H", "R"])
def centre_kernel(q, k, g, qn, kn, factors, marks, cu_seqlens, T, H, R, K: tl.constexpr, KIND: tl.constexpr):
    """`factors`: the marks, then e^m and e^{G_C - m} of every chunk `[slots, H, 2, K]`. `marks` `[N H, R, tiles]`:
    what each program of the first launch saw."""
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    NK: tl.constexpr = (K + TILE - 1) // TILE
    i_r, i_k = tl.program_id(0) // NK % R, tl.program_id(0) % NK
    i_state = tl.program_id(0).to(tl.int64) // (NK * R)
    i_n, i_h = i_state // H, i_state % H
    states = tl.num_programs(0) // (NK * R)
    start, length = sequence(cu_seqlens, i_n, T)
    if KIND == SHORT:
        far = 0
        for i in range(0, R * NK, 256):
            o_i = i + tl.arange(0, 256)
            seen = tl.load(marks + i_state * (R * NK) + o_i, mask=o_i < R * NK, other=0)
            far = tl.maximum(far, tl.max(seen, 0))
        tl.store(factors + i_state * MARKS + tl.arange(0, MARKS), tl.full([MARKS], 1.0, tl.float32) * far)
        if far == 0:
            return
    o_c, o_k = tl.arange(0, C), i_k * TILE + tl.arange(0, TILE)
    slot = first_slot(cu_seqlens, start, i_n, T)
    reach = 0.0
    for i in tl.range(i_r, tl.cdiv(length, C), R, num_stages=3):  # said here, all loads are pipelined
        m_c = i * C + o_c < length
        row = ((start + i * C) * H + i_h) * K
        b_q = load_rows(q + row, o_c, m_c, H, o_k, K)
        b_k = load_rows(k + row, o_c, m_c, H, o_k, K)
        b_Gm, b_m, b_rest = centred(load_rows(g + row, o_c, m_c, H, o_k, K), C)
        reach = tl.maximum(reach, tl.max(tl.maximum(tl.abs(b_m), tl.abs(b_rest)), 0))
        store_rows(qn + row, o_c, m_c, H, o_k, K, operand(b_q * tl.exp2(b_Gm), qn.dtype.element_ty))
        store_rows(kn + row, o_c, m_c, H, o_k, K, operand(b_k * tl.exp2(-b_Gm), kn.dtype.element_ty))
        p = factors + marks_size(states) + ((slot + i) * H + i_h) * (2 * K) + o_k
        tl.store(p, tl.exp2(b_m), mask=o_k < K)
        tl.store(p + K, tl.exp2(b_rest), mask=o_k < K)
    if KIND == VECTOR:
        tl.store(marks + (i_state * R + i_r) * NK + i_k, (reach > RANGE * LOG2E).to(tl.int32))


class Prepared:
    """A chunked problem as the kernels take it: its decay kinds (two where SHORT may have to follow), the tensors for
    `q`, `k` and the gate."""

    def __init__(self, problem: Problem):
        self.q, self.k, self.gate = problem.q, problem.k, problem.g_gamma
        self.kinds: tuple[int, ...] = (NONE.value,)
        if problem.gk is not None:
            self.kinds = (VECTOR.value, SHORT.value)
            self._centre(problem)
        elif problem.g is not None:
            self.kinds = (SCALAR.value, FAR_SCALAR.value)
            self._sum(problem)
        elif problem.g_gamma is not None:
            self.kinds = (CONSTANT.value,) if is_mild(problem.g_gamma) else (CONSTANT.value, FAR_CONSTANT.value)

    def _sum(self, problem: Problem) -> None:
        T, H = problem.q.shape[1:3]
        states = problem.num_states * H
        self.gate = problem.q.new_empty(marks_size.fn(states) + problem.q.shape[:3].numel(), dtype=torch.float32)
        R = max(1, min(MARKS.value, ceil_div(T, ROWS.value * CHUNK.value), PROGRAMS // states))
        arguments = (problem.g, problem.q, self.gate, problem.cu_seqlens, T, H, R)
        launch(running_sums_kernel, states * R, arguments, {})

    def _centre(self, problem: Problem) -> None:
        q, k = problem.q, problem.k
        N, H, K, _ = problem.state_shape
        T, tiles = q.shape[1], ceil_div(K, TILE.value)
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        self.q, self.k = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)
        slots = N * ceil_div(T, SHORT_CHUNK.value) if problem.cu_seqlens is None else T // SHORT_CHUNK.value + N
        pieces = ceil_div(T, CHUNK.value)
        R = max(1, min(pieces, ceil_div(PROGRAMS, N * H * tiles)))
        size = marks_size.fn(N * H) + ceil_div(slots * H * 2 * K, 4) * 4
        small = q.new_empty(size + N * H * R * tiles, dtype=torch.float32)
        self.gate, marks = small[:size], small[size:].view(torch.int32)
        arguments = (q, k, problem.gk, self.q, self.k, self.gate, marks, problem.cu_seqlens, T, H, R)
        for kind in self.kinds:
            launch(centre_kernel, N * H * R * tiles, arguments, {"K": K, "KIND": kind})
