"""The decays inside a chunk of C tokens: running sums `G`, their last value, and the vector kind's operands.

Scalar kinds (none, constant, per token): `G` is `[C]`. Vector kind (per key channel): `G` is `[C, BK]`, held relative to the chunk's
middle `m = G_{C/2}`, so that both `exp(G - m)` and `exp(m - G)` stay in range up to RANGE nats per half chunk (kernels.md 1.2).
"""

import torch
import triton
import triton.language as tl

from fla.backends.decay import Problem
from fla.backends.triton._lib import INTERPRETED, LOG2E, MIN_LOG_DECAY, log2_decay

C = tl.constexpr(64)  # tokens a chunk
NONE, CONSTANT, SCALAR, VECTOR = (tl.constexpr(i) for i in range(4))  # the decay kinds


@triton.jit
def scalar_decay(g, row, m_t, i_h, count, KIND: tl.constexpr):
    """`G` `[C]` and its last value for the scalar kinds; `count` tokens are left. Rows after the end repeat the last value."""
    o_c = tl.arange(0, C)
    if KIND == NONE:
        b_G = tl.zeros([C], tl.float32)
        total = 0.0
    elif KIND == CONSTANT:
        step = log2_decay(tl.load(g + i_h))
        b_G = step * tl.minimum(o_c + 1, count).to(tl.float32)
        total = step * tl.minimum(C, count).to(tl.float32)
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
def vector_decay(b_g, RANGE: tl.constexpr):
    """Of a gate tile `[C, BK]`: `G - m` `[C, BK]`, `m` and the chunk's total `[BK]`, the pivots of queries and keys, and whether
    the chunk is out of range. In range both pivots are `m`; out of range queries count from the chunk's start and keys to its end,
    which keeps every exponent negative, and scores are formed pair by pair."""
    o_c = tl.arange(0, C)
    b_w = tl.maximum(b_g.to(tl.float32), MIN_LOG_DECAY)
    first = o_c < C // 2
    b_A = (o_c[:, None] >= o_c[None, :]).to(tl.float32) - first[None, :].to(tl.float32)
    # running sum as a product with a matrix of 0 and +-1: exact for bf16 gates, others as high and low halves
    if INTERPRETED:
        b_Gm = tl.dot(b_A, b_w)
    else:
        b_high = b_w.to(tl.bfloat16)
        b_Gm = tl.dot(b_A.to(tl.bfloat16), b_high)
        if b_g.dtype != tl.bfloat16:
            b_Gm = tl.dot(b_A.to(tl.bfloat16), (b_w - b_high.to(tl.float32)).to(tl.bfloat16), acc=b_Gm)
    b_Gm = b_Gm * LOG2E
    b_m = tl.sum(tl.where(first[:, None], b_w, 0.0), 0) * LOG2E
    b_total = tl.sum(b_w, 0) * LOG2E
    far = tl.max(tl.maximum(tl.abs(b_m), tl.abs(b_total - b_m)), 0) > RANGE * LOG2E
    b_pq = tl.where(far, 0.0, b_m)
    b_pk = tl.where(far, b_total, b_m)
    return b_Gm, b_m, b_total, b_pq, b_pk, far


@triton.jit
def channel(p, row, m_t, i_d, D: tl.constexpr):
    """One channel of a chunk, `[C]` float32."""
    return tl.load(p + row * D + i_d, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def channel_ratio(g, row, m_t, i_k, m_pair, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """`exp(G_i - G_j)` of key channel `i_k`, `[C, C]`, 1 where not `m_pair`."""
    b_G = tl.cumsum(log2_decay(channel(g, row, m_t, i_k, K)), 0)
    if TRANSPOSED:
        b_D = b_G[None, :] - b_G[:, None]
    else:
        b_D = b_G[:, None] - b_G[None, :]
    return tl.exp2(tl.where(m_pair, b_D, 0.0))


@triton.jit
def far_scores(x, y, g, row, m_t, m_pair, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """`sum_k x_ak y_bk exp(G_i - G_j)` pair by pair, `[C, C]`: (x, y) is (q, k), or (k, q) when TRANSPOSED."""
    b_P = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K):
        b_E = channel_ratio(g, row, m_t, i_k, m_pair, K, TRANSPOSED)
        b_P += channel(x, row, m_t, i_k, K)[:, None] * channel(y, row, m_t, i_k, K)[None, :] * b_E
    return b_P


@triton.jit
def far_gradient(b_dP, y, g, row, m_t, m_pair, o_k, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """`sum_b dP_ab y_bk exp(G_i - G_j)` for the key channels `o_k`, `[C, BK]`: y is k for dq, q for dk (TRANSPOSED)."""
    b_d = tl.zeros([C, o_k.shape[0]], tl.float32)
    first = tl.min(o_k, 0)
    for i_k in range(first, tl.minimum(first + o_k.shape[0], K)):
        b_E = channel_ratio(g, row, m_t, i_k, m_pair, K, TRANSPOSED)
        b_column = tl.sum(b_dP * channel(y, row, m_t, i_k, K)[None, :] * b_E, 1)
        b_d += tl.where(o_k[None, :] == i_k, b_column[:, None], 0.0)
    return b_d


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


def safe_range(dtype: torch.dtype) -> float:
    """Nats that `exp` may span on either side of a chunk's middle in operands of `dtype` (fp16 ends at e^11)."""
    return 8.0 if dtype == torch.float16 else 80.0
