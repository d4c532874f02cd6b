"""Backward of the chunk kernels: two directions through time, and no stored state.

A program has one of three roles, for one tile and one segment:

    dq, forward in time, a tile of K
    dk, in reverse, a tile of K
    dv, in reverse, a tile of V

Near and far tokens (`_decay.py`) have bodies of their own: `near_backward.py` and `far_backward.py`, which say what a
role computes. `gate_gradient.py` says what the gate gradient needs of the roles: end terms, row sums, and states that
enter their dots as high and low halves.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends.decay import Problem
from fla.backends.triton._launch import Launcher, ceil_div, empty_as, has_tensor_descriptors, launcher_of
from fla.backends.triton._lib import (
    DESCRIPTORS,
    TO_REGISTERS,
)
from fla.backends.triton._sequence import (
    CHUNK,
    TILE,
    head_offset,
    is_past_end,
    padded,
    segment_bounds,
    segment_length,
)
from fla.backends.triton._slices import summed_slices
from fla.backends.triton.decay._decay import (
    ALL_NEAR,
    FAR_BITS,
    FAR_CONSTANT,
    FAR_SCALAR,
    FAR_SHIFT,
    FAR_UNIT,
    JOINED_BIT,
    NEAR_BITS,
    SCALAR,
    SHORT,
    VECTOR,
    WIDEST,
    WIDEST_BACKWARD,
    first_factor_slot,
    first_far,
    marks_length,
)
from fla.backends.triton.decay.far_backward import far_role
from fla.backends.triton.decay.gate_gradient import finish_scalar, finish_vector
from fla.backends.triton.decay.near_backward import dk_role, dq_role, dv_role
from fla.backends.triton.decay.prepare import Prepared, prepare
from fla.backends.triton.decay.segments import sum_segments, sum_segments_reversed

# ROLES of a launch: a bit for each role; whether the gate needs its gradient; whether slices may be WIDEST (else
# WIDEST_BACKWARD) wide; and in the bits above, LOAD_UNIT times how tiles are loaded (`load_tile`)
DQ, DK, DV, GATE_TERMS, WIDE_SLICES, LOAD_UNIT = (tl.constexpr(1 << i) for i in range(6))
ALL_ROLES, WIDE_FLAGS = DQ.value | DK.value | DV.value, WIDE_SLICES.value + LOAD_UNIT.value * DESCRIPTORS.value


@triton.jit
def _run_role(
    q, k, v, g, do, h0, dht, grads, dh0, work, sums, pack, role_place, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, KINDS: tl.constexpr, ROLES: tl.constexpr,
):  # fmt: skip
    """One role, for a tile of a segment. `i_role` counts the tiles of dq (once per slice of V), of dk, then of dv."""
    KIND: tl.constexpr = NEAR_BITS & KINDS  # of this program: near or far
    cu_seqlens = None if JOINED_BIT & KINDS else pack
    begins = pack if JOINED_BIT & KINDS else None
    LOAD: tl.constexpr = ROLES // LOAD_UNIT
    SLICE: tl.constexpr = 256 if WIDE_SLICES & ROLES else 128  # WIDEST, WIDEST_BACKWARD
    BK: tl.constexpr = 64 if K <= 64 else 128 if K <= 128 else SLICE
    BV: tl.constexpr = 64 if V <= 64 else 128 if V <= 128 else SLICE
    TK: tl.constexpr = (K + TILE - 1) // TILE  # tiles of K and of V, and slices of V
    TV: tl.constexpr = (V + TILE - 1) // TILE
    NV: tl.constexpr = (V + BV - 1) // BV
    KEYS: tl.constexpr = TK * NV  # programs of dq, and of dk
    N_DQ: tl.constexpr = KEYS if DQ & ROLES else 0
    N_DK: tl.constexpr = KEYS if DK & ROLES else 0
    PREPARED: tl.constexpr = (KIND == VECTOR) or (KIND == SHORT)
    FAR: tl.constexpr = (KIND == SHORT) or ((KIND == FAR_CONSTANT) or (KIND == FAR_SCALAR))
    start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_role, first = role_place
    i_n, i_h = i_state // H, i_state % H
    tokens = start * 0 + (T if cu_seqlens is not None else num_states // H * T)  # 64 bits wide, like `start`
    size_k, size_v = tokens * H * K, tokens * H * V
    if (KIND == SCALAR) or (KIND == FAR_SCALAR):
        g += marks_length(cu_seqlens, T, H, num_states)
    if PREPARED:
        slot = first_factor_slot(cu_seqlens, start, i_n, T)
        g += marks_length(cu_seqlens, T, H, num_states) + (slot * H + i_h) * (2 * K)
    i_key, i_value = i_role % KEYS, i_role - N_DQ - N_DK
    i_k, i_v = i_key % TK, i_key // TK  # for dq and dk: tile of K, slice of V
    i_slice, i_tile = i_value // TV, i_value % TV  # for dv: slice of K, tile of V
    end_term = work if GATE_TERMS & ROLES else None
    if GATE_TERMS & ROLES:
        end_term += ((i_v * num_states + i_state) * S + i_s) * K
    dq, dv = grads + i_v * size_k, grads + i_slice * size_v
    dk = dq + NV * size_k
    if PREPARED:
        dq = work + NV * num_states * S * K + i_v * size_k
        dk = dq + NV * size_k
    else:
        dv += 2 * NV * size_k
        if work is not None:
            work += NV * num_states * S * K + i_role * tokens * H
    if FAR:
        is_dq, is_dv = i_role < N_DQ, i_role >= N_DQ + N_DK
        role = (is_dq, is_dv, tl.where(is_dv, i_slice, i_v), tl.where(is_dv, i_tile, i_k))
        place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, first, role)
        dq_or_dk = tl.where(is_dq, dq, dk)
        far_role(q, k, v, g, do, h0, dht, dq_or_dk, dv, dh0, work, end_term, sums, begins, place, scale, H, K, V, KIND)
    elif i_role < N_DQ:
        end = tl.minimum(t_end, first)
        place = (start, t_begin, end, length, i_state, num_states, i_s, S, num_segments, o_head, i_k, i_v, first)
        dq_role(q, k, v, g, do, h0, dht, dq, work, end_term, sums, begins, place, scale, H, K, V, BV, LOAD, KIND)
    elif i_role < N_DQ + N_DK:
        place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_k, i_v, first)
        dk_role(q, k, v, g, do, dht, dk, dh0, work, end_term, sums, begins, place, scale, H, K, V, BV, LOAD, KIND)
    else:
        place = (
            start,
            t_begin,
            t_end,
            length,
            i_state,
            num_states,
            i_s,
            S,
            num_segments,
            o_head,
            i_slice,
            i_tile,
            first,
        )
        dv_role(q, k, g, do, dht, dv, sums, begins, place, scale, H, K, V, BK, LOAD, KIND)


@triton.jit(do_not_specialize=["T", "H", "L"])
def chunk_backward_kernel(
    q, k, v, g, do, h0, dht, grads, dh0, work, sums, pack, scale, T, H, L,
    K: tl.constexpr, V: tl.constexpr, KINDS: tl.constexpr, ROLES: tl.constexpr,
):  # fmt: skip
    """`grads`: dq and dk (each once per slice of V), then dv (once per slice of K). For VECTOR it is dv alone.

    `work` begins with the end terms `[slices of V, N H, S, K]`. Behind them the kinds with one decay for all channels
    leave the row sums of dq and dk, `[2, slices, tiles of K, heads, T]`; VECTOR leaves dQn and dKn,
    `[2, slices, B, T, H, K]`.
    """
    KIND: tl.constexpr = NEAR_BITS & KINDS
    FAR: tl.constexpr = (FAR_BITS & KINDS) >> FAR_SHIFT
    JOINED: tl.constexpr = JOINED_BIT & KINDS
    cu_seqlens = None if JOINED else pack
    SLICE: tl.constexpr = 256 if WIDE_SLICES & ROLES else 128  # WIDEST, WIDEST_BACKWARD
    KEYS: tl.constexpr = ((K + TILE - 1) // TILE) * ((V + SLICE - 1) // SLICE)  # programs of dq, and of dk
    N_DQ: tl.constexpr = KEYS if DQ & ROLES else 0
    N_DK: tl.constexpr = KEYS if DK & ROLES else 0
    ALL: tl.constexpr = N_DQ + N_DK + (((V + TILE - 1) // TILE) * ((K + SLICE - 1) // SLICE) if DV & ROLES else 0)
    S = tl.cdiv(T, L)
    i_role, i_s = tl.program_id(0) % ALL, tl.program_id(0) // ALL % S
    i_state, num_states = tl.program_id(0).to(tl.int64) // (ALL * S), tl.num_programs(0) // (ALL * S)
    i_n, i_h = i_state // H, i_state % H
    start, length, t_begin, t_end = segment_bounds(cu_seqlens, i_n, i_s, T, L)
    if is_past_end(i_s, t_begin, length):
        return
    o_head = head_offset(cu_seqlens, start, i_h, T, H)
    num_segments = tl.maximum(tl.cdiv(length, L), 1)
    if FAR == 0:
        place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_role, ALL_NEAR)
        _run_role(q, k, v, g, do, h0, dht, grads, dh0, work, sums, pack, place, scale, T, H, K, V, JOINED + KIND, ROLES)
    else:
        first = first_far(g, cu_seqlens, i_state, num_states, start, length, T, H, q.dtype.element_ty, KIND)
        place = (start, t_begin, t_end, length, i_state, num_states, i_s, S, num_segments, o_head, i_role, first)
        if (t_begin < tl.minimum(t_end, first)) | (t_end <= first):
            _run_role(
                q, k, v, g, do, h0, dht, grads, dh0, work, sums, pack, place, scale, T, H, K, V, JOINED + KIND, ROLES
            )
        if first < t_end:
            _run_role(
                q, k, v, g, do, h0, dht, grads, dh0, work, sums, pack, place, scale, T, H, K, V, JOINED + FAR, ROLES
            )


class _Plan(NamedTuple):
    NK: int  # slices of K
    NV: int  # slices of V
    keys: int  # programs of dq a head, and of dk
    L: int  # tokens a segment: as in the forward, whose `sums` are kept
    launches: tuple[tuple[int, Launcher], ...]  # programs and launcher of each


@functools.lru_cache(maxsize=4096)
def _plan(N: int, H: int, K: int, V: int, T: int, kinds: int, has_descriptors: bool, needs_gate: bool) -> _Plan:
    """Everything that follows from shapes, and from whether there are tensor descriptors."""
    is_wide = has_descriptors and max(K, V) > WIDEST_BACKWARD and kinds < FAR_UNIT
    width = WIDEST if is_wide else WIDEST_BACKWARD
    NK, NV = ceil_div(K, min(padded(K), width)), ceil_div(V, min(padded(V), width))
    keys, values = ceil_div(K, TILE.value) * NV, ceil_div(V, TILE.value) * NK
    L = segment_length(T, N * H * ceil_div(V, TILE.value))
    segments = N * H * ceil_div(T, L)
    constants = {"K": K, "V": V, "KINDS": kinds}
    if is_wide:  # in one launch the roles spill ten times what each spills alone
        launches = []
        for role, programs in ((DQ, keys), (DK, keys), (DV, values)):
            launcher = launcher_of(chunk_backward_kernel, {**constants, "ROLES": role.value + WIDE_FLAGS})
            launches.append((segments * programs, launcher))
        return _Plan(NK, NV, keys, L, tuple(launches))
    roles, stages = ALL_ROLES | (GATE_TERMS.value if needs_gate else 0), 2
    if has_descriptors and NK == NV == 1:  # with several slices descriptors gain nothing
        is_gated = kinds % FAR_UNIT in (VECTOR.value, SCALAR.value)  # these kinds are short of registers
        load, stages = (DESCRIPTORS.value, 2) if is_gated else (TO_REGISTERS.value, 3)
        roles += LOAD_UNIT.value * load
    launcher = launcher_of(chunk_backward_kernel, {**constants, "ROLES": roles}, 4, stages)
    return _Plan(NK, NV, keys, L, ((segments * (2 * keys + values), launcher),))


def backward(
    problem: Problem, saved: tuple[Tensor | None, ...], do: Tensor, dht: Tensor | None, needs_gate: bool
) -> dict[str, Tensor]:
    """The gradients of q, k, v, of the gate if `needs_gate`, and of the initial state if there is one."""
    sums = None
    if saved:
        sums, gate, begins = saved
        prepared = Prepared(problem, begins, gate)
    else:
        prepared = prepare(problem, dht is not None)
    v = problem.v
    N, H, K, V = shape = prepared.state_shape
    T, heads = v.shape[1], v.shape[0] * v.shape[1] * H
    is_vector = problem.gk is not None
    has_descriptors = prepared.lengths is None and CHUNK.value < T
    has_descriptors = has_descriptors and has_tensor_descriptors(prepared.q, prepared.k, v, do)
    NK, NV, keys, L, launches = _plan(N, H, K, V, T, prepared.kinds, has_descriptors, needs_gate)
    S = ceil_div(T, L)
    if S > 1:
        sums = sum_segments(problem, prepared, L, room_for_gradients=True) if sums is None else sums
        sum_segments_reversed(problem, prepared, L, sums, do)
    dh0 = None if problem.initial_state is None else v.new_empty(shape, dtype=torch.float32)
    is_whole = NK == 1 and (is_vector or NV == 1)  # else there are partial sums to add up
    sizes = [0 if is_vector else NV * heads * K] * 2 + [NK * heads * V]
    if is_whole and (is_vector or K == V):
        grads = empty_as(v) if is_vector else v.new_empty((3 * v.shape[0], T, H, V))
    else:
        grads = v.new_empty(sum(sizes), dtype=v.dtype if is_whole else torch.float32)
    end_size, work = NV * N * H * S * K, None
    if is_vector or needs_gate:
        work = v.new_empty(end_size + 2 * (NV * heads * K if is_vector else keys * heads), dtype=torch.float32)
    arguments = (prepared.q, prepared.k, v, prepared.gate, do, problem.initial_state, dht, grads, dh0, work, sums)
    arguments = (*arguments, prepared.pack, problem.scale, T, H, L)
    for grid, launch in launches:
        launch(grid, arguments)
    dg = None
    if is_vector:
        dq, dk, dg = finish_vector(problem, prepared, work, NV, L, needs_gate)
        dv = grads if is_whole else summed_slices(grads, NK, v)
    elif is_whole and K == V:
        dq, dk, dv = grads.unsafe_split(v.shape[0])  # the bookkeeping of views takes microseconds
    else:
        dq, dk, dv = grads.split(sizes)
        dq, dk, dv = summed_slices(dq, NV, problem.q), summed_slices(dk, NV, problem.k), summed_slices(dv, NK, v)
    if needs_gate and not is_vector:
        dg = finish_scalar(problem, prepared, work, dht is not None, 2 * keys, NV, L)
    found = {"q": dq, "k": dk, "v": dv}
    if dg is not None:
        found["gk" if is_vector else "g"] = dg
    if dh0 is not None:
        found["initial_state"] = dh0
    return found
