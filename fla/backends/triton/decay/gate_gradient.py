"""The last step of a gate gradient: from rows `r_t` (what the dq role left, minus what the dk role left) to

    dg_t = sum_{s >= t} r_s + change          0 where g_t < -16 nats

A program walks a sequence of one head backwards, for one block of channels (scalar kinds: the only one, and `r` is
the sum of the roles' tiles). The running sum is float64: over long sequences it is a small difference of large terms.
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import DEAD_LOG_DECAY, sequence

BT = tl.constexpr(64)


@triton.jit(do_not_specialize=["T", "H"])
def gate_gradient_kernel(g, rows, change, dg, cu_seqlens, T, H, D: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr):
    i_state = tl.program_id(0).to(tl.int64) // tl.cdiv(D, BD)
    i_n, i_h = i_state // H, i_state % H
    o_d = (tl.program_id(0) % tl.cdiv(D, BD)) * BD + tl.arange(0, BD)
    m_d = o_d < D
    start, length = sequence(cu_seqlens, i_n, T)
    b_sum = tl.load(change + i_state * D + o_d, mask=m_d, other=0.0).to(tl.float64)
    for i_t in range(0, tl.cdiv(length, BT)):
        o_t = length - 1 - i_t * BT - tl.arange(0, BT)  # backwards, so that a plain running sum is the suffix sum
        mask = (o_t >= 0)[:, None] & m_d[None, :]
        row = (start + o_t) * H + i_h
        b_r = tl.zeros([BT, BD], tl.float32)
        for i in tl.static_range(TILES):
            p_row = rows + row[:, None] * (2 * TILES * D) + o_d[None, :]
            b_r += tl.load(p_row + i * D, mask=mask, other=0.0) - tl.load(p_row + (TILES + i) * D, mask=mask, other=0.0)
        b_dg = (b_sum[None, :] + tl.cumsum(b_r, 0).to(tl.float64)).to(tl.float32)
        b_g = tl.load(g + row[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_dg = tl.where(b_g < DEAD_LOG_DECAY, 0.0, b_dg)
        tl.store(dg + row[:, None] * D + o_d[None, :], b_dg.to(dg.dtype.element_ty), mask=mask)
        b_sum += tl.sum(b_r, 0).to(tl.float64)


class GateTerms:
    """What a backward kernel leaves for the gate gradient, in one float32 buffer: `change` `[N, H, K]`, which is
    rowsum(S_T * dS_T), and `rows` `[B, T, H, width]` (for the vector kind `[B, T, H, 2, K]`)."""

    def __init__(self, problem: Problem, width: int, dht: torch.Tensor | None):
        N, H, K, _ = problem.state_shape
        tokens = problem.q.shape[:3]
        self.buffer = problem.q.new_empty(N * H * K + tokens.numel() * width, dtype=torch.float32)
        self.change = self.buffer[: N * H * K].view(N, H, K)
        self.rows = self.buffer[N * H * K :].view(*tokens, width)
        if dht is None:
            self.change.zero_()


def close_gate_gradient(problem: Problem, gate: torch.Tensor, rows: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """dg like `gate`, of `rows` `[B, T, H, 2 * TILES]` (scalar) or `[B, T, H, 2, D]` and `change` `[N, H(, D)]`."""
    scalar = gate.dim() == 3
    D, tiles = (1, rows.shape[-1] // 2) if scalar else (gate.shape[-1], 1)
    BD = 1 if scalar else min(64, triton.next_power_of_2(D))
    N, H = problem.state_shape[:2]
    dg = torch.empty_like(gate)
    grid = (N * H * triton.cdiv(D, BD),)
    gate_gradient_kernel[grid](
        gate, rows, change, dg, problem.cu_seqlens, problem.q.shape[1], H, D=D, BD=BD, TILES=tiles, num_warps=4
    )
    return dg
