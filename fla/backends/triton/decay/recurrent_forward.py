"""The `decay` family token by token, forward: decoding, short inputs, float32, and states that live in a pool.

    S_t = e^{g_t} diag(e^{gk_t}) S_{t-1} diag(e^{gv_t}) + k_t v_t^T
    o_t = scale q_t^T S_t

A program owns a slice `[K, BV]` of one state. It reads the slice once, keeps it in registers and writes it once, which
is nearly all the traffic of a decoding step. The state is loaded before anything else is done, and the vectors of a
token are loaded one token ahead. Along the state's contiguous axis a thread reads 16 bytes at a time.

In the kernels, names with n_ hold what was loaded for the next token.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends.decay import Problem
from fla.backends.triton._launch import Launcher, ceil_div, empty_as, launcher_of
from fla.backends.triton._lib import LOG2E
from fla.backends.triton._sequence import sequence_bounds

MAX_KEY_DIM = 512  # a program holds all key channels
FULL_GPU_PROGRAMS = 264  # programs that keep an H200 busy: two for each of its 132 multiprocessors
V_FIRST, IN_PLACE = 1, 2  # FLAGS of the kernel: states are [states, H, V, K]; the final state is written to h0
V_FIRST_BIT, IN_PLACE_BIT = tl.constexpr(V_FIRST), tl.constexpr(IN_PLACE)  # for kernels


@triton.jit
def decay_factor(x, dtype: tl.constexpr, PRECISE: tl.constexpr):
    """`e^x`. PRECISE: correctly rounded.

    The hardware's `exp2` is off by up to two steps of float32, and a decay acts many times.
    """
    if PRECISE:
        return tl.exp(x.to(tl.float64)).to(dtype)
    else:
        return tl.exp2(x.to(tl.float32) * LOG2E).to(dtype)


@triton.jit
def _locate_state(indices, i_n, i_h, H, P):
    """Where a program finds its state in the pool (64 bits), whether it has one (1 or 0), and its outputs if not."""
    if indices is None:
        i_pool = i_n
        is_live = 1
        idle_output = 0.0
    else:
        i_pool = tl.load(indices + i_n).to(tl.int64)
        is_live = tl.where((i_pool >= 0) & (i_pool < P), 1, 0)
        # NaN, because an index outside the pool must not look like a result
        idle_output = tl.where(i_pool < 0, 0.0, float("nan"))
        i_pool *= is_live
    return i_pool * H + i_h, is_live, idle_output


@triton.jit
def mask_if_positive(mask, number):
    """`mask` if `number` is positive, else no lanes.

    (A comparison of two numbers is no mask in the interpreter of Triton 3.9.)
    """
    return mask & (tl.zeros(mask.shape, tl.int32) < number)


@triton.jit(do_not_specialize=["T", "H", "P"])
def recurrent_forward_kernel(
    q, k, v, g, gk, gv, g_gamma, h0, o, ht, cu_seqlens, indices, scale, T, H, P,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`h0`: initial states `[N, H, K, V]`, or with `indices` a pool of P. FLAGS: V_FIRST and IN_PLACE, added up."""
    BK: tl.constexpr = (
        16 if K <= 16 else 32 if K <= 32 else 64 if K <= 64 else 128 if K <= 128 else 256 if K <= 256 else 512
    )
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    i_v, i_nh = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    # divisions of 32 bits, because those of 64 bits are slow
    i_state, i_n, i_h = i_nh.to(tl.int64), (i_nh // H).to(tl.int64), i_nh % H
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    if V_FIRST_BIT & FLAGS:
        o_S = o_v[None, :] * K + o_k[:, None]
    else:
        o_S = o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    i_pool, is_live, idle_output = _locate_state(indices, i_n, i_h, H, P)
    if h0 is None:
        b_S = tl.zeros([BK, BV], tl.float32)
    else:
        b_S = tl.load(h0 + i_pool * K * V + o_S, mask=mask_if_positive(m_S, is_live), other=0.0).to(tl.float32)
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    row, remaining = start * H + i_h, length
    n_q = tl.load(q + row * K + o_k, mask=mask_if_positive(m_k, remaining), other=0.0)
    n_k = tl.load(k + row * K + o_k, mask=mask_if_positive(m_k, remaining), other=0.0)
    n_v = tl.load(v + row * V + o_v, mask=mask_if_positive(m_v, remaining), other=0.0)
    if g is not None:
        n_g = tl.load(g + row, mask=remaining > 0, other=0.0)
    if gk is not None:
        n_gk = tl.load(gk + row * K + o_k, mask=mask_if_positive(m_k, remaining), other=0.0)
    if gv is not None:
        n_gv = tl.load(gv + row * V + o_v, mask=mask_if_positive(m_v, remaining), other=0.0)
    if g_gamma is not None:
        gamma = decay_factor(tl.load(g_gamma + i_h), tl.float32, True)
    for _ in range(0, length):
        row_now, row, remaining = row, row + H, remaining - 1
        b_q, b_k, b_v = n_q.to(tl.float32), n_k.to(tl.float32), n_v.to(tl.float32)
        n_q = tl.load(q + row * K + o_k, mask=mask_if_positive(m_k, remaining), other=0.0)
        n_k = tl.load(k + row * K + o_k, mask=mask_if_positive(m_k, remaining), other=0.0)
        n_v = tl.load(v + row * V + o_v, mask=mask_if_positive(m_v, remaining), other=0.0)
        if g is not None:
            b_S *= decay_factor(n_g, tl.float32, PRECISE)
            n_g = tl.load(g + row, mask=remaining > 0, other=0.0)
        if g_gamma is not None:
            b_S *= gamma
        if gk is not None:
            b_S *= decay_factor(n_gk, tl.float32, PRECISE)[:, None]
            n_gk = tl.load(gk + row * K + o_k, mask=mask_if_positive(m_k, remaining), other=0.0)
        if gv is not None:
            b_S *= decay_factor(n_gv, tl.float32, PRECISE)[None, :]
            n_gv = tl.load(gv + row * V + o_v, mask=mask_if_positive(m_v, remaining), other=0.0)
        b_S += b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_S * b_q[:, None], 0) * scale
        if indices is not None:
            b_o = tl.where(is_live > 0, b_o, idle_output)
        tl.store(o + row_now * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    if IN_PLACE_BIT & FLAGS:
        tl.store(h0 + i_pool * K * V + o_S, b_S, mask=mask_if_positive(m_S, is_live))
    elif ht is not None:
        if indices is not None:
            b_S = tl.where(is_live > 0, b_S, idle_output)
        tl.store(ht + i_state * K * V + o_S, b_S, mask=m_S)


def fill_outputs(
    problem: Problem,
    o: Tensor,
    ht: Tensor | None,
    state_indices: Tensor | None = None,
    *,
    in_place: bool = False,
    v_first: bool = False,
) -> None:
    """Fills `o`, and `ht` or, in place, the initial states. The problem must have passed `check_supported`."""
    q, v, states = problem.q, problem.v, problem.initial_state
    N, H, K, V = problem.state_shape
    grid, launch = _plan(N * H, K, V, V_FIRST * v_first + IN_PLACE * in_place)
    arguments = (q, problem.k, v, problem.g, problem.gk, problem.gv, problem.g_gamma, states, o, ht)
    arguments += (problem.cu_seqlens, state_indices, problem.scale, q.shape[1], H)
    launch(grid, (*arguments, 1 if states is None else states.shape[0]))


def forward(problem: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """`o` in the problem's output dtype, and the final state in float32 or None.

    The problem must have passed `check_supported`.
    """
    o = empty_as(problem.v, problem.output_dtype)
    ht = problem.q.new_empty(problem.state_shape, dtype=torch.float32) if output_final_state else None
    fill_outputs(problem, o, ht)
    return o, ht


@functools.lru_cache(maxsize=4096)
def _plan(states: int, K: int, V: int, flags: int) -> tuple[int, Launcher]:
    """Programs, and the launcher."""
    BV, warps = choose_tile(states, K, V)
    constants = {"K": K, "V": V, "BV": BV, "FLAGS": flags}
    return ceil_div(V, BV) * states, launcher_of(recurrent_forward_kernel, constants, warps, 1)


def choose_tile(states: int, K: int, V: int) -> tuple[int, int]:
    """Value columns BV and warps of a program.

    Rows of 128 bytes and 32 registers of state a thread where there are enough states; fewer columns where that fills
    more of the GPU. Shapes alone decide; the number of tokens plays no part.
    """
    BK = max(16, 1 << (K - 1).bit_length())  # plain Python, because Triton's helpers take microseconds on the host
    widest = max(16, 1 << (V - 1).bit_length())
    BV = min(widest, 32 if BK == 256 else max(16, min(64, 4096 // BK)))
    while BV > 16 and states * -(-V // BV) < FULL_GPU_PROGRAMS:
        BV //= 2
    return BV, max(1, min(4, BK * BV // 1024))


def step(
    problem: Problem, state_indices: Tensor | None, output_final_state: bool, in_place: bool, v_first: bool
) -> tuple[Tensor, Tensor | None]:
    """`o`, and the final states or None where they are written in place.

    With `state_indices`, `problem.initial_state` is a pool. ValueError for what the kernel does not cover.
    """
    check_supported(problem)
    q, v = problem.q, problem.v
    o = empty_as(v, problem.output_dtype)
    N, H, K, V = problem.state_shape
    ht = None
    if output_final_state and not in_place:
        ht = q.new_empty((N, H, V, K) if v_first else (N, H, K, V), dtype=torch.float32)
    fill_outputs(problem, o, ht, state_indices, in_place=in_place, v_first=v_first)
    return o, ht


def check_supported(problem: Problem) -> None:
    """Raises ValueError unless the recurrent kernels cover the problem."""
    dtype, K = problem.q.dtype, problem.q.shape[-1]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"the Triton backend takes float16, bfloat16 and float32, got q of {dtype}; use backend='torch'"
        )
    if K > MAX_KEY_DIM:
        raise ValueError(
            f"the Triton backend takes head dimensions K up to {MAX_KEY_DIM}, got K = {K} (of q); use backend='torch'"
        )
