"""The decays inside a chunk of C tokens: running sums `G`, their last value, and the vector kind's operands.

Scalar kinds (none, constant, per token): `G` is `[C]`. Vector kind (per key channel): `G` is `[C, BK]`, held relative
to the chunk's middle `m = G_{C/2}`, so that both `exp(G - m)` and `exp(m - G)` stay in range up to RANGE nats per
half chunk (kernels.md 1.2). A head that decays faster anywhere is flagged on the way and done again by the same
kernel with chunks of 16 tokens, where a step clamped at
-10 nats always fits (what the clamp lets through is below 5e-5 of what was there).
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import INTERPRETED, LOG2E, MIN_LOG_DECAY, log2_decay

CHUNK = tl.constexpr(64)  # tokens a chunk
SHORT = tl.constexpr(16)  # tokens a chunk where a vector decay is too strong for one middle
TILE = tl.constexpr(64)  # channels of a tile of K or V
NONE, CONSTANT, SCALAR, VECTOR = (tl.constexpr(i) for i in range(4))  # the decay kinds


@triton.jit
def scalar_decay(g, row, m_t, i_h, count, KIND: tl.constexpr):
    """`G` `[C]` and its last value for the scalar kinds; `count` tokens are left. Rows after the end repeat the last
    value."""
    o_c = tl.arange(0, CHUNK)
    if KIND == NONE:
        b_G = tl.zeros([CHUNK], tl.float32)
        total = 0.0
    elif KIND == CONSTANT:
        step = log2_decay(tl.load(g + i_h))
        b_G = step * tl.minimum(o_c + 1, count).to(tl.float32)
        total = step * tl.minimum(CHUNK, count).to(tl.float32)
    else:
        b_w = log2_decay(tl.load(g + row, mask=m_t, other=0.0))
        b_G = tl.cumsum(b_w, 0)
        total = tl.sum(b_w, 0)
    return b_G, total


@triton.jit
def decayed(b_P, b_G, m_pair, KIND: tl.constexpr, TRANSPOSED: tl.constexpr):
    """`P_ij exp(G_i - G_j)` where `m_pair`, else 0; `[j, i]` when TRANSPOSED."""
    if KIND != NONE:
        if TRANSPOSED:
            b_D = b_G[None, :] - b_G[:, None]
        else:
            b_D = b_G[:, None] - b_G[None, :]
        b_P = b_P * tl.exp2(tl.where(m_pair, b_D, 0.0))
    return tl.where(m_pair, b_P, 0.0)


@triton.jit
def vector_decay(b_g, C: tl.constexpr):
    """Of a gate tile `[C, BK]`: `G - m` `[C, BK]`, `m` and the chunk's total `[BK]`, all log2.

    The running sum is a product with a matrix of 0 and +-1: exact for 16-bit gates, float32 ones enter as high and low
    halves. (A running sum along the token axis is several times slower.)"""
    o_c = tl.arange(0, C)
    first = o_c < C // 2
    b_w = tl.maximum(b_g.to(tl.float32), MIN_LOG_DECAY if C == CHUNK else MIN_LOG_DECAY / 2)
    b_A = (o_c[:, None] >= o_c[None, :]).to(tl.float32) - first[None, :].to(tl.float32)
    if INTERPRETED:
        b_Gm = tl.dot(b_A, b_w)
    elif b_g.dtype == tl.float16:
        b_Gm = tl.dot(b_A.to(tl.float16), b_w.to(tl.float16))
    else:
        b_high = b_w.to(tl.bfloat16)
        b_Gm = tl.dot(b_A.to(tl.bfloat16), b_high)
        if b_g.dtype != tl.bfloat16:
            b_Gm = tl.dot(b_A.to(tl.bfloat16), (b_w - b_high.to(tl.float32)).to(tl.bfloat16), acc=b_Gm)
    b_m = tl.sum(tl.where(first[:, None], b_w, 0.0), 0)
    return b_Gm * LOG2E, b_m * LOG2E, tl.sum(b_w, 0) * LOG2E


@triton.jit
def flag_far(far, i_state, b_m, b_total, RANGE: tl.constexpr):
    """Note in `far` that a chunk of this state decays by more than RANGE nats on a side of its middle: its results
    are void."""
    reach = tl.max(tl.maximum(tl.abs(b_m), tl.abs(b_total - b_m)), 0)
    if reach > RANGE * LOG2E:
        tl.store(far + i_state, 1)


def kind_of(problem: Problem) -> tuple[int, torch.Tensor | None]:
    """The decay kind of a chunked problem, and its gate tensor."""
    if problem.gk is not None:
        return VECTOR.value, problem.gk
    if problem.g is not None:
        return SCALAR.value, problem.g
    if problem.g_gamma is not None:
        return CONSTANT.value, problem.g_gamma
    return NONE.value, None


def padded(size: int) -> int:
    """The tile that holds a head dimension: tiles below 64 are unsafe on Hopper."""
    return max(64, triton.next_power_of_2(size))


def run_vector_kernel(kernel, grid: tuple[int], arguments: tuple, problem: Problem, stages: int, **constants) -> None:
    """Run a vector kernel on every head, then with short chunks on the heads that it flagged (known to the device
    alone)."""
    far = torch.zeros(problem.num_states * problem.q.shape[2], dtype=torch.int32, device=problem.q.device)
    arguments = (*arguments, far, problem.scale, *problem.q.shape[1:3])
    span = 8.0 if problem.q.dtype == torch.float16 else 80.0  # nats: fp16 ends at e^11, bf16 and float32 at e^88
    kernel[grid](*arguments, **constants, RANGE=span, num_warps=4, num_stages=stages)
    kernel[grid](*arguments, **constants, RANGE=None, num_warps=4, num_stages=1)
