"""Forward of the `decay` family in one pass: a program owns a `[K, BV]` slice of one head's state and walks its chunks.

Scalar kinds, with `G` the running sum of the log decay in the chunk, `G_C` its last value, `Gam_ij = exp(G_i - G_j)`:

    P = tril(Q K^T * Gam)      O = scale (e^G Q S + P V)      S <- e^{G_C} S + K^T (e^{G_C - G} V)

Vector kind (decay per key channel), everything relative to the chunk's middle `m` (see `_decay.py`), state held V
first:

    Qn = Q e^{G - m}   Kn = K e^{m - G}   P = tril(Qn Kn^T)
    O = scale (Qn (e^m S) + P V)          S <- e^{G_C - m} (e^m S + Kn^T V)

Axes     B batch, T tokens, H heads, K key, V value, C tokens a chunk, N sequences
Prefixes i_ program index, o_ offsets, m_ mask, b_ values of a block
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import load_state, load_tile, sequence, store_state, store_tile
from fla.backends.triton.decay._decay import (
    CHUNK,
    NONE,
    SHORT,
    VECTOR,
    decayed,
    flag_far,
    padded,
    run_vector_kernel,
    scalar_decay,
    vector_decay,
)

BV = tl.constexpr(64)  # value columns a program


@triton.jit(do_not_specialize=["T", "H"])
def scalar_forward_kernel(
    q,
    k,
    v,
    g,
    h0,
    o,
    ht,
    cu_seqlens,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
):
    i_state = tl.program_id(0).to(tl.int64) // tl.cdiv(V, BV)
    i_v, i_n, i_h = tl.program_id(0) % tl.cdiv(V, BV), i_state // H, i_state % H
    start, length = sequence(cu_seqlens, i_n, T)
    o_c, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_pair = o_c[:, None] >= o_c[None, :]

    b_S = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[:, None], o_v[None, :], K, V)
    for t in range(0, length, CHUNK):
        m_t = t + o_c < length
        row = (start + t + o_c) * H + i_h
        b_q = load_tile(q, row, m_t, o_k, K)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V)
        b_G, total = scalar_decay(g, row, m_t, i_h, length - t, KIND)
        b_P = decayed(tl.dot(b_q, tl.trans(b_k)), b_G, m_pair, KIND, False).to(b_v.dtype)
        b_o = tl.dot(b_q, b_S.to(b_q.dtype))
        if KIND != NONE:
            b_o *= tl.exp2(b_G)[:, None]
        b_o = tl.dot(b_P, b_v, acc=b_o)
        store_tile(o, row, m_t, o_v, V, b_o * scale)
        if KIND != NONE:
            b_v = (b_v * tl.exp2(total - b_G)[:, None]).to(b_v.dtype)
            b_S *= tl.exp2(total)
        b_S = tl.dot(tl.trans(b_k), b_v, acc=b_S)
    if ht is not None:
        store_state(ht, i_state, o_k[:, None], o_v[None, :], K, V, b_S)


@triton.jit(do_not_specialize=["T", "H"])
def vector_forward_kernel(
    q,
    k,
    v,
    g,
    h0,
    o,
    ht,
    cu_seqlens,
    far,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    RANGE: tl.constexpr,
):
    C: tl.constexpr = SHORT if RANGE is None else CHUNK
    # short chunks of fp16 go through the tensor cores as tf32: fp16's digits, but a range that a strong decay fits in
    OPERAND: tl.constexpr = tl.float32 if RANGE is None and q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    i_state = tl.program_id(0).to(tl.int64) // tl.cdiv(V, BV)
    i_v, i_n, i_h = tl.program_id(0) % tl.cdiv(V, BV), i_state // H, i_state % H
    if RANGE is None:
        if tl.load(far + i_state) == 0:
            return
    start, length = sequence(cu_seqlens, i_n, T)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_pair = o_c[:, None] >= o_c[None, :]

    b_S = tl.zeros([BV, BK], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[None, :], o_v[:, None], K, V)
    for t in range(0, length, C):
        m_t = t + o_c < length
        row = (start + t + o_c) * H + i_h
        b_q = load_tile(q, row, m_t, o_k, K)
        b_k = load_tile(k, row, m_t, o_k, K)
        b_v = load_tile(v, row, m_t, o_v, V).to(OPERAND)
        b_Gm, b_m, b_total = vector_decay(load_tile(g, row, m_t, o_k, K), C)
        if RANGE is not None:
            flag_far(far, i_state, b_m, b_total, RANGE)
        b_qn = (b_q * tl.exp2(b_Gm)).to(OPERAND)
        b_kn = (b_k * tl.exp2(-b_Gm)).to(OPERAND)
        b_P = tl.where(m_pair, tl.dot(b_qn, tl.trans(b_kn)), 0.0).to(OPERAND)
        b_S *= tl.exp2(b_m)[None, :]
        b_o = tl.dot(b_qn, tl.trans(b_S.to(OPERAND)))
        b_o = tl.dot(b_P, b_v, acc=b_o)
        store_tile(o, row, m_t, o_v, V, b_o * scale)
        b_S = tl.dot(tl.trans(b_v), b_kn, acc=b_S)
        b_S *= tl.exp2(b_total - b_m)[None, :]
    if ht is not None:
        store_state(ht, i_state, o_k[None, :], o_v[:, None], K, V, b_S)


def forward(problem: Problem, kind: int, gate: torch.Tensor | None, output_final_state: bool):
    """`o` `[B, T, H, V]` in v's dtype and the final state float32 `[N, H, K, V]` or None."""
    q, v = problem.q, problem.v
    o = torch.empty_like(v, dtype=problem.output_dtype)
    ht = q.new_empty(problem.state_shape, dtype=torch.float32) if output_final_state else None
    N, H, K, V = problem.state_shape
    grid = (triton.cdiv(V, BV.value) * N * H,)
    arguments = (q, problem.k, v, gate, problem.initial_state, o, ht, problem.cu_seqlens)
    if kind == VECTOR.value:
        run_vector_kernel(vector_forward_kernel, grid, arguments, problem, stages=1, K=K, V=V, BK=padded(K))
    else:
        scalar_forward_kernel[grid](
            *arguments, problem.scale, q.shape[1], H, K=K, V=V, BK=padded(K), KIND=kind, num_warps=4, num_stages=2
        )
    return o, ht
