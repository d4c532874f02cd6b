"""Forward of the `decay` family in one pass over the tokens.

The recurrence, with a decay a_t that is one number, or one for each key channel, and token by token,

    S_t = diag(a_t) S_{t-1} + k_t v_t^T
    o_t = scale q_t^T S_t

is computed chunk by chunk. Let S be the state before a chunk, and Q, K, V the chunk's rows. With G_i the running log
decay of the chunk, G_C its last value, and L_ij = e^{G_i - G_j},

    O = scale (e^G Q S + tril(Q K^T * L) V)
    S <- e^{G_C} S + K^T (e^{G_C - G} V)

Far tokens of one decay for all channels (FAR_*) are computed like this. Near ones scale rows instead of scores
(`_decay.py`), with S in units of 1 / MIDDLE. Kinds with one decay for all channels scale the rows of V and O, which is
the same:

    Vn = e^{-G} V MIDDLE
    O  = scale e^G / MIDDLE (Q S + tril(Q K^T) Vn)
    S <- e^{G_C} (S + K^T Vn)

With a decay per key channel, Qn = e^{G - m} Q and Kn = e^{m - G} K come from `prepare.py`. VECTOR:

    O  = scale (Qn S + tril(Qn Kn^T) V)
    S <- e^{G_C} (S + Kn^T V)

SHORT:

    O  = scale (Qn (e^m S) + tril(Qn Kn^T) V)
    S <- e^{G_C - m} (e^m S + Kn^T V)

FAR_SCALAR walks the tokens before the first far one too, for their states, and stores the outputs from it on.

A program owns a tile `[BK, TILE]` of one head's state, and walks the chunks of one segment. Heads with more than WIDEST
key channels are computed in slices of K, whose float32 outputs are added in a fixed order.

Axes: B batch, T tokens, H heads, K key, V value, C tokens a chunk, N sequences, S segments of L tokens.
Prefixes: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ values of a block.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends._recurrence import Saved
from fla.backends.decay import Problem
from fla.backends.triton._launch import Launcher, ceil_div, empty_as, has_tensor_descriptors, launcher_of
from fla.backends.triton._lib import (
    DESCRIPTORS,
    POINTERS,
    TO_REGISTERS,
    load_tile,
    operand,
    store_rows,
    store_state,
    tile_source,
)
from fla.backends.triton._sequence import (
    CHUNK,
    TILE,
    head_offset,
    is_past_end,
    keep_if_spanning,
    keep_last_sequence,
    keep_started_before,
    padded,
    same_sequence_pairs,
    segment_bounds,
    segment_length,
    sequence_starts,
    state_before,
)
from fla.backends.triton._slices import sum_slices
from fla.backends.triton.decay._decay import (
    CONSTANT,
    FAR_BITS,
    FAR_CONSTANT,
    FAR_SCALAR,
    FAR_SHIFT,
    FAR_UNIT,
    JOINED,
    JOINED_BIT,
    NEAR_BITS,
    NONE,
    SCALAR,
    SHORT,
    SHORT_CHUNK,
    VECTOR,
    WIDEST,
    decay_to_end,
    decay_to_middle,
    first_factor_slot,
    first_far,
    marks_length,
    middle,
    pair_decay,
    running_decay,
    scale_rows,
)
from fla.backends.triton.decay.prepare import prepare
from fla.backends.triton.decay.segments import sum_segments


@triton.jit
def _forward_segment(
    q, k, v, g, h0, sums, o, ht, cu_seqlens, begins, place, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, LOAD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Takes a tile of a state through one segment. LOAD: how q is loaded (`load_tile`).

    `place` ends with the first token whose output FAR_SCALAR stores.
    """
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    PREPARED: tl.constexpr = (KIND == VECTOR) or (KIND == SHORT)
    FAR: tl.constexpr = (KIND == FAR_CONSTANT) or (KIND == FAR_SCALAR)
    # computing the scores after the state's part spills less; where decays need no registers, scores first are faster
    SCORES_LATE: tl.constexpr = (BK >= 128) and not (FAR or (KIND == CONSTANT))
    LOAD_V: tl.constexpr = POINTERS if LOAD == POINTERS else DESCRIPTORS
    LOAD_K: tl.constexpr = LOAD if (KIND == NONE) or (KIND == VECTOR) else LOAD_V  # scaling v takes the registers
    start, t_begin, t_end, length, i_state, num_states, i_s, S, i_n, i_h, i_k, i_v, first = place
    o_c, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * TILE + tl.arange(0, TILE)
    m_causal = o_c[:, None] >= o_c[None, :]
    o_head = head_offset(cu_seqlens, start, i_h, T, H)
    p_factors = g
    if PREPARED:
        p_factors += (
            marks_length(cu_seqlens, T, H, num_states)
            + (first_factor_slot(cu_seqlens, start, i_n, T) * H + i_h) * (2 * K)
        )  # fmt: skip
    elif (KIND == SCALAR) or (KIND == FAR_SCALAR):
        o_head += marks_length(cu_seqlens, T, H, num_states)

    b_S = state_before(h0, sums, i_state, i_s, S, o_k[:, None], o_v[None, :], K, V)  # [BK, TILE]
    if PREPARED:
        b_to_end = decay_to_end(p_factors + t_begin // C * (2 * K * H), o_k, t_begin < t_end, K)
        if KIND == SHORT:
            b_to_middle = decay_to_middle(p_factors + t_begin // C * (2 * K * H), o_k, t_begin < t_end, K)
    else:
        b_G, total = running_decay(g, o_head, i_h, t_begin, t_end, t_begin < t_end, KIND)
    b_S *= middle(DTYPE, KIND)
    b_starts, last = sequence_starts(begins, t_begin, t_end, C)
    q_source = tile_source(q, start * H + i_h, length, H, K, C, BK, LOAD)
    k_source = tile_source(k, start * H + i_h, length, H, K, C, BK, LOAD_K)
    v_source = tile_source(v, start * H + i_h, length, H, V, C, TILE, LOAD_V)
    STAGES: tl.constexpr = 2 if FAR and BK <= 128 else None  # None: as the launch says
    for t in tl.range(t_begin, t_end, C, num_stages=STAGES):
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_q = load_tile(q_source, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, LOAD)  # [C, BK]
        b_k = load_tile(k_source, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, LOAD_K)  # [C, BK]
        b_v = load_tile(v_source, t, i_v * TILE, row, o_c, m_c, H, o_v, V, C, TILE, LOAD_V).to(DTYPE)  # [C, TILE]
        m_scores = same_sequence_pairs(m_causal, begins, b_starts, False)
        if not SCORES_LATE:
            b_P = tl.dot(b_q, tl.trans(b_k))  # [C, C]
        if FAR:
            b_o = keep_started_before(tl.dot(b_q, operand(b_S, DTYPE)) * tl.exp2(b_G)[:, None], begins, b_starts)
            b_o = tl.dot(operand(b_P * pair_decay(b_G, m_scores), DTYPE), b_v, acc=b_o)
            m_stored = m_c & (t + o_c >= first) if KIND == FAR_SCALAR else m_c
            store_rows(o + row * V, o_c, m_stored, H, o_v, V, b_o * scale)
            b_v = keep_last_sequence((b_v * tl.exp2(total - b_G)[:, None]).to(DTYPE), begins, last)
            b_S = tl.dot(tl.trans(b_k), b_v, acc=keep_if_spanning(b_S * tl.exp2(total), begins, last))
            b_G, total = running_decay(g, o_head, i_h, t + C, t_end, t_end - t > C, KIND)
        else:  # the next chunk's decays are loaded a step ahead, which hides the latency
            if KIND == SHORT:
                b_S *= b_to_middle[:, None]  # not with b_to_end: the product may underflow
            b_o = keep_started_before(tl.dot(b_q, operand(b_S, DTYPE)), begins, b_starts)  # [C, TILE]
            if SCORES_LATE:
                b_P = tl.dot(b_q, tl.trans(b_k))
            if PREPARED:
                b_to_end_next = decay_to_end(p_factors + (t // C + 1) * (2 * K * H), o_k, t_end - t > C, K)
                if KIND == SHORT:
                    b_to_middle = decay_to_middle(p_factors + (t // C + 1) * (2 * K * H), o_k, t_end - t > C, K)
            elif KIND != NONE:
                b_G_next, total_next = running_decay(g, o_head, i_h, t + C, t_end, t_end - t > C, KIND)
                b_v = scale_rows(b_v, -b_G, middle(DTYPE, KIND), KIND).to(DTYPE)
            b_o = tl.dot(operand(tl.where(m_scores, b_P, 0.0), DTYPE), b_v, acc=b_o)
            if not PREPARED:
                b_o = scale_rows(b_o, b_G, 1.0 / middle(DTYPE, KIND), KIND)
            store_rows(o + row * V, o_c, m_c, H, o_v, V, b_o * scale)
            b_S = tl.dot(tl.trans(b_k), keep_last_sequence(b_v, begins, last), acc=keep_if_spanning(b_S, begins, last))
            if PREPARED:
                b_S *= b_to_end[:, None]
                b_to_end = b_to_end_next
            elif KIND != NONE:
                b_S *= tl.exp2(total)
                b_G, total = b_G_next, total_next
        b_starts, last = sequence_starts(begins, t + C, t_end, C)
    if ht is not None:
        if t_end == length:
            b_S *= 1.0 / middle(DTYPE, KIND)
            store_state(ht, i_state, o_k[:, None], o_v[None, :], K, V, b_S)


@triton.jit(do_not_specialize=["T", "H", "L"])
def chunk_forward_kernel(
    q, k, v, g, h0, sums, o, ht, pack, scale, T, H, L,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, LOAD: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """`o` `[B, T, H, V]`: with several slices of K, one such tensor for each. `ht` `[N, H, K, V]`: the final states."""
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
    if NK > 1:  # partial outputs: a tensor for each slice
        o += i_k * (start * 0 + (T if cu_seqlens is not None else num_states // H * T)) * H * V
    place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, i_n, i_h, i_k, i_v, 0)
    if FAR == 0:
        _forward_segment(q, k, v, g, h0, sums, o, ht, cu_seqlens, begins, place, scale, T, H, K, V, BK, LOAD, KIND)
    else:
        first = first_far(g, cu_seqlens, i_state, num_states, start, length, T, H, q.dtype.element_ty, KIND)
        if KIND < SHORT:
            near_end = tl.minimum(t_end, first)
            if (t_begin < near_end) | (t_end <= first):
                place = (start, t_begin, near_end, length, i_state, num_states, i_s, S, i_n, i_h, i_k, i_v, 0)
                _forward_segment(
                    q, k, v, g, h0, sums, o, ht, cu_seqlens, begins, place, scale, T, H, K, V, BK, LOAD, KIND
                )
        if FAR >= SHORT:
            if first < t_end:
                LOAD_FAR: tl.constexpr = LOAD if (BK > 128) or (FAR == KIND) else POINTERS
                place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, i_n, i_h, i_k, i_v, first)
                _forward_segment(
                    q, k, v, g, h0, sums, o, ht, cu_seqlens, begins, place, scale, T, H, K, V, BK, LOAD_FAR, FAR
                )


@functools.lru_cache(maxsize=4096)
def _plan(
    N: int, H: int, K: int, V: int, T: int, kinds: int, dtype: torch.dtype, has_descriptors: bool
) -> tuple[int, int, int, tuple[Launcher, ...]]:
    """Number of slices of K, tokens a segment, programs, and the launches.

    They follow from shapes, and from whether there are tensor descriptors.
    """
    kind, far, joined = kinds % FAR_UNIT, kinds // FAR_UNIT % FAR_UNIT, kinds // JOINED * JOINED
    # wider slices spill too much where addresses take registers, or operands are float32 (VECTOR's in fp16)
    narrow = (kind == SCALAR.value and not has_descriptors) or (kind == VECTOR.value and dtype == torch.float16)
    BK = min(padded(K), WIDEST // 2 if narrow else WIDEST)
    slices = ceil_div(K, BK)
    L = segment_length(T, N * H * ceil_div(V, TILE.value))
    grid = N * H * ceil_div(T, L) * slices * ceil_div(V, TILE.value)
    load, stages = POINTERS.value, 2
    if BK > 128:
        load = DESCRIPTORS.value if has_descriptors else load
        # with one stage two programs fit on a multiprocessor, but FAR_CONSTANT by pointers then spills too much
        stages = 2 if far == FAR_CONSTANT.value and not has_descriptors else 1
    elif has_descriptors and slices == 1:  # the float32 stores of partial sums cost what this gains
        load, stages = TO_REGISTERS.value, 3
    elif grid <= 132 and kind != SCALAR.value:
        stages = 3  # a program alone on a multiprocessor must hide its own loads
    kinds_of_launches: tuple[int, ...] = (kinds,)
    if kind == SCALAR.value and BK > 128:  # both kinds in one launch spill too much
        # a launch for each kind, which is given as near and as far
        kinds_of_launches = (kind + FAR_UNIT * kind + joined, far + FAR_UNIT * far + joined)
    constants = {"K": K, "V": V, "BK": BK, "LOAD": load}
    launches = [
        launcher_of(chunk_forward_kernel, {**constants, "KINDS": kinds_of_launch}, 4, stages)
        for kinds_of_launch in kinds_of_launches
    ]
    return slices, L, grid, tuple(launches)


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    """`o` `[B, T, H, V]`, the final state or None, and if `keep` what the backward takes.

    `o` has the problem's output dtype. The final state is float32 `[N, H, K, V]`.
    """
    prepared = prepare(problem, output_final_state)
    v = problem.v
    N, H, K, V = shape = prepared.state_shape
    T = v.shape[1]
    has_descriptors = prepared.lengths is None and CHUNK.value < T  # descriptors take a program two microseconds
    has_descriptors = has_descriptors and has_tensor_descriptors(prepared.q, prepared.k, v)
    slices, L, grid, launches = _plan(N, H, K, V, T, prepared.kinds, v.dtype, has_descriptors)
    o = empty_as(v, problem.output_dtype)
    parts = v.new_empty((slices, *v.shape), dtype=torch.float32) if slices > 1 else o
    ht = v.new_empty(shape, dtype=torch.float32) if output_final_state else None
    sums = None if L >= T else sum_segments(problem, prepared, L, room_for_gradients=keep)
    arguments = (prepared.q, prepared.k, v, prepared.gate, problem.initial_state, sums, parts, ht)
    arguments += (prepared.pack, problem.scale, T, H, L)
    for launch in launches:
        launch(grid, arguments)
    if slices > 1:
        sum_slices(parts, o)
    return o, ht, prepared.saved(problem, sums) if keep else None
