"""The `decay` family token by token: decoding, and the backward of decays that no chunk form has (per value channel).

    S_t = e^{g_t} diag(e^{gk_t}) S_{t-1} diag(e^{gv_t}) + k_t v_t^T      o_t = scale q_t^T S_t

Forward: a program owns a `[K, BV]` slice of one head's state. Backward by roles, as in `chunk_backward.py`: dq
forward in time (a tile of K), dk (a tile of K) and dv (a tile of V) in reverse, no stored state. Gate gradients are
suffix sums of row products.
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Gradients, Problem
from fla.backends.triton._launch import ceil_div
from fla.backends.triton._lib import LOG2E, load_state, sequence, store_state
from fla.backends.triton.decay._decay import padded
from fla.backends.triton.decay.gate_gradient import close_channel_gradient

BV = tl.constexpr(16)  # value columns a program, forward
TILE = tl.constexpr(16)  # channels of K or V a program, backward


@triton.jit
def _decay_state(b_S, g, gk, gv, g_gamma, row, i_h, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """`b_S` `[len(o_k), len(o_v)]` times the decays of token `row`. No clamp: nothing is summed, and exp(-inf) is 0."""
    if g is not None:
        b_S *= tl.exp2(tl.load(g + row).to(tl.float32) * LOG2E)
    if g_gamma is not None:
        b_S *= tl.exp2(tl.load(g_gamma + i_h).to(tl.float32) * LOG2E)
    if gk is not None:
        b_S *= tl.exp2(tl.load(gk + row * K + o_k, mask=o_k < K, other=0.0).to(tl.float32) * LOG2E)[:, None]
    if gv is not None:
        b_S *= tl.exp2(tl.load(gv + row * V + o_v, mask=o_v < V, other=0.0).to(tl.float32) * LOG2E)[None, :]
    return b_S


@triton.jit
def _vector(p, row, o_d, D: tl.constexpr):
    return tl.load(p + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "H"])
def recurrent_forward_kernel(
    q, k, v, g, gk, gv, g_gamma, h0, o, ht, cu_seqlens, scale, T, H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr
):
    i_state = tl.program_id(0).to(tl.int64) // tl.cdiv(V, BV)
    i_v, i_n, i_h = tl.program_id(0) % tl.cdiv(V, BV), i_state // H, i_state % H
    start, length = sequence(cu_seqlens, i_n, T)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_S = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[:, None], o_v[None, :], K, V)
    for t in range(0, length):
        row = (start + t) * H + i_h
        b_S = _decay_state(b_S, g, gk, gv, g_gamma, row, i_h, o_k, o_v, K, V)
        b_S += _vector(k, row, o_k, K)[:, None] * _vector(v, row, o_v, V)[None, :]
        b_o = tl.sum(b_S * _vector(q, row, o_k, K)[:, None], 0) * scale
        tl.store(o + row * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)
    if ht is not None:
        store_state(ht, i_state, o_k[:, None], o_v[None, :], K, V, b_S)


@triton.jit
def _dq_role(
    k, v, gk, gv, do, h0, dq, start, length, scale, i_state, i_h, H, o_k, o_v, K: tl.constexpr, V: tl.constexpr
):
    b_S = tl.zeros([o_k.shape[0], o_v.shape[0]], tl.float32)
    if h0 is not None:
        b_S += load_state(h0, i_state, o_k[:, None], o_v[None, :], K, V)
    for t in range(0, length):
        row = (start + t) * H + i_h
        b_S = _decay_state(b_S, None, gk, gv, None, row, i_h, o_k, o_v, K, V)
        b_S += _vector(k, row, o_k, K)[:, None] * _vector(v, row, o_v, V)[None, :]
        b_dq = tl.sum(b_S * _vector(do, row, o_v, V)[None, :], 1) * scale
        tl.store(dq + row * K + o_k, b_dq, mask=o_k < K)


@triton.jit
def _dkv_role(
    q,
    x,
    gk,
    gv,
    do,
    dht,
    dx,
    dh0,
    start,
    length,
    scale,
    i_state,
    i_h,
    H,
    o_k,
    o_v,
    K: tl.constexpr,
    V: tl.constexpr,
    KEY: tl.constexpr,
):
    """`dk = dS v` (KEY: x is v) or `dv = k dS` (x is k), from the last token to the first."""
    b_dS = tl.zeros([o_k.shape[0], o_v.shape[0]], tl.float32)
    if dht is not None:
        b_dS += load_state(dht, i_state, o_k[:, None], o_v[None, :], K, V)
    for i_t in range(0, length):
        row = (start + length - 1 - i_t) * H + i_h
        b_dS += _vector(q, row, o_k, K)[:, None] * (_vector(do, row, o_v, V) * scale)[None, :]
        if KEY:
            b_dk = tl.sum(b_dS * _vector(x, row, o_v, V)[None, :], 1)
            tl.store(dx + row * K + o_k, b_dk, mask=o_k < K)
        else:
            b_dv = tl.sum(b_dS * _vector(x, row, o_k, K)[:, None], 0)
            tl.store(dx + row * V + o_v, b_dv, mask=o_v < V)
        b_dS = _decay_state(b_dS, None, gk, gv, None, row, i_h, o_k, o_v, K, V)
    if KEY:  # together these programs own every key channel once
        if dh0 is not None:
            store_state(dh0, i_state, o_k[:, None], o_v[None, :], K, V, b_dS)


@triton.jit(do_not_specialize=["T", "H"])
def recurrent_backward_kernel(
    q, k, v, gk, gv, do, h0, dht, dq, dk, dv, dh0, cu_seqlens, scale, T, H, K: tl.constexpr, V: tl.constexpr
):
    NK: tl.constexpr = (K + TILE - 1) // TILE
    NV: tl.constexpr = (V + TILE - 1) // TILE
    BK: tl.constexpr = 64 if K <= 64 else 128
    BV_ALL: tl.constexpr = 64 if V <= 64 else 128
    i_role = tl.program_id(0) % (2 * NK + NV)
    i_state = tl.program_id(0).to(tl.int64) // (2 * NK + NV)
    i_n, i_h = i_state // H, i_state % H
    start, length = sequence(cu_seqlens, i_n, T)
    o_tile, o_k, o_v = tl.arange(0, TILE), tl.arange(0, BK), tl.arange(0, BV_ALL)
    if i_role < NK:
        _dq_role(k, v, gk, gv, do, h0, dq, start, length, scale, i_state, i_h, H, i_role * TILE + o_tile, o_v, K, V)
    elif i_role < 2 * NK:
        o_part = (i_role - NK) * TILE + o_tile
        _dkv_role(q, v, gk, gv, do, dht, dk, dh0, start, length, scale, i_state, i_h, H, o_part, o_v, K, V, True)
    else:
        o_part = (i_role - 2 * NK) * TILE + o_tile
        _dkv_role(q, k, gk, gv, do, dht, dv, dh0, start, length, scale, i_state, i_h, H, o_k, o_part, K, V, False)


def forward(problem: Problem, output_final_state: bool, dtype: torch.dtype | None = None):
    """`o` in `dtype` (by default what the problem asks for), and the final state float32 or None."""
    q, v = problem.q, problem.v
    o = torch.empty_like(v, dtype=dtype or problem.output_dtype)
    ht = q.new_empty(problem.state_shape, dtype=torch.float32) if output_final_state else None
    N, H, K, V = problem.state_shape
    recurrent_forward_kernel[(ceil_div(V, BV.value) * N * H,)](
        q,
        problem.k,
        v,
        problem.g,
        problem.gk,
        problem.gv,
        problem.g_gamma,
        problem.initial_state,
        o,
        ht,
        problem.cu_seqlens,
        problem.scale,
        q.shape[1],
        H,
        K=K,
        V=V,
        BK=padded(K),
        num_warps=1,
    )
    return o, ht


def backward(problem: Problem, do, dht, needs_gates: bool) -> Gradients:
    """All gradients, the row products of the gates' in float32."""
    q, k, v = problem.q, problem.k, problem.v
    N, H, K, V = problem.state_shape
    dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    dh0 = None if problem.initial_state is None else q.new_empty(problem.state_shape, dtype=torch.float32)
    grid = (N * H * (2 * ceil_div(K, TILE.value) + ceil_div(V, TILE.value)),)
    recurrent_backward_kernel[grid](
        q,
        k,
        v,
        problem.gk,
        problem.gv,
        do,
        problem.initial_state,
        dht,
        dq,
        dk,
        dv,
        dh0,
        problem.cu_seqlens,
        problem.scale,
        q.shape[1],
        H,
        K=K,
        V=V,
        num_warps=1,
    )
    dgk = dgv = None
    if needs_gates:
        o, final_state = forward(problem, True, torch.float32)
        change = None if dht is None else final_state * dht
        if problem.gk is not None:
            dgk = _suffix_sums(problem, problem.gk, q * dq, k * dk, None if change is None else change.sum(-1))
        if problem.gv is not None:
            dgv = _suffix_sums(problem, problem.gv, o * do, v * dv, None if change is None else change.sum(-2))
    return Gradients(dq, dk, dv, None, dgk, dgv, dh0)


def _suffix_sums(problem: Problem, gate, plus, minus, change):
    """`sum_{s >= t} (plus - minus)_s + change`, the gradient of the per-channel `gate`."""
    if change is None:
        N, H = problem.state_shape[:2]
        change = plus.new_zeros(N, H, gate.shape[-1])
    return close_channel_gradient(problem, gate, torch.stack((plus, minus), 3), change.contiguous())
