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

Q and A are one tensor of 2 C rows, `x`; K and B are `y`; V and U are `values`, dO and dW their gradients' counterpart.
So a pair of products is one, and so are the four kinds of scores (`scores.py`).
"""

import torch
from torch import Tensor

from fla.backends._gates import DEAD_LOG_DECAY, MIN_LOG_DECAY
from fla.backends._recurrence import Saved
from fla.backends.dplr import Problem
from fla.backends.torch._layout import Layout
from fla.backends.torch._scores import scan, states_at_ends, sums_to_end
from fla.backends.torch._step import stepping
from fla.backends.torch.dplr.scores import Scores, scaled, twice, with_first

CHUNK = 64


def forward(problem: Problem, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Saved | None]:
    """The states before all chunks, `U` and the final states are kept for the backward."""
    chunks = _Chunks(problem)
    scores = chunks.scores.values()
    starts, final_state = _run_forward(problem, chunks, scores)
    size = chunks.layout.size
    o = chunks.x_from_start[:, :, :size] @ starts
    o += scores[:, :, :size] @ chunks.values
    o = chunks.layout.join(o.mul_(problem.scale), problem.output_dtype)
    saved = Saved(problem, (starts, chunks.values[:, :, size:].clone(), final_state)) if keep else None
    return o, final_state.to(problem.state_dtype) if output_final_state else None, saved


def backward(
    problem: Problem, saved: tuple, do: Tensor, dht: Tensor | None, needs: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Gradients in the dtypes of the inputs, that of the initial states in the dtype of the computation."""
    chunks = _Chunks(problem)
    scores = chunks.scores.values()
    size, join = chunks.layout.size, chunks.layout.join
    if saved:
        starts, chunks.values[:, :, size:], final_state = saved
    else:
        starts, final_state = _run_forward(problem, chunks, scores)
    d_values = torch.empty_like(chunks.values)
    chunks.layout.split_into(d_values[:, :, :size], do)
    d_values[:, :, :size] *= problem.scale
    ends, dh0 = _run_backward(problem, chunks, scores, d_values, dht)

    dx, dy = chunks.scores.gradients(d_values @ chunks.values.mT)
    dx += scaled(d_values @ starts.mT, chunks.from_start, in_place=True)
    dy += twice(chunks.values @ ends.mT, chunks.to_end, in_place=True)
    dv = scores[..., :size].mT @ d_values
    dv += chunks.y_to_end[:, :, :size] @ ends
    dq, da, dk, db = (join(part, problem.dtype) for part in (*dx.split(size, 2), *dy.split(size, 2)))
    found: dict[str, Tensor | None] = {
        "q": dq,
        "k": dk,
        "v": join(dv, problem.dtype),
        "a": da,
        "b": db,
        "initial_state": dh0,
    }
    if problem.gk is not None and "gk" in needs:
        change = (states_at_ends(chunks.layout, starts, final_state) * ends).sum(-1)
        (of_q, of_a), (of_k, of_b) = (z.split(size, 2) for z in (dx * chunks.x, dy * chunks.y))
        dgk = sums_to_end(of_q + of_a - of_k - of_b) - of_a + change[:, :, None]
        dgk = join(dgk, problem.gk.dtype)
        # the gradient of a stronger decay is rounding noise
        found["gk"] = dgk if problem.dtype == torch.float64 else dgk.masked_fill(problem.gk < DEAD_LOG_DECAY, 0.0)
    return found


step = stepping(forward)


class _Chunks:
    """A problem cut into chunks: `x`, `y` `[NC, H, 2 C, K]` and `values` `[NC, H, 2 C, V]`, whose second half, U, is
    not computed yet; the factors of decays, which are None without gates, and what they multiply."""

    def __init__(self, problem: Problem) -> None:
        self.layout = layout = Layout(problem.q.shape, problem.cu_seqlens, problem.q.device, CHUNK)
        size, dtype = layout.size, torch.float32 if problem.q.dtype.itemsize == 2 else torch.float64
        shape = layout.num_chunks, problem.q.shape[2], 2 * size
        self.x, self.y, self.values = (
            z.new_empty(*shape, z.shape[-1], dtype=dtype) for z in (problem.q, problem.k, problem.v)
        )
        halves = (self.x, problem.q, problem.a), (self.y, problem.k, problem.b)
        for out, first, second in halves:
            layout.split_into(out[:, :, :size], first)
            layout.split_into(out[:, :, size:], second)
        layout.split_into(self.values[:, :, :size], problem.v)
        self.log_decay: Tensor | None = None
        self.from_start: Tensor | None = None
        self.to_end: Tensor | None = None
        self.over_chunk: Tensor | None = None
        if problem.gk is not None:
            self._decay(problem.gk, dtype)
        self.x_from_start = scaled(self.x, self.from_start)  # e^G Q, e^E A
        self.y_to_end = twice(self.y, self.to_end)  # e^{G_C - G} K and B
        self.scores = Scores(self.x, self.y, self.log_decay)

    def _decay(self, gates: Tensor, dtype: torch.dtype) -> None:
        shape = *self.x.shape[:2], self.layout.size, self.x.shape[3]
        total = self.x.new_empty(shape, dtype=torch.float64)
        self.layout.split_into(total, gates)
        self.log_decay = total = total.clamp_(min=MIN_LOG_DECAY).cumsum_(2)
        last = total[:, :, -1:]
        self.from_start = with_first(torch.empty_like(self.x), total.exp(), torch.ones_like(last))
        self.to_end = (last - total).exp_().to(dtype)
        self.over_chunk = last.mT.exp().to(dtype)


def _run_forward(problem: Problem, chunks: _Chunks, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk `[NC, H, K, V]`, and the final states. Fills in U."""
    size, K = chunks.layout.size, chunks.x.shape[-1]
    v, u = chunks.values.split(size, 2)
    read = torch.cat((chunks.x_from_start[:, :, size:], scores[:, :, size:, :size] @ v), -1)
    system = scores[:, :, size:, size:].neg()  # I - A_ab; its diagonal of ones is implied
    read = torch.linalg.solve_triangular(system, read, upper=False, unitriangular=True)
    u.copy_(read[..., K:])
    k, b = chunks.y_to_end.split(size, 2)
    state = _copy_or_zeros(problem, problem.initial_state, chunks.x.dtype)
    return _scan(chunks, chunks.layout.views(), state, read[..., :K], u, b, k.mT @ v)


def _run_backward(
    problem: Problem, chunks: _Chunks, scores: Tensor, d_values: Tensor, dht: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the state at the end of every chunk, and that of the initial states. Fills in dW."""
    size, K = chunks.layout.size, chunks.x.shape[-1]
    do, dw = d_values.split(size, 2)
    read = torch.cat((chunks.y_to_end[:, :, size:], scores[:, :, :size, size:].mT @ do), -1)
    system = scores[:, :, size:, size:].mT.neg()
    read = torch.linalg.solve_triangular(system, read, upper=True, unitriangular=True)
    dw.copy_(read[..., K:])
    q, a = chunks.x_from_start.split(size, 2)
    state = _copy_or_zeros(problem, dht, chunks.x.dtype)
    return _scan(chunks, chunks.layout.views()[::-1], state, read[..., :K], dw, a, q.mT @ do)


def _scan(
    chunks: _Chunks,
    steps: list,
    state: Tensor,
    reads: Tensor,
    values: Tensor,
    keys: Tensor,
    writes: Tensor,
) -> tuple[Tensor, Tensor]:
    """`values += reads S`, then `S <- e^{G_C} S + writes + keys^T values`, chunk by chunk: the loop of both directions.

    Returns the state that every chunk found, and the last states.
    """
    decay = chunks.over_chunk

    def advance(chunk: Tensor | slice, current: Tensor) -> Tensor:
        x = values[chunk] + reads[chunk] @ current
        values[chunk] = x
        following = (keys[chunk].mT @ x).add_(writes[chunk])
        return following.add_(current if decay is None else decay[chunk] * current)

    return scan(steps, torch.empty_like(writes), state, advance)


def _copy_or_zeros(problem: Problem, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state is None:
        return problem.q.new_zeros(problem.state_shape, dtype=dtype)
    return state.to(dtype, copy=True)
