"""What is computed of the gates before the chunk kernels run, once for all of their programs.

SCALAR (a decay a head and token): `[B, H, T]` float32, the running log2 decay G within each chunk.

VECTOR (a decay per key channel): q and k scaled to the middle of the range that fits (`_decay.py`), such that all
factors stay in range up to RANGE nats a chunk, and the decay of the state over each chunk:

    Qn = e^G Q / MIDDLE
    Kn = e^{-G} K MIDDLE
    e^{G_C}

Both mark the chunks that decay by too much for this: a mark is the number of tokens before the first far one. SCALAR
leaves the tokens from there on to FAR_SCALAR, which needs nothing else. VECTOR prepares a head with such a chunk again
for SHORT, with chunks of 16 tokens that are scaled to the middle m = G_{C/2} of each, and two decays of the state, to
the middle and from there on:

    Qn = e^{G - m} Q
    Kn = e^{m - G} K
    e^m, e^{G_C - m}

There a step is clamped at -10 nats, which always fits. What the clamp lets through is below 5e-5 of what was there.

fp16 operands are kept as float32, that is with fp16's digits (tf32 in the dots), but in a range that decays fit in.

A program takes one chunk of 64 tokens of some heads.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends._recurrence import Saved
from fla.backends.decay import Problem
from fla.backends.triton._launch import Launcher, ceil_div, empty_as, launch, launcher_of
from fla.backends.triton._lib import LOG2E, MIN_LOG_DECAY, log2_decay, operand
from fla.backends.triton._packs import join
from fla.backends.triton._sequence import CHUNK, find_chunk, first_chunk_slot, head_offset, num_chunk_slots, padded
from fla.backends.triton.decay._decay import (
    CONSTANT,
    FAR_CONSTANT,
    FAR_SCALAR,
    FAR_UNIT,
    JOINED,
    MARKS_AT_ONCE,
    MIDDLE,
    NONE,
    SCALAR,
    SHORT,
    SHORT_CHUNK,
    VECTOR,
    first_factor_slot,
    is_near,
    marks_length,
)

# Dtypes in which packs with a decay per channel are joined. The float32 operands of fp16 leave no registers for masks.
JOINED_VECTORS: tuple[torch.dtype, ...] = (torch.bfloat16,)
SCALAR_HEADS = tl.constexpr(16)  # heads of a program for SCALAR
VECTOR_CHANNELS = tl.constexpr(512)  # key channels of a program for VECTOR, over all of its heads
RANGE = tl.constexpr(80.0)  # nats a chunk for VECTOR: e^-80 is a normal float32, e^40 and e^-40 have room on both sides


@triton.jit(do_not_specialize=["T", "H", "N"])
def running_sums_kernel(g, q, gate, cu_seqlens, T, H, N):
    """Writes `gate`: the marks, then G `[B, H, T]`. Of `q`, only the dtype counts."""
    slots = num_chunk_slots(cu_seqlens, T, N)
    groups = tl.cdiv(H, SCALAR_HEADS)
    slot, i_h = tl.program_id(0) // groups, tl.program_id(0) % groups * SCALAR_HEADS + tl.arange(0, SCALAR_HEADS)
    i_n, start, length, t = find_chunk(cu_seqlens, slot, N, T)
    if t >= length:
        return
    o_t = t + tl.arange(0, CHUNK)
    mask = (o_t < length)[:, None] & (i_h < H)[None, :]
    b_w = log2_decay(tl.load(g + start * H + o_t[:, None] * H + i_h[None, :], mask=mask, other=0.0))
    b_G = tl.cumsum(b_w, 0)
    b_rows = tl.where(is_near(b_G, q.dtype.element_ty), CHUNK, tl.arange(0, CHUNK)[:, None])
    tl.store(gate + i_h * slots + slot, tl.min(b_rows, 0).to(tl.float32), mask=i_h < H)
    gate += marks_length(cu_seqlens, T, H, N * H)
    p_gate = gate + head_offset(cu_seqlens, start, i_h.to(tl.int64), T, H)[None, :] + o_t[:, None]
    tl.store(p_gate, b_G, mask=mask)


@triton.jit
def log2_step(p, mask, C: tl.constexpr):
    """A token's log2 decay, clamped as its kind needs it: C tokens a chunk."""
    b_g = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(b_g, MIN_LOG_DECAY if C == CHUNK else MIN_LOG_DECAY / 2) * LOG2E


@triton.jit
def load_token(q, k, g, o, mask, C: tl.constexpr):
    """q, k and the log2 decay of a token of some heads, each `[HEADS, BK]`."""
    b_q = tl.load(q + o, mask=mask, other=0.0)
    b_k = tl.load(k + o, mask=mask, other=0.0)
    return b_q, b_k, log2_step(g + o, mask, C)


@triton.jit
def store_token(token, qn, kn, o, mask, b_Gm, KIND: tl.constexpr):
    """Stores Qn and Kn of a token. `b_Gm`: G (for SHORT: G - m) at the token before it. Returns that at the token."""
    # factors of their own: multiplying by a power of 2 is exact, adding to the exponent is not
    QN_FACTOR: tl.constexpr = 1.0 / MIDDLE if KIND == VECTOR else 1.0
    KN_FACTOR: tl.constexpr = MIDDLE if KIND == VECTOR else 1.0
    b_q, b_k, b_w = token
    b_Gm += b_w
    tl.store(qn + o, operand(b_q * (tl.exp2(b_Gm) * QN_FACTOR), qn.dtype.element_ty), mask=mask)
    tl.store(kn + o, operand(b_k * (tl.exp2(-b_Gm) * KN_FACTOR), kn.dtype.element_ty), mask=mask)
    return b_Gm


@triton.jit(do_not_specialize=["T", "H", "N"])
def centre_kernel(q, k, g, qn, kn, gate, cu_seqlens, T, H, N, K: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr):
    """Writes Qn, Kn and `gate`: the marks, then for every chunk the decays of a state `[slots, H, 2, K]`.

    The two decays are that to the chunk's middle (SHORT has it alone) and that to its end. A thread walks the tokens of
    its own channels, so threads exchange nothing.
    """
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    HEADS: tl.constexpr = VECTOR_CHANNELS // BK
    slots = num_chunk_slots(cu_seqlens, T, N)
    groups = tl.cdiv(H, HEADS)  # programs that run at the same time read neighbouring heads
    slot, i_h = tl.program_id(0) // groups, tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    i_n, start, length, t_slot = find_chunk(cu_seqlens, slot, N, T)
    if t_slot >= length:
        return
    o_k = tl.arange(0, BK)
    mask = (i_h < H)[:, None] & (o_k < K)[None, :]
    if KIND == SHORT:
        b_marks = tl.full([HEADS, MARKS_AT_ONCE], CHUNK, tl.float32)
        first = first_chunk_slot(cu_seqlens, start, i_n, T)
        for i_mark in range(0, tl.cdiv(length, CHUNK), MARKS_AT_ONCE):
            o_i = i_mark + tl.arange(0, MARKS_AT_ONCE)
            m_i = (i_h < H)[:, None] & (o_i < tl.cdiv(length, CHUNK))[None, :]
            p_marks = gate + i_h[:, None] * slots + first + o_i[None, :]
            b_marks = tl.minimum(b_marks, tl.load(p_marks, mask=m_i, other=CHUNK))
        near = tl.min(b_marks, 1)
        if tl.min(near, 0) == CHUNK:
            return
        mask = mask & (near < CHUNK)[:, None]
    p_factors = gate + marks_length(cu_seqlens, T, H, N * H) + i_h[:, None].to(tl.int64) * (2 * K) + o_k[None, :]
    columns = i_h[:, None] * K + o_k[None, :]
    for t_chunk in range(t_slot, tl.minimum(t_slot + CHUNK, length), C):
        row = (start + t_chunk) * H * K
        count = length - t_chunk
        # `where`, because Triton 3.9's interpreter does not take a comparison of two numbers as a mask
        b_Gm = tl.zeros([HEADS, BK], tl.float32)
        p = p_factors + (first_factor_slot(cu_seqlens, start, i_n, T) + t_chunk // C) * H * (2 * K)
        if KIND == SHORT:
            for t in tl.static_range(C // 2):
                b_Gm -= log2_step(g + row + t * (H * K) + columns, tl.where(t < count, mask, False), C)
            tl.store(p, tl.exp2(-b_Gm), mask=mask)
        for t in range(0, C, 4):
            # the loads of four tokens are issued together: a load after a store would wait for it
            o, m_t = row + t * (H * K) + columns, count - t
            token0 = load_token(q, k, g, o, tl.where(m_t > 0, mask, False), C)
            token1 = load_token(q, k, g, o + H * K, tl.where(m_t > 1, mask, False), C)
            token2 = load_token(q, k, g, o + 2 * H * K, tl.where(m_t > 2, mask, False), C)
            token3 = load_token(q, k, g, o + 3 * H * K, tl.where(m_t > 3, mask, False), C)
            b_Gm = store_token(token0, qn, kn, o, tl.where(m_t > 0, mask, False), b_Gm, KIND)
            b_Gm = store_token(token1, qn, kn, o + H * K, tl.where(m_t > 1, mask, False), b_Gm, KIND)
            b_Gm = store_token(token2, qn, kn, o + 2 * H * K, tl.where(m_t > 2, mask, False), b_Gm, KIND)
            b_Gm = store_token(token3, qn, kn, o + 3 * H * K, tl.where(m_t > 3, mask, False), b_Gm, KIND)
        tl.store(p + K, tl.exp2(b_Gm), mask=mask)
        if KIND == VECTOR:
            is_too_strong = tl.max(tl.abs(b_Gm), 1) > RANGE * LOG2E
            tl.store(gate + i_h * slots + slot, tl.where(is_too_strong, 0.0, 1.0) * CHUNK, mask=i_h < H)


class Prepared:
    """A chunked problem as the kernels take it. It is never changed after it is made.

    `kinds`: KINDS of its launches. `near_kinds`: the same without the far kind. `q`, `k`, `gate`: what the kernels read
    of q, k and the decays. `begins`: of a joined pack, else None. `pack`: what kernels call `pack`. `lengths`:
    `cu_seqlens` if the sequences of a pack are computed one by one; None if all sequences have the same length.

    A forward may have kept `gate`, and Qn and Kn in the problem: then they are not made again.
    """

    __slots__ = ("begins", "gate", "k", "kinds", "lengths", "near_kinds", "pack", "q", "state_shape")

    def __init__(self, problem: Problem, begins: Tensor | None, gate: Tensor | None = None):
        bounds = problem.cu_seqlens
        B, _, H, K = problem.q.shape
        self.begins, self.lengths, self.pack = begins, bounds, bounds
        if begins is not None:
            self.lengths, self.pack = None, begins
        N = B if self.lengths is None else self.lengths.shape[0] - 1
        self.state_shape = N, H, K, problem.v.shape[3]
        self.q, self.k, self.gate = problem.q, problem.k, problem.g_gamma
        near, far = NONE.value, 0
        if problem.gk is not None:
            near, far = VECTOR.value, SHORT.value
        elif problem.g is not None:
            near, far = SCALAR.value, FAR_SCALAR.value
        elif problem.g_gamma is not None:
            near, far = CONSTANT.value, 0 if problem.mild else FAR_CONSTANT.value
        joined = 0 if begins is None else JOINED
        self.near_kinds, self.kinds = near + joined, near + FAR_UNIT * far + joined
        if gate is not None:
            self.gate = gate
        elif near == VECTOR.value:
            self._scale_q_and_k(problem)
        elif near == SCALAR.value:
            self._sum_gates(problem)

    def saved(self, problem: Problem, sums: Tensor | None) -> Saved:
        """What a forward keeps: what segments add to the states, the prepared gate, and `begins`, each if there is one.

        Qn and Kn take the places of q and k, which no gradient needs (`finish_vector`). Where they take more memory (in
        fp16) they are not kept, and the backward prepares the problem again.
        """
        x, gate = problem, None
        if x.gk is not None:
            if self.q.dtype == x.q.dtype:
                gate = self.gate
                rest = (x.gv, x.initial_state, x.g_gamma, x.cu_seqlens, x.scale, x.form, x.wide, x.mild)
                x = Problem(self.q, self.k, x.v, x.g, x.gk, *rest)
        elif x.g is not None:
            gate = self.gate
        if gate is None and sums is None and self.begins is None:
            return Saved(x)
        return Saved(x, (sums, gate, self.begins))

    def _sum_gates(self, problem: Problem) -> None:
        T, H = problem.q.shape[1:3]
        slots = self._slots(T, CHUNK.value)
        self.gate = problem.q.new_empty(_aligned(slots * H) + problem.q.shape[:3].numel(), dtype=torch.float32)
        arguments = (problem.g, problem.q, self.gate, self.lengths, T, H, self.state_shape[0])
        launch(running_sums_kernel, slots * ceil_div(H, SCALAR_HEADS.value), arguments, {})

    def _scale_q_and_k(self, problem: Problem) -> None:
        q, k = problem.q, problem.k
        N, H, K, _ = self.state_shape
        T = q.shape[1]
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        self.q, self.k = empty_as(q, dtype), empty_as(k, dtype)
        slots = self._slots(T, CHUNK.value)
        size = _aligned(slots * H) + self._slots(T, SHORT_CHUNK.value) * H * 2 * K
        self.gate = q.new_empty(size, dtype=torch.float32)
        arguments = (q, k, problem.gk, self.q, self.k, self.gate, self.lengths, T, H, N)
        heads, launches = _plan(K)
        for launch_kind in launches:
            launch_kind(slots * ceil_div(H, heads), arguments)

    def _slots(self, T: int, C: int) -> int:
        """How many numbers there are for chunks of C tokens: as `num_chunk_slots` has it."""
        return self.state_shape[0] * ceil_div(T, C) if self.lengths is None else T // C + self.state_shape[0]


def prepare(problem: Problem, has_states: bool) -> Prepared:
    """`problem` as the kernels take it. `has_states`: whether there are final states, or gradients of them."""
    begins = None
    if problem.gk is None or problem.q.dtype in JOINED_VECTORS:
        begins = join(problem.cu_seqlens, problem.q.shape[1], has_states or problem.initial_state is not None)
    return Prepared(problem, begins)


@functools.lru_cache(maxsize=256)
def _plan(K: int) -> tuple[int, tuple[Launcher, Launcher]]:
    """Heads of a program, and the launchers of both kinds."""
    BK = padded(K)
    near, short = (launcher_of(centre_kernel, {"K": K, "BK": BK, "KIND": kind}) for kind in (VECTOR.value, SHORT.value))
    return VECTOR_CHANNELS.value // BK, (near, short)


def _aligned(count: int) -> int:
    """How many floats fill the next 16 bytes: as `marks_length` has it."""
    return ceil_div(count, 4) * 4
