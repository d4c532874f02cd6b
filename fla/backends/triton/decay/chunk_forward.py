"""Forward of the `decay` family in one pass: a program owns a `[BK, BV]` tile of one head's state and walks its chunks.

With `G` the running log decay in the chunk, `G_C` its last value, `m` its middle, `Gam_ij = exp(G_i - G_j)`:

    Vn = e^{m - G} V    P = tril(Q K^T)          O = scale e^{G - m} (Q (e^m S) + P Vn)
                        S <- e^{G_C - m} (e^m S + K^T Vn)
    per key channel     P = tril(Qn Kn^T)        O = scale (Qn S + P V)                with Qn, Kn of `prepare.py`
                        S <- e^{G_C} (S + Kn^T V)                                      and S in units of 1 / UNIT
    the same, SHORT                              O = scale (Qn (e^m S) + P V)
                        S <- e^{G_C - m} (e^m S + Kn^T V)
    too strong (FAR_*)  P = tril(Q K^T * Gam)    O = scale (e^G Q S + P V)
                        S <- e^{G_C} S + K^T (e^{G_C - G} V)

Heads with more than WIDEST key channels are computed in slices of K, whose float32 outputs are added in a fixed order.

Axes     B batch, T tokens, H heads, K key, V value, C tokens a chunk, N sequences, S segments of L tokens
Prefixes i_ program index, o_ offsets, m_ mask, b_ values of a block
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
    POINTERS,
    TILES,
    TO_REGISTERS,
    load_tile,
    operand,
    store_rows,
    store_state,
    tiles_of,
)
from fla.backends.triton._sequence import (
    CHUNK,
    TILE,
    from_before,
    going_on,
    head_base,
    is_behind,
    of_one_sequence,
    padded,
    passing,
    segment,
    segment_length,
    starts_of,
    state_before,
)
from fla.backends.triton._slices import sum_slices
from fla.backends.triton.decay._decay import (
    CONSTANT,
    FAR_CONSTANT,
    FAR_SCALAR,
    JOINED,
    NONE,
    PAIR,
    SCALAR,
    SHORT,
    SHORT_CHUNK,
    UNIT,
    VECTOR,
    WIDEST,
    factor_on,
    factor_to,
    first_slot,
    is_far,
    marks_size,
    near_decay,
    pair_decay,
    scalar_decay,
    scale_rows,
)
from fla.backends.triton.decay.prepare import prepare
from fla.backends.triton.decay.segments import segment_states


@triton.jit
def _walk(
    q, k, v, g, h0, local, o, ht, cu_seqlens, begins, at, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, WAY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A tile of a state through one segment. WAY: how q comes (`load_tile`)."""
    C: tl.constexpr = SHORT_CHUNK if KIND == SHORT else CHUNK
    DTYPE: tl.constexpr = q.dtype.element_ty
    PREPARED: tl.constexpr = (KIND == VECTOR) or (KIND == SHORT)
    FAR: tl.constexpr = (KIND == FAR_CONSTANT) or (KIND == FAR_SCALAR)
    # scores after the state's part: fewer spills; where decays need no registers, scores first are faster
    SCORES_LATE: tl.constexpr = (BK >= 128) and not (FAR or (KIND == CONSTANT))
    V_WAY: tl.constexpr = POINTERS if WAY == POINTERS else TILES
    K_WAY: tl.constexpr = WAY if (KIND == NONE) or (KIND == VECTOR) else V_WAY  # v's scaled rows need the registers
    start, t_begin, t_end, length, i_n, i_h, i_state, states, i_s, S, i_k, i_v = at
    o_c, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * TILE + tl.arange(0, TILE)
    m_pair = o_c[:, None] >= o_c[None, :]
    base = head_base(cu_seqlens, start, i_h, T, H)
    p_factors = g
    if PREPARED:
        p_factors += marks_size(cu_seqlens, T, H, states) + (first_slot(cu_seqlens, start, i_n, T) * H + i_h) * (2 * K)
    elif (KIND == SCALAR) or (KIND == FAR_SCALAR):
        base += marks_size(cu_seqlens, T, H, states)

    b_S = state_before(h0, local, i_state, i_s, S, o_k[:, None], o_v[None, :], K, V)
    if PREPARED:
        b_on = factor_on(p_factors + t_begin // C * (2 * K * H), o_k, t_begin < t_end, K)
        if KIND == SHORT:
            b_to = factor_to(p_factors + t_begin // C * (2 * K * H), o_k, t_begin < t_end, K)
        else:
            b_S *= UNIT
    elif FAR:
        b_G, total = scalar_decay(g, base, i_h, t_begin, t_end, t_begin < t_end, KIND)
    else:
        b_u, half = near_decay(g, base, i_h, t_begin, t_end, t_begin < t_end, KIND)
        b_S *= half
    b_first, last = starts_of(begins, t_begin, t_end, C)
    q_tiles = tiles_of(q, start * H + i_h, length, H, K, C, BK, WAY)
    k_tiles = tiles_of(k, start * H + i_h, length, H, K, C, BK, K_WAY)
    v_tiles = tiles_of(v, start * H + i_h, length, H, V, C, TILE, V_WAY)
    STAGES: tl.constexpr = 2 if FAR and BK <= 128 else None  # None: the launch's
    for t in tl.range(t_begin, t_end, C, num_stages=STAGES):
        m_c = t + o_c < t_end
        row = (start + t) * H + i_h
        b_q = load_tile(q_tiles, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, WAY)
        b_k = load_tile(k_tiles, t, i_k * BK, row, o_c, m_c, H, o_k, K, C, BK, K_WAY)
        b_v = load_tile(v_tiles, t, i_v * TILE, row, o_c, m_c, H, o_v, V, C, TILE, V_WAY).to(DTYPE)
        m_near = of_one_sequence(m_pair, begins, b_first, False)
        if not SCORES_LATE:
            b_P = tl.dot(b_q, tl.trans(b_k))
        if FAR:
            b_o = from_before(tl.dot(b_q, operand(b_S, DTYPE)) * tl.exp2(b_G)[:, None], begins, b_first)
            b_o = tl.dot(operand(b_P * pair_decay(b_G, m_near), DTYPE), b_v, acc=b_o)
            store_rows(o + row * V, o_c, m_c, H, o_v, V, b_o * scale)
            b_v = going_on((b_v * tl.exp2(total - b_G)[:, None]).to(DTYPE), begins, last)
            b_S = tl.dot(tl.trans(b_k), b_v, acc=passing(b_S * tl.exp2(total), begins, last))
            b_G, total = scalar_decay(g, base, i_h, t + C, t_end, t_end - t > C, KIND)
        else:  # the next chunk's decays are loaded before they are needed: their latency passes unseen
            if KIND == SHORT:
                b_S *= b_to[:, None]  # apart from `b_on`: their product may be no number of float32
            b_o = from_before(tl.dot(b_q, operand(b_S, DTYPE)), begins, b_first)
            if SCORES_LATE:
                b_P = tl.dot(b_q, tl.trans(b_k))
            if PREPARED:
                b_on_next = factor_on(p_factors + (t // C + 1) * (2 * K * H), o_k, t_end - t > C, K)
                if KIND == SHORT:
                    b_to = factor_to(p_factors + (t // C + 1) * (2 * K * H), o_k, t_end - t > C, K)
            elif KIND != NONE:
                b_u_next, half_next = near_decay(g, base, i_h, t + C, t_end, t_end - t > C, KIND)
                b_v = scale_rows(b_v, -b_u, KIND).to(DTYPE)
            b_o = tl.dot(operand(tl.where(m_near, b_P, 0.0), DTYPE), b_v, acc=b_o)
            if not PREPARED:
                b_o = scale_rows(b_o, b_u, KIND)
            store_rows(o + row * V, o_c, m_c, H, o_v, V, b_o * scale)
            b_S = tl.dot(tl.trans(b_k), going_on(b_v, begins, last), acc=passing(b_S, begins, last))
            if PREPARED:
                b_S *= b_on[:, None]
                b_on = b_on_next
            elif KIND != NONE:
                b_S *= half * half_next
                b_u, half = b_u_next, half_next
        b_first, last = starts_of(begins, t + C, t_end, C)
    if ht is not None:
        if t_end == length:
            if KIND == VECTOR:
                b_S *= 1.0 / UNIT
            store_state(ht, i_state, o_k[:, None], o_v[None, :], K, V, b_S)


@triton.jit(do_not_specialize=["T", "H", "L"])
def chunk_forward_kernel(
    q, k, v, g, h0, local, o, ht, pack, scale, T, H, L,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, WAY: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = KINDS % 8
    FAR: tl.constexpr = KINDS // 8 % 8
    cu_seqlens = None if KINDS // 64 else pack
    begins = pack if KINDS // 64 else None
    NV: tl.constexpr = (V + TILE - 1) // TILE
    NK: tl.constexpr = (K + BK - 1) // BK
    S = tl.cdiv(T, L)
    i_v, i_k = tl.program_id(0) % NV, tl.program_id(0) // NV % NK
    i_s, i_state = tl.program_id(0) // (NV * NK) % S, tl.program_id(0).to(tl.int64) // (NV * NK * S)
    states = tl.num_programs(0) // (NV * NK * S)
    i_n, i_h = i_state // H, i_state % H
    start, length, t_begin, t_end = segment(cu_seqlens, i_n, i_s, T, L)
    if is_behind(i_s, t_begin, length):
        return
    if NK > 1:  # partial outputs, one tensor a slice
        o += i_k * (start * 0 + (T if cu_seqlens is not None else states // H * T)) * H * V
    at = (start, t_begin, t_end, length, i_n, i_h, i_state, states, i_s, S, i_k, i_v)
    if FAR == 0:
        _walk(q, k, v, g, h0, local, o, ht, cu_seqlens, begins, at, scale, T, H, K, V, BK, WAY, KIND)
    elif FAR == KIND:  # for heads of this kind alone
        if is_far(g, cu_seqlens, i_state, states, start, length, T, H, q.dtype.element_ty, KIND) == (
            KIND == FAR_SCALAR
        ):
            _walk(q, k, v, g, h0, local, o, ht, cu_seqlens, begins, at, scale, T, H, K, V, BK, WAY, KIND)
    else:
        if is_far(g, cu_seqlens, i_state, states, start, length, T, H, q.dtype.element_ty, KIND):
            FAR_WAY: tl.constexpr = WAY if BK > 128 else POINTERS
            _walk(q, k, v, g, h0, local, o, ht, cu_seqlens, begins, at, scale, T, H, K, V, BK, FAR_WAY, FAR)
        else:
            _walk(q, k, v, g, h0, local, o, ht, cu_seqlens, begins, at, scale, T, H, K, V, BK, WAY, KIND)


@functools.lru_cache(maxsize=4096)
def _plan(
    N: int, H: int, K: int, V: int, T: int, kinds: int, dtype: torch.dtype, tiled: bool
) -> tuple[int, int, int, tuple[Launcher, ...]]:
    """Number of slices of K, tokens a segment, programs, and the launches: from shapes alone, and whether tensor
    descriptors are to be had (`tiled`)."""
    kind, far, joined = kinds % PAIR, kinds // PAIR % PAIR, kinds // JOINED * JOINED
    # wider ones spill too much where addresses take registers, or operands are float32 (fp16's of the vector kind)
    narrow = (kind == SCALAR.value and not tiled) or (kind == VECTOR.value and dtype == torch.float16)
    BK = min(padded(K), WIDEST // 2 if narrow else WIDEST)
    slices = ceil_div(K, BK)
    L = segment_length(T, N * H * ceil_div(V, TILE.value))
    grid = N * H * ceil_div(T, L) * slices * ceil_div(V, TILE.value)
    way, stages = POINTERS.value, 2
    if BK > 128:
        way = TILES.value if tiled else way
        # one: twice on a multiprocessor (strong constant decays by pointers spill more than they may)
        stages = 2 if far == FAR_CONSTANT.value and not tiled else 1
    elif tiled and slices == 1:  # (partial sums are float32: their stores take what it gains)
        way, stages = TO_REGISTERS.value, 3
    elif grid <= 132 and kind != SCALAR.value:
        stages = 3  # one program a multiprocessor must hide its loads alone
    pairs: tuple[int, ...] = (kinds,)
    if kind == SCALAR.value and BK > 128:  # the pair spills too much: each alone, said as a pair with itself
        pairs = (kind + PAIR * kind + joined, far + PAIR * far + joined)
    constants = {"K": K, "V": V, "BK": BK, "WAY": way}
    launches = [launcher_of(chunk_forward_kernel, {**constants, "KINDS": pair}, 4, stages) for pair in pairs]
    return slices, L, grid, tuple(launches)


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    """`o` `[B, T, H, V]` in the problem's output dtype, the final state float32 `[N, H, K, V]` or None, and if `keep`
    what a backward finds."""
    prepared = prepare(problem, output_final_state)
    v = problem.v
    N, H, K, V = shape = prepared.state_shape
    T = v.shape[1]
    tiled = prepared.lengths is None and CHUNK.value < T  # descriptors cost a program two microseconds
    tiled = tiled and has_tensor_descriptors(prepared.q, prepared.k, v)
    slices, L, grid, launches = _plan(N, H, K, V, T, prepared.kinds, v.dtype, tiled)
    o = empty_as(v, problem.output_dtype)
    parts = v.new_empty((slices, *v.shape), dtype=torch.float32) if slices > 1 else o
    ht = v.new_empty(shape, dtype=torch.float32) if output_final_state else None
    local = None if L >= T else segment_states(problem, prepared, L, with_room=keep)
    arguments = (prepared.q, prepared.k, v, prepared.gate, problem.initial_state, local, parts, ht)
    arguments += (prepared.pack, problem.scale, T, H, L)
    for launch in launches:
        launch(grid, arguments)
    if slices > 1:
        sum_slices(parts, o)
    return o, ht, prepared.saved(problem, local) if keep else None
