"""Chunked form. With `G` the running sum of the log decay inside a chunk, `G_C` its last row, `P` the decayed scores:

    P_ij = (q_i . k_j) exp(G_i - G_j) for j <= i
    O  = scale (e^G Q S + P V)                            S' = e^{G_C} S + (e^{G_C - G} K)^T V
    dP_ij = scale (do_i . v_j) for j <= i                 dS = e^{G_C} dS' + scale (e^G Q)^T dO
    dQ = dP-part + scale e^G (dO S^T)   dK = dP-part + e^{G_C - G} (V dS'^T)   dV = scale P^T dO + (e^{G_C - G} K) dS'
    dg_t = sum_{s >= t in the chunk} (q dq - k dk)_s + rowsum(S' * dS')

All chunks are computed at once; only the states pass from chunk to chunk in a loop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.backends.decay import MIN_LOG_DECAY, Problem
from fla.backends.torch._layout import Layout

CHUNK = 64
SAFE_RANGE = 80.0  # nats that float32 holds in exp() on either side of a chunk's middle


@dataclass
class _Chunks:
    """A problem cut into chunks: `q, k` and their decayed copies `[NC, H, C, K]`, `G` `[NC, H, C, 1 or K]` or None."""

    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None  # G, float64

    @property
    def total(self) -> Tensor | float:
        """`e^{G_C}`, to scale a state `[NC, H, K, V]` with."""
        return 1.0 if self.decay is None else self.decay[:, :, -1, :, None].exp().to(self.q.dtype)

    def from_start(self, x: Tensor) -> Tensor:
        return x if self.decay is None else x * self.decay.exp().to(x.dtype)

    def to_end(self, x: Tensor) -> Tensor:
        return x if self.decay is None else x * (self.decay[:, :, -1:] - self.decay).exp().to(x.dtype)


def forward(problem: Problem, output_final_state: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    chunks = _split(problem, dtype)
    starts, final_state = _states(problem, chunks)
    scores = _scores(problem, chunks)
    o = chunks.from_start(chunks.q) @ starts + scores.values() @ chunks.v
    o = (chunks.layout.join(o) * problem.scale).to(problem.output_dtype)
    return o, final_state if output_final_state else None


def backward(
    problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    chunks = _split(problem, dtype)
    starts, final_state = _states(problem, chunks)
    do = chunks.layout.split(do.to(dtype) * problem.scale)
    ends, dh0 = _state_gradients(problem, chunks, do, dht)
    scores = _scores(problem, chunks)
    dv = scores.values().mT @ do + chunks.to_end(chunks.k) @ ends
    dq, dk = scores.gradients((do @ chunks.v.mT).tril())
    dq = dq + chunks.from_start(do @ starts.mT)
    dk = dk + chunks.to_end(chunks.v @ ends.mT)
    dg = dgk = None
    if needs_gates:
        change = _after(chunks.layout, starts, final_state) * ends
        dg = _gate_gradient(chunks.q * dq - chunks.k * dk, change.sum(-1))
        if problem.gk is None:
            dg = dg.sum(-1, keepdim=True)
        dg = chunks.layout.join(dg)
        dg, dgk = (dg[..., 0], None) if problem.gk is None else (None, dg)
    dq, dk, dv = (chunks.layout.join(x) for x in (dq, dk, dv))
    return {"q": dq, "k": dk, "v": dv, "g": dg, "gk": dgk, "initial_state": dh0}


def _split(problem: Problem, dtype: torch.dtype) -> _Chunks:
    layout = Layout(problem.q.shape, problem.cu_seqlens, problem.q.device, CHUNK)
    gate = problem.gk
    if problem.g is not None:
        gate = problem.g[..., None]
    elif problem.g_gamma is not None:
        gate = problem.g_gamma[:, None].expand(*problem.q.shape[:3], 1)
    decay = None if gate is None else layout.split(gate.double().clamp(min=MIN_LOG_DECAY)).cumsum(2)
    q, k, v = (layout.split(x.to(dtype)) for x in (problem.q, problem.k, problem.v))
    return _Chunks(layout, q, k, v, decay)


def _states(problem: Problem, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """The state at every chunk's start `[NC, H, K, V]`, and the final ones `[N, H, K, V]`."""
    writes = chunks.to_end(chunks.k).mT @ chunks.v
    state = _initial(problem, problem.initial_state, chunks.q.dtype)
    return _scan(chunks, writes, state, chunks.layout.steps())


def _state_gradients(problem: Problem, chunks: _Chunks, do: Tensor, dht: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient of the state at every chunk's end, and of the initial states."""
    reads = chunks.from_start(chunks.q).mT @ do
    return _scan(chunks, reads, _initial(problem, dht, chunks.q.dtype), chunks.layout.steps()[::-1])


def _initial(problem: Problem, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state is None:
        return problem.q.new_zeros(problem.state_shape, dtype=dtype)
    return state.to(dtype, copy=True)


def _scan(chunks: _Chunks, updates: Tensor, state: Tensor, steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`state <- total * state + update` along `steps`; what every chunk found, and what is left."""
    found = torch.empty_like(updates)
    total = chunks.total
    for chunk, row in steps:
        current = state[row]
        found[chunk] = current
        state[row] = updates[chunk] + (current if isinstance(total, float) else total[chunk] * current)
    return found, state


def _after(layout: Layout, starts: Tensor, final_state: Tensor) -> Tensor:
    """The state at every chunk's end: the next chunk's start, or the final state."""
    ends = torch.empty_like(starts)
    for chunk, _ in layout.steps()[1:]:
        ends[chunk - 1] = starts[chunk]
    counts = torch.tensor(layout.counts, device=layout.device)
    ends[(counts.cumsum(0) - 1)[counts > 0]] = final_state[counts > 0]
    return ends


def _gate_gradient(row: Tensor, change: Tensor) -> Tensor:
    """Sum of `row` from a token to its chunk's end, plus what the state carries over that end."""
    return row.flip(2).cumsum(2).flip(2) + change[:, :, None]


def _scores(problem: Problem, chunks: _Chunks) -> "_ScalarScores | _VectorScores":
    return (_ScalarScores if problem.gk is None else _VectorScores)(chunks)


class _ScalarScores:
    """`P_ij = (q_i . k_j) exp(G_i - G_j)`, one decay per head."""

    def __init__(self, chunks: _Chunks):
        self.q, self.k = chunks.q, chunks.k
        self.ratio = None
        if chunks.decay is not None:
            # below the diagonal only: above it the exponent is positive and may overflow
            self.ratio = (chunks.decay - chunks.decay.mT).tril().exp().to(self.q.dtype)

    def values(self) -> Tensor:
        return self._decayed(self.q @ self.k.mT)

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        d_scores = self._decayed(d_scores)
        return d_scores @ self.k, d_scores.mT @ self.q

    def _decayed(self, scores: Tensor) -> Tensor:
        return (scores if self.ratio is None else scores * self.ratio).tril()


class _VectorScores:
    """`P_ij = sum_k q_ik k_jk exp(G_ik - G_jk)`: one product of operands scaled around the chunk's middle where the
    decay to either end stays in range, channel by channel and row by row in the (chunk, head) pairs where it does
    not."""

    def __init__(self, chunks: _Chunks):
        decay = chunks.decay
        assert decay is not None
        middle = decay[:, :, decay.shape[2] // 2 - 1 : decay.shape[2] // 2] if decay.shape[2] > 1 else decay
        from_middle = decay - middle
        self.far = from_middle.abs().amax((2, 3)) > SAFE_RANGE
        from_middle = from_middle.masked_fill(self.far[..., None, None], 0.0)
        self.up, self.down = from_middle.exp().to(chunks.q.dtype), (-from_middle).exp().to(chunks.q.dtype)
        self.q, self.k = chunks.q * self.up, chunks.k * self.down
        self.any_far = bool(self.far.any())
        if self.any_far:
            self.far_q, self.far_k, self.far_decay = chunks.q[self.far], chunks.k[self.far], decay[self.far]

    def values(self) -> Tensor:
        scores = (self.q @ self.k.mT).tril()
        if self.any_far:
            scores[self.far] = self._far_scores()
        return scores

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = self.up * (d_scores @ self.k), self.down * (d_scores.mT @ self.q)
        if self.any_far:
            dq[self.far], dk[self.far] = self._far_gradients(d_scores[self.far])
        return dq, dk

    def _ratio(self, i: int) -> Tensor:
        return (self.far_decay[:, i : i + 1] - self.far_decay[:, : i + 1]).exp().to(self.q.dtype)

    def _far_scores(self) -> Tensor:
        rows, size = self.far_q.shape[:2]
        scores = self.far_q.new_zeros(rows, size, size)
        for i in range(size):
            scores[:, i, : i + 1] = (self.far_q[:, i : i + 1] * self.far_k[:, : i + 1] * self._ratio(i)).sum(-1)
        return scores

    def _far_gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = torch.zeros_like(self.far_q), torch.zeros_like(self.far_k)
        for i in range(d_scores.shape[1]):
            weight = d_scores[:, i, : i + 1, None] * self._ratio(i)
            dq[:, i] = (weight * self.far_k[:, : i + 1]).sum(1)
            dk[:, : i + 1] += weight * self.far_q[:, i : i + 1]
        return dq, dk
