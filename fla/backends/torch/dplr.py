"""The family `dplr` in plain PyTorch: chunked and vectorised, for CPUs and any other device.

Inside a chunk, `G` is the running sum of the log decay, `E` the same without the token's own, and `G_C` its last row.
`S` is the state before the chunk, `S'` the state after it. `U` are the rows `a_t^T S_{t-1}`, which `b` writes. Scores
with a row of `a` are zero on and above the diagonal, those with a row of `q` above it:

    A_qk = (q_i . k_j) exp(G_i - G_j)    A_ak = (a_i . k_j) exp(E_i - G_j)    the same with b in place of k

Forward:

    U  = (I - A_ab)^-1 (e^E A S + A_ak V)
    O  = scale (e^G Q S + A_qk V + A_qb U)
    S' = e^{G_C} S + (e^{G_C - G} K)^T V + (e^{G_C - G} B)^T U

Backward, with `dO` scaled, `dW` the gradient of what the inverse multiplies, and `d(...)_A` what reaches an input
through the scores:

    dW = (I - A_ab)^-T (A_qb^T dO + e^{G_C - G} B dS')
    dS = e^{G_C} dS' + (e^G Q)^T dO + (e^E A)^T dW
    dA_qk = dO V^T    dA_qb = dO U^T    dA_ak = dW V^T    dA_ab = dW U^T
    dQ = dQ_A + e^G (dO S^T)              dA = dA_A + e^E (dW S^T)
    dK = dK_A + e^{G_C - G} (V dS'^T)     dB = dB_A + e^{G_C - G} (U dS'^T)
    dV = A_qk^T dO + A_ak^T dW + (e^{G_C - G} K) dS'
    dgk_t = sum over s >= t in the chunk of (q dq - k dk - b db)_s + sum over s > t of (a da)_s + rowsum(S' * dS')

All chunks are computed at once; only the states pass from chunk to chunk in a loop. Gates are summed in float64, so
that the exponentials are accurate however strong a decay is. All else is computed in float32 for 16-bit inputs, and in
float64 for others: where keys are alike, what the tokens of a chunk read and write cancels to a thousandth, and so do
the sums in a gate's gradient. Both forms are computed so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.backends._gates import DEAD_LOG_DECAY, MIN_LOG_DECAY
from fla.backends.dplr import Problem
from fla.backends.torch._layout import Layout
from fla.backends.torch._scores import Scores, pair_decay, scan, states_at_ends, sums_to_end
from fla.backends.torch._step import stepping

CHUNK = 64


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, None]:
    """Nothing is kept for the backward, which computes again what it needs."""
    chunks = _cut_into_chunks(problem)
    pairs = _Pairs(chunks)
    starts, values, final_state = _run_forward(problem, chunks, pairs)
    o = chunks.q_from_start @ starts
    o += pairs.qk.values() @ chunks.v
    o += pairs.qb.values() @ values
    o = (chunks.layout.join(o) * problem.scale).to(problem.output_dtype)
    return o, final_state.to(problem.state_dtype) if output_final_state else None, None


def backward(
    problem: Problem, saved: tuple, do: Tensor, dht: Tensor | None, needs: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Gradients in the dtype of the computation, which the caller casts."""
    needs_gates = problem.gk is not None and "gk" in needs
    chunks = _cut_into_chunks(problem)
    pairs = _Pairs(chunks)
    starts, values, final_state = _run_forward(problem, chunks, pairs)
    do = chunks.layout.split(do.to(chunks.q.dtype) * problem.scale)
    ends, dw, dh0 = _run_backward(problem, chunks, pairs, do, dht)

    dq, dk = pairs.qk.gradients(do @ chunks.v.mT)
    dq_of_b, db = pairs.qb.gradients(do @ values.mT)
    da, dk_of_a = pairs.ak.gradients(dw @ chunks.v.mT)
    da_of_b, db_of_a = pairs.ab.gradients(dw @ values.mT)
    dq = dq + dq_of_b + chunks.decayed(do @ starts.mT, chunks.from_start)
    da = da + da_of_b + chunks.decayed(dw @ starts.mT, chunks.from_start_before)
    dk = dk + dk_of_a + chunks.decayed(chunks.v @ ends.mT, chunks.to_end)
    db = db + db_of_a + chunks.decayed(values @ ends.mT, chunks.to_end)
    dv = pairs.qk.values().mT @ do + pairs.ak.values().mT @ dw + chunks.k_to_end @ ends
    dgk = None
    if needs_gates:
        read = chunks.a * da
        change = (states_at_ends(chunks.layout, starts, final_state) * ends).sum(-1)
        dgk = sums_to_end(chunks.q * dq - chunks.k * dk - chunks.b * db + read) - read + change[:, :, None]
    dq, dk, dv, da, db = (chunks.layout.join(x) for x in (dq, dk, dv, da, db))
    found: dict[str, Tensor | None] = {"q": dq, "k": dk, "v": dv, "a": da, "b": db, "initial_state": dh0}
    if dgk is not None and problem.gk is not None:
        dgk = chunks.layout.join(dgk)
        # the gradient of a stronger decay is rounding noise
        found["gk"] = dgk if problem.q.dtype == torch.float64 else dgk.masked_fill(problem.gk < DEAD_LOG_DECAY, 0.0)
    return found


step = stepping(forward)


@dataclass
class _Chunks:
    """A problem cut into chunks `[NC, H, C, K]`, `v` `[NC, H, C, V]`. Without gates all sums and factors are None."""

    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    log_decay: Tensor | None = None  # G in float64
    log_decay_before: Tensor | None = None  # E in float64
    from_start: Tensor | None = None  # e^G
    from_start_before: Tensor | None = None  # e^E
    to_end: Tensor | None = None  # e^{G_C - G}
    over_chunk: Tensor | None = None  # e^{G_C} [NC, H, K, 1], which multiplies states

    def __post_init__(self) -> None:
        self.q_from_start = self.decayed(self.q, self.from_start)
        self.a_from_start = self.decayed(self.a, self.from_start_before)
        self.k_to_end = self.decayed(self.k, self.to_end)
        self.b_to_end = self.decayed(self.b, self.to_end)

    @staticmethod
    def decayed(x: Tensor, factor: Tensor | None) -> Tensor:
        return x if factor is None else x * factor


def _cut_into_chunks(problem: Problem) -> _Chunks:
    dtype = torch.float32 if problem.q.dtype.itemsize == 2 else torch.float64
    layout = Layout(problem.q.shape, problem.cu_seqlens, problem.q.device, CHUNK)
    q, k, v, a, b = (layout.split(x.to(dtype)) for x in (problem.q, problem.k, problem.v, problem.a, problem.b))
    if problem.gk is None:
        return _Chunks(layout, q, k, v, a, b)
    gates = layout.split(problem.gk.double().clamp(min=MIN_LOG_DECAY))
    total = gates.cumsum(2)
    before, last = total - gates, total[:, :, -1:]
    factors = [x.exp().to(dtype) for x in (total, before, last - total, last.mT)]
    return _Chunks(layout, q, k, v, a, b, total, before, *factors)


class _Pairs:
    """The four kinds of scores, and the matrix `I - A_ab`."""

    def __init__(self, chunks: _Chunks) -> None:
        dtype = chunks.q.dtype
        inclusive = pair_decay(chunks.log_decay, dtype)
        before = pair_decay(chunks.log_decay, dtype, chunks.log_decay_before)
        self.qk: Scores = inclusive.between(chunks.q, chunks.k)
        self.qb: Scores = inclusive.between(chunks.q, chunks.b)
        self.ak: Scores = before.between(chunks.a, chunks.k, strict=True)
        self.ab: Scores = before.between(chunks.a, chunks.b, strict=True)
        self.system = -self.ab.values()  # its diagonal of ones is implied

    def solve(self, x: Tensor) -> Tensor:
        """`(I - A_ab)^-1 x`."""
        return torch.linalg.solve_triangular(self.system, x, upper=False, unitriangular=True)

    def solve_transposed(self, x: Tensor) -> Tensor:
        """`(I - A_ab)^-T x`."""
        return torch.linalg.solve_triangular(self.system.mT, x, upper=True, unitriangular=True)


def _run_forward(problem: Problem, chunks: _Chunks, pairs: _Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The state at the start of every chunk `[NC, H, K, V]`, the rows `U` `[NC, H, C, V]`, and the final states."""
    right = torch.cat((chunks.a_from_start, pairs.ak.values() @ chunks.v), -1)
    reads, values = pairs.solve(right).split((chunks.q.shape[-1], chunks.v.shape[-1]), -1)
    writes = chunks.k_to_end.mT @ chunks.v
    state = _copy_or_zeros(problem, problem.initial_state, chunks.q.dtype)
    return _scan(chunks, chunks.layout.steps(), state, reads, values, chunks.b_to_end, writes)


def _run_backward(
    problem: Problem, chunks: _Chunks, pairs: _Pairs, do: Tensor, dht: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the state at the end of every chunk, the rows `dW`, and the gradient of the initial states."""
    right = torch.cat((chunks.b_to_end, pairs.qb.values().mT @ do), -1)
    reads, values = pairs.solve_transposed(right).split((chunks.q.shape[-1], chunks.v.shape[-1]), -1)
    writes = chunks.q_from_start.mT @ do
    state = _copy_or_zeros(problem, dht, chunks.q.dtype)
    return _scan(chunks, chunks.layout.steps()[::-1], state, reads, values, chunks.a_from_start, writes)


def _scan(
    chunks: _Chunks,
    steps: list[tuple[Tensor, Tensor]],
    state: Tensor,
    reads: Tensor,
    values: Tensor,
    keys: Tensor,
    writes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`X = values + reads S`, then `S <- e^{G_C} S + writes + keys^T X`, chunk by chunk: the loop of both directions.

    Returns the state that every chunk found, every X, and the last states.
    """
    values = values.contiguous()
    found = torch.empty_like(writes)

    def advance(chunk: Tensor, current: Tensor) -> Tensor:
        x = values[chunk] + reads[chunk] @ current
        values[chunk] = x
        kept = current if chunks.over_chunk is None else chunks.over_chunk[chunk] * current
        return kept + writes[chunk] + keys[chunk].mT @ x

    found, state = scan(steps, found, state, advance)
    return found, values, state


def _copy_or_zeros(problem: Problem, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state is None:
        return problem.q.new_zeros(problem.state_shape, dtype=dtype)
    return state.to(dtype, copy=True)
