"""What each segment of a sequence adds to the states, where heads alone do not fill the GPU.

A sequence is cut into segments, and a program walks each. A first launch computes what every segment adds to a state,
as if the state before it were zero, and by what the segment decays the state before it. A program of the main launch
then begins with the state at the start of its segment s:

    S_0 = h0
    S_s = decay_{s-1} S_{s-1} + sum_{s-1}

In the reverse direction it is likewise with the gradients of the states, divided by `scale`. The number of segments
follows from shapes alone (`segment_length`), and the sums have a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends.decay import Problem
from fla.backends.triton._launch import Launcher, ceil_div, has_tensor_descriptors, launcher_of
from fla.backends.triton._lib import DESCRIPTORS, POINTERS, load_tile, tile_source
from fla.backends.triton._sequence import CHUNK, TILE, head_offset, is_past_end, segment_bounds
from fla.backends.triton.decay._decay import (
    FAR_BITS,
    FAR_SHIFT,
    JOINED_BIT,
    MIDDLE,
    NEAR_BITS,
    NONE,
    SCALAR,
    SHORT,
    SHORT_CHUNK,
    VECTOR,
    decay_to_end,
    decay_to_middle,
    first_factor_slot,
    first_far,
    marks_length,
    running_decay,
)
from fla.backends.triton.decay.prepare import Prepared

BK = tl.constexpr(128)  # key channels of a program
TOKENS_AT_ONCE = tl.constexpr(1024)  # entries of `begins` that a program reads at once


@triton.jit
def _contributing_tokens(begins, t_begin, t_end, REVERSE: tl.constexpr):
    """The tokens `first` to `past_last` of a segment that contribute to the state at its end (REVERSE: at its start).

    In a joined pack these are the tokens of the one sequence that reaches that place. Also returns whether one sequence
    spans the whole segment and the token before it.
    """
    if begins is None:
        return t_begin, t_end, True
    else:
        first = tl.load(begins + t_end - 1)
        is_spanning = first < t_begin
        if REVERSE:
            o_t = tl.arange(0, TOKENS_AT_ONCE)
            b_count = tl.zeros([TOKENS_AT_ONCE], tl.int32)
            for t in range(t_begin, t_end, TOKENS_AT_ONCE):
                b_begins = tl.load(begins + t + o_t, mask=t + o_t < t_end, other=t_end)
                b_count += (b_begins < t_begin).to(tl.int32)
            count = tl.sum(b_count, 0)
            one = tl.maximum(count, 1)  # at least one token: a program walks at least one chunk
            return t_begin + one - count, t_begin + one, is_spanning
        else:
            return tl.maximum(first, t_begin), t_end, is_spanning


@triton.jit
def _sum_segment(
    x, y, g, sums, cu_seqlens, begins, place, T, H,
    K: tl.constexpr, V: tl.constexpr, LOAD: tl.constexpr, KIND: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Stores a tile of what one segment adds to a state, and by what it decays the state before it.

    `x`, `y`: k, v; for REVERSE q, do.
    """
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    DTYPE: tl.constexpr = x.dtype.element_ty
    PREPARED: tl.constexpr = (KIND == VECTOR) or (KIND == SHORT)
    # With one decay for all channels, rows are scaled to the segment's far end, which works for any strength, and the
    # walk begins there. With a decay per channel the state is decayed chunk by chunk instead.
    BACKWARDS: tl.constexpr = REVERSE if PREPARED else not REVERSE
    start, t_begin, t_end, _, i_state, num_states, i_s, S, i_n, i_h, i_k, i_v = place
    o_c, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * TILE + tl.arange(0, TILE)
    o_head = head_offset(cu_seqlens, start, i_h, T, H)
    if KIND == SCALAR:
        o_head += marks_length(cu_seqlens, T, H, num_states)
    slot = first_factor_slot(cu_seqlens, start, i_n, T)
    b_S, b_decay = tl.zeros([TILE, BK], tl.float32), tl.full([BK], 1.0, tl.float32)
    first, past_last, is_spanning = _contributing_tokens(begins, t_begin, t_end, REVERSE)
    t_first = t_begin if begins is None else t_begin + (first - t_begin) // C * C
    chunks = tl.cdiv(past_last - t_first, C)
    t = t_first + ((chunks - 1) * C if BACKWARDS else 0)
    if PREPARED:
        p_factors = g + marks_length(cu_seqlens, T, H, num_states) + (slot * H + i_h) * (2 * K)
        b_to_end = decay_to_end(p_factors + t // C * (2 * K * H), o_k, True, K)
        if KIND == SHORT:
            b_to_middle = decay_to_middle(p_factors + t // C * (2 * K * H), o_k, True, K)
    else:
        passed_decay = 0.0  # log2 decay of the chunks that were walked
        b_G, total = running_decay(g, o_head, i_h, t, t_end, True, KIND)
    x_source = tile_source(x, start * H + i_h, t_end, H, K, C, BK, LOAD)
    y_source = tile_source(y, start * H + i_h, t_end, H, V, C, TILE, LOAD)
    for i in range(0, chunks):
        t = t_first + (chunks - 1 - i if BACKWARDS else i) * C
        t_next = t - C if BACKWARDS else t + C
        m_c = (t + o_c < past_last) if begins is None else (t + o_c >= first) & (t + o_c < past_last)
        row = (start + t) * H + i_h
        b_x = load_tile(x_source, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, LOAD)  # [C, BK]
        b_y = load_tile(y_source, t, i_v * TILE, row, o_c, m_c, H, o_v, V, C, TILE, LOAD).to(DTYPE)  # [C, TILE]
        if PREPARED:  # the next chunk's decays are loaded a step ahead, which hides the latency
            b_to_end_next = decay_to_end(p_factors + t_next // C * (2 * K * H), o_k, i + 1 < chunks, K)
            b_decay *= b_to_end
            b_S = tl.dot(tl.trans(b_y), b_x, acc=b_S)
            if KIND == SHORT:  # from this chunk's middle to the next one's
                b_to_middle_next = decay_to_middle(p_factors + t_next // C * (2 * K * H), o_k, i + 1 < chunks, K)
                b_decay *= b_to_middle
                b_S *= (b_to_middle if REVERSE else b_to_end)[None, :]  # the product of both may underflow
                b_S *= (b_to_end_next if REVERSE else b_to_middle_next)[None, :]
                b_to_middle = b_to_middle_next
            else:  # to the end of this chunk, or of the one before it
                b_S *= (b_to_end_next if REVERSE else b_to_end)[None, :]
            b_to_end = b_to_end_next
        else:
            b_G_next, total_next = running_decay(g, o_head, i_h, t_next, t_end, i + 1 < chunks, KIND)
            if KIND != NONE:  # scales the narrower of the two tiles
                b_y = (b_y * tl.exp2(passed_decay + (b_G if REVERSE else total - b_G))[:, None]).to(DTYPE)
            b_S = tl.dot(tl.trans(b_y), b_x, acc=b_S)
            passed_decay += total
            b_G, total = b_G_next, total_next
    if not PREPARED:
        b_decay *= tl.exp2(passed_decay)
    if begins is not None:
        b_decay = tl.where(is_spanning, b_decay, 0.0)
    if KIND == VECTOR:
        b_S *= MIDDLE if REVERSE else 1.0 / MIDDLE
    p = sums + (i_state * S + i_s) * (K * V + K)
    tl.store(p + o_k[None, :] * V + o_v[:, None], b_S, mask=(o_k < K)[None, :] & (o_v < V)[:, None])
    tl.store(p + K * V + o_k, b_decay, mask=o_k < K)  # the programs of all tiles of V write the same


@triton.jit(do_not_specialize=["T", "H", "L"])
def segment_states_kernel(
    x, y, g, sums, pack, T, H, L,
    K: tl.constexpr, V: tl.constexpr, LOAD: tl.constexpr, KINDS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """`sums` `[N H, S]`: slots of a sum `[K, V]` and a decay `[K]`. `x`, `y`: k, v; for REVERSE q, do."""
    KIND: tl.constexpr = NEAR_BITS & KINDS
    FAR: tl.constexpr = (FAR_BITS & KINDS) >> FAR_SHIFT
    cu_seqlens = None if JOINED_BIT & KINDS else pack
    begins = pack if JOINED_BIT & KINDS else None
    NV: tl.constexpr = (V + TILE - 1) // TILE
    NK: tl.constexpr = (K + BK - 1) // BK
    S = tl.cdiv(T, L)
    i_v, i_k = tl.program_id(0) % NV, tl.program_id(0) // NV % NK
    i_s, i_state = tl.program_id(0) // (NV * NK) % S, tl.program_id(0).to(tl.int64) // (NV * NK * S)
    num_states = tl.num_programs(0) // (NV * NK * S)
    i_n, i_h = i_state // H, i_state % H
    start, length, t_begin, t_end = segment_bounds(cu_seqlens, i_n, i_s, T, L)
    if is_past_end(i_s, t_begin, length):
        return
    if REVERSE:  # nobody reads what the first segment (or, not in reverse, the last one) leaves
        if i_s == 0:
            return
    else:
        if t_end == length:
            return
    place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, i_n, i_h, i_k, i_v)
    if FAR == 0:
        _sum_segment(x, y, g, sums, cu_seqlens, begins, place, T, H, K, V, LOAD, KIND, REVERSE)
    else:
        if first_far(g, cu_seqlens, i_state, num_states, start, length, T, H, x.dtype.element_ty, KIND) < length:
            _sum_segment(x, y, g, sums, cu_seqlens, begins, place, T, H, K, V, POINTERS, FAR, REVERSE)
        else:
            _sum_segment(x, y, g, sums, cu_seqlens, begins, place, T, H, K, V, LOAD, KIND, REVERSE)


def sum_segments(problem: Problem, prepared: Prepared, L: int, room_for_gradients: bool) -> Tensor:
    """What every segment adds to the states. `room_for_gradients`: leave room for `sum_segments_reversed` behind it."""
    N, H, K, V = prepared.state_shape
    size = N * H * ceil_div(problem.q.shape[1], L) * (K * V + K)
    sums = problem.q.new_empty(2 * size if room_for_gradients else size, dtype=torch.float32)
    _launch_kernel(problem, prepared, L, prepared.k, problem.v, sums, False)
    return sums


def sum_segments_reversed(problem: Problem, prepared: Prepared, L: int, sums: Tensor, do: Tensor) -> None:
    """Writes what every segment adds to the gradients of states into the second half of `sums`."""
    _launch_kernel(problem, prepared, L, prepared.q, do, sums[sums.shape[0] // 2 :], True)


def _launch_kernel(
    problem: Problem, prepared: Prepared, L: int, x: Tensor, y: Tensor, sums: Tensor, reverse: bool
) -> None:
    N, H, K, V = prepared.state_shape
    T = problem.q.shape[1]
    grid = N * H * ceil_div(T, L) * ceil_div(K, BK.value) * ceil_div(V, TILE.value)
    load = DESCRIPTORS if prepared.pack is None and has_tensor_descriptors(x, y) else POINTERS
    # with one decay for all channels, near and far heads are computed alike
    kinds = prepared.kinds if problem.gk is not None else prepared.near_kinds
    _plan(K, V, load.value, kinds, reverse)(grid, (x, y, prepared.gate, sums, prepared.pack, T, H, L))


@functools.lru_cache(maxsize=4096)
def _plan(K: int, V: int, load: int, kinds: int, reverse: bool) -> Launcher:
    constants = {"K": K, "V": V, "LOAD": load, "KINDS": kinds, "REVERSE": reverse}
    return launcher_of(segment_states_kernel, constants, 4, 3)
