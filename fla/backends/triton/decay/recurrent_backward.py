"""The backward of the `decay` family token by token, for every head size, dtype and combination of decays.

No state is stored. A program has one of four roles. It walks a sequence with a tile of the state in registers, and
makes one vector for each token, while the vectors of the next token are loaded. The roles forward in time compute

    S   <- decay S + a b^T
    out  = scale S x

and the roles in reverse

    dS  <- dS + scale a b^T
    out  = dS x
    dS  <- decay dS

    role    direction    a     b     x     rows of the state
    dq      forward      k     v     do    keys
    o       forward      v     k     q     values
    dk      reverse      q     do    v     keys
    dv      reverse      do    q     k     values

so that every sum runs along a row. A tile has at most SLICE columns: longer rows are cut, and their partial sums are
added up afterwards in a fixed order.

Gate gradients are suffix sums of products: `q dq - k dk` by key channel (`gate_gradient.py` derives this) and, in the
same way, `o do - v dv` by value channel. These are differences of large sums, which need more digits than the rest. So
the sums are float64, and float32 inputs are computed in float64 where a gate needs its gradient: the error budget then
holds at any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.backends.decay import Problem, combine
from fla.backends.triton._launch import ceil_div, empty_as, launch
from fla.backends.triton._lib import DEAD_LOG_DECAY
from fla.backends.triton._sequence import sequence_bounds
from fla.backends.triton.decay.recurrent_forward import decay_factor, mask_if_positive

TILE = tl.constexpr(32)  # rows of a tile of the state
SLICE = tl.constexpr(128)  # columns of a tile of the state, at most
BT, BD = tl.constexpr(32), tl.constexpr(32)  # tokens and channels of a block of `gate_kernel`


@triton.jit
def _walk_sequence(
    a, b, x, g, ga, gb, s0, out, end_term, s_end, row, stride, length, scale, o_r, o_c,
    A: tl.constexpr, B: tl.constexpr, W: tl.constexpr, ROLE: tl.constexpr,
):  # fmt: skip
    """One role. `a` and the gate `ga` are `[tokens, A]`; `b`, `x` and `gb` are `[tokens, B]`; `out` is `[tokens, W]`.

    `out` points at the role's first column. `s0` is the state where the walk begins. In reverse, the state where it
    ends is written to `s_end`. Forward in time, `s_end` is the gradient dS of the final state, and <S, dS> is written
    to `end_term` `[A]`, a number for each row. Names with n_ hold what was loaded for the next token.
    """
    REVERSE: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    PRECISE: tl.constexpr = a.dtype.element_ty == tl.float32
    ACC: tl.constexpr = out.dtype.element_ty
    m_r, m_c = o_r < A, o_c < B
    m_S = m_r[:, None] & m_c[None, :]
    if ROLE == "dq" or ROLE == "dk":  # rows are keys
        o_S = o_r[:, None] * B + o_c[None, :]
    else:
        o_S = o_c[None, :] * A + o_r[:, None]
    b_S = tl.zeros([o_r.shape[0], o_c.shape[0]], ACC)
    if s0 is not None:
        b_S += tl.load(s0 + o_S, mask=m_S, other=0.0).to(ACC)
    remaining = length
    n_a = tl.load(a + row * A + o_r, mask=mask_if_positive(m_r, remaining), other=0.0)
    n_b = tl.load(b + row * B + o_c, mask=mask_if_positive(m_c, remaining), other=0.0)
    n_x = tl.load(x + row * B + o_c, mask=mask_if_positive(m_c, remaining), other=0.0)
    if g is not None:
        n_g = tl.load(g + row, mask=remaining > 0, other=0.0)
    if ga is not None:
        n_ga = tl.load(ga + row * A + o_r, mask=mask_if_positive(m_r, remaining), other=0.0)
    if gb is not None:
        n_gb = tl.load(gb + row * B + o_c, mask=mask_if_positive(m_c, remaining), other=0.0)
    for _ in range(0, length):
        b_a, b_b, b_x, row_now = n_a.to(ACC), n_b.to(ACC), n_x.to(ACC), row
        row, remaining = row + stride, remaining - 1
        n_a = tl.load(a + row * A + o_r, mask=mask_if_positive(m_r, remaining), other=0.0)
        n_b = tl.load(b + row * B + o_c, mask=mask_if_positive(m_c, remaining), other=0.0)
        n_x = tl.load(x + row * B + o_c, mask=mask_if_positive(m_c, remaining), other=0.0)
        if REVERSE:
            b_S += (b_a * scale)[:, None] * b_b[None, :]
            tl.store(out + row_now * W + o_r, tl.sum(b_S * b_x[None, :], 1), mask=m_r)
        if g is not None:
            b_S *= decay_factor(n_g, ACC, PRECISE)
            n_g = tl.load(g + row, mask=remaining > 0, other=0.0)
        if ga is not None:
            b_S *= decay_factor(n_ga, ACC, PRECISE)[:, None]
            n_ga = tl.load(ga + row * A + o_r, mask=mask_if_positive(m_r, remaining), other=0.0)
        if gb is not None:
            b_S *= decay_factor(n_gb, ACC, PRECISE)[None, :]
            n_gb = tl.load(gb + row * B + o_c, mask=mask_if_positive(m_c, remaining), other=0.0)
        if not REVERSE:
            b_S += b_a[:, None] * b_b[None, :]
            tl.store(out + row_now * W + o_r, tl.sum(b_S * b_x[None, :], 1) * scale, mask=m_r)
    if REVERSE:
        if s_end is not None:
            tl.store(s_end + o_S, b_S.to(s_end.dtype.element_ty), mask=m_S)
    elif end_term is not None:
        b_dS = tl.load(s_end + o_S, mask=m_S, other=0.0).to(ACC)
        tl.store(end_term + o_r, tl.sum(b_S * b_dS, 1), mask=m_r)


@triton.jit(do_not_specialize=["T", "H"])
def recurrent_backward_kernel(
    q, k, v, g, gk, gv, do, h0, dht, dh0, forward_rows, reverse_rows, end_term, cu_seqlens, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, WITH_O: tl.constexpr,
):  # fmt: skip
    """Fills the partial sums of dq, dk, dv, and WITH_O of o.

    `forward_rows` `[B, T, H, FORWARD_WIDTH]`: partial dq, for one slice of V after the other; WITH_O, then partial o,
    for one slice of K after the other. `reverse_rows`: partial dk and dv likewise. `end_term` `[N, H, FORWARD_WIDTH]`:
    the end terms of the gate gradients, in the columns of `forward_rows`.
    """
    NRK: tl.constexpr = (K + TILE - 1) // TILE
    NRV: tl.constexpr = (V + TILE - 1) // TILE
    NSK: tl.constexpr = (K + SLICE - 1) // SLICE
    NSV: tl.constexpr = (V + SLICE - 1) // SLICE
    CK: tl.constexpr = 16 if K <= 16 else 32 if K <= 32 else 64 if K <= 64 else SLICE
    CV: tl.constexpr = 16 if V <= 16 else 32 if V <= 32 else 64 if V <= 64 else SLICE
    REVERSE_WIDTH: tl.constexpr = NSV * K + NSK * V
    FORWARD_WIDTH: tl.constexpr = REVERSE_WIDTH if WITH_O else NSV * K
    KEYS: tl.constexpr = NRK * NSV  # programs of a role whose rows are key channels; VALUES: value channels
    VALUES: tl.constexpr = NRV * NSK
    ROLES: tl.constexpr = (2 if WITH_O else 1) * (KEYS + VALUES) + (0 if WITH_O else KEYS)
    i_role = tl.program_id(0) % ROLES
    i_nh = tl.program_id(0) // ROLES
    i_state, i_n, i_h = i_nh.to(tl.int64), (i_nh // H).to(tl.int64), i_nh % H
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    first = start * H + i_h
    last = first + (length - 1) * H.to(tl.int64)
    if h0 is not None:
        h0 += i_state * K * V
    if dht is not None:
        dht += i_state * K * V
    if dh0 is not None:
        dh0 += i_state * K * V
    if end_term is not None:
        end_term += i_state * FORWARD_WIDTH
    o_R = tl.arange(0, TILE)
    if i_role < 2 * KEYS:
        i = i_role % KEYS
        o_r, o_c, column = (i % NRK) * TILE + o_R, (i // NRK) * SLICE + tl.arange(0, CV), (i // NRK) * K
        if i_role < KEYS:
            if end_term is not None:
                end_term += column
            _walk_sequence(
                k, v, do, g, gk, gv, h0, forward_rows + column, end_term, dht, first, H, length, scale, o_r, o_c,
                K, V, FORWARD_WIDTH, "dq",
            )  # fmt: skip
        else:
            _walk_sequence(
                q, do, v, g, gk, gv, dht, reverse_rows + column, None, dh0, last, -H, length, scale, o_r, o_c,
                K, V, REVERSE_WIDTH, "dk",
            )  # fmt: skip
    else:
        j = (i_role - 2 * KEYS) % VALUES
        o_rv, o_ck, value_column = (
            (j % NRV) * TILE + o_R,
            (j // NRV) * SLICE + tl.arange(0, CK),
            NSV * K + (j // NRV) * V,
        )
        if i_role < 2 * KEYS + VALUES:
            _walk_sequence(
                do, q, k, g, gv, gk, dht, reverse_rows + value_column, None, None, last, -H, length, scale, o_rv, o_ck,
                V, K, REVERSE_WIDTH, "dv",
            )  # fmt: skip
        elif WITH_O:
            if end_term is not None:
                end_term += value_column
            _walk_sequence(
                v, k, q, g, gv, gk, h0, forward_rows + value_column, end_term, dht, first, H, length, scale, o_rv, o_ck,
                V, K, FORWARD_WIDTH, "o",
            )  # fmt: skip


@triton.jit
def _sum_of_slices(p, mask, D: tl.constexpr, SLICES: tl.constexpr):
    """The sum of SLICES partial results, each `[D]`, in order."""
    b_x = tl.load(p, mask=mask, other=0.0)
    for i in tl.static_range(1, SLICES):
        b_x += tl.load(p + i * D, mask=mask, other=0.0)
    return b_x


@triton.jit(do_not_specialize=["T", "H"])
def gate_kernel(
    x, forward_rows, y, reverse_rows, end_term, gate, dg, cu_seqlens, T, H, COLUMN: tl.constexpr, D: tl.constexpr,
    FORWARD_WIDTH: tl.constexpr, REVERSE_WIDTH: tl.constexpr, SLICES: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """dg of a block of channels, or for SCALAR of all channels together:

        dg_t = sum_{s >= t} (x forward_rows - y reverse_rows)_s + end_term

    dg_t is 0 where the gate is below -16 nats. The partial results begin at column COLUMN.
    """
    NB: tl.constexpr = (D + BD - 1) // BD
    i_nh = tl.program_id(0) // (1 if SCALAR else NB)
    i_state, i_n, i_h = i_nh.to(tl.int64), (i_nh // H).to(tl.int64), i_nh % H
    start, length = sequence_bounds(cu_seqlens, i_n, T)
    b_sum = tl.zeros([BD], tl.float64)
    if SCALAR:
        b_sum = tl.sum(b_sum, 0)
    for j in tl.static_range(NB if SCALAR else 1):
        o_d = (j if SCALAR else tl.program_id(0) % NB) * BD + tl.arange(0, BD)
        if end_term is not None:
            b_c = _sum_of_slices(end_term + i_state * FORWARD_WIDTH + COLUMN + o_d, o_d < D, D, SLICES).to(tl.float64)
            if SCALAR:
                b_sum += tl.sum(b_c, 0)
            else:
                b_sum += b_c
    for i_t in range(0, tl.cdiv(length, BT)):
        o_t = length - 1 - i_t * BT - tl.arange(0, BT)  # backwards, so that the running sum is the suffix sum
        m_t, row = o_t >= 0, (start + o_t) * H + i_h
        if SCALAR:
            b_r = tl.zeros([BT], tl.float64)  # not [BT, 1]: a running sum of one column does not compile
        else:
            b_r = tl.zeros([BT, BD], tl.float64)
        for j in tl.static_range(NB if SCALAR else 1):
            o_e = (j if SCALAR else tl.program_id(0) % NB) * BD + tl.arange(0, BD)
            mask = m_t[:, None] & (o_e < D)[None, :]
            b_x = tl.load(x + row[:, None] * D + o_e[None, :], mask=mask, other=0.0).to(tl.float64)
            b_y = tl.load(y + row[:, None] * D + o_e[None, :], mask=mask, other=0.0).to(tl.float64)
            b_x *= _sum_of_slices(
                forward_rows + row[:, None] * FORWARD_WIDTH + COLUMN + o_e[None, :], mask, D, SLICES
            ).to(tl.float64)
            b_y *= _sum_of_slices(
                reverse_rows + row[:, None] * REVERSE_WIDTH + COLUMN + o_e[None, :], mask, D, SLICES
            ).to(tl.float64)
            if SCALAR:
                b_r += tl.sum(b_x - b_y, 1)
            else:
                b_r += b_x - b_y
        if SCALAR:
            b_dg, o_g, m_g = b_sum + tl.cumsum(b_r, 0), row, m_t
        else:
            b_dg, o_g, m_g = b_sum[None, :] + tl.cumsum(b_r, 0), row[:, None] * D + o_e[None, :], mask
        b_sum += tl.sum(b_r, 0)
        b_g = tl.load(gate + o_g, mask=m_g, other=0.0).to(tl.float32)
        b_dg = tl.where(b_g < DEAD_LOG_DECAY, 0.0, b_dg.to(tl.float32))
        tl.store(dg + o_g, b_dg.to(dg.dtype.element_ty), mask=m_g)


def backward(problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool) -> dict[str, Tensor]:
    """All gradients, those of gates like the gates. A constant decay has no gradient of its own: if it needs one, it
    comes as `g`.
    """
    q, k, v, gk, gv = problem.q, problem.k, problem.v, problem.gk, problem.gv
    N, H, K, V = problem.state_shape
    g, g_gamma = combine(problem.g, problem.g_gamma)
    if g_gamma is not None:
        g = g_gamma.expand(q.shape[:3]).contiguous()
    needs_gates = needs_gates and (problem.g is not None or gk is not None or gv is not None)
    with_o = needs_gates and gv is not None
    wide = torch.float64 if needs_gates and q.dtype == torch.float32 else torch.float32
    key_slices, value_slices = ceil_div(K, SLICE.value), ceil_div(V, SLICE.value)
    value_column = value_slices * K  # the columns before it belong to key channels, those from it on to value channels
    reverse_rows = q.new_empty((*q.shape[:3], value_column + key_slices * V), dtype=wide)
    forward_rows = empty_as(reverse_rows) if with_o else q.new_empty((*q.shape[:3], value_column), dtype=wide)
    end_term = q.new_empty((N, H, forward_rows.shape[-1]), dtype=wide) if needs_gates and dht is not None else None
    dh0 = None if problem.initial_state is None else q.new_empty(problem.state_shape, dtype=torch.float32)
    keys = ceil_div(K, TILE.value) * value_slices
    values = ceil_div(V, TILE.value) * key_slices
    roles = 2 * keys + (2 if with_o else 1) * values
    arguments = (q, k, v, g, gk, gv, do, problem.initial_state, dht, dh0, forward_rows, reverse_rows, end_term)
    arguments += (problem.cu_seqlens, problem.scale, q.shape[1], H)
    warps = 4 if wide == torch.float64 else 2
    launch(recurrent_backward_kernel, N * H * roles, arguments, {"K": K, "V": V, "WITH_O": with_o}, warps, 1)
    found = {
        "q": _sum(forward_rows[..., :value_column], value_slices, q.dtype),
        "k": _sum(reverse_rows[..., :value_column], value_slices, k.dtype),
        "v": _sum(reverse_rows[..., value_column:], key_slices, v.dtype),
    }
    if dh0 is not None:
        found["initial_state"] = dh0
    if needs_gates:
        partial = (problem, forward_rows, reverse_rows, end_term)
        if problem.g is not None:
            found["g"] = _gate_gradient(problem.g, q, k, *partial, 0, value_slices)
        if gk is not None:
            found["gk"] = _gate_gradient(gk, q, k, *partial, 0, value_slices)
        if gv is not None:
            found["gv"] = _gate_gradient(gv, do, v, *partial, value_column, key_slices)
    return found


def _sum(partial: Tensor, slices: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, H, slices * D]` -> `[B, T, H, D]`."""
    parts = partial.unflatten(-1, (slices, -1)).unbind(-2)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(dtype).contiguous()


def _gate_gradient(
    gate: Tensor, x: Tensor, y: Tensor, problem: Problem, forward_rows, reverse_rows, end_term, column, slices
) -> Tensor:
    N, H = problem.state_shape[:2]
    D, scalar = x.shape[-1], gate.dim() == 3
    dg = empty_as(gate)
    arguments = (x, forward_rows, y, reverse_rows, end_term, gate, dg, problem.cu_seqlens, problem.q.shape[1], H)
    constants = {
        "COLUMN": column,
        "D": D,
        "FORWARD_WIDTH": forward_rows.shape[-1],
        "REVERSE_WIDTH": reverse_rows.shape[-1],
        "SLICES": slices,
    }
    launch(
        gate_kernel, N * H * (1 if scalar else ceil_div(D, BD.value)), arguments, constants | {"SCALAR": scalar}, 4, 1
    )
    return dg
