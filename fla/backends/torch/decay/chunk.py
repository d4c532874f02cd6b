"""The chunked form.

Inside a chunk, `G` is the running sum of the log decay and `G_C` its last row. `S` is the state before the chunk, `S'`
the state after it. `P` are the decayed scores, zero above the diagonal:

    P_ij = (q_i . k_j) exp(G_i - G_j)    for j <= i

Forward:

    O  = scale (e^G Q S + P V)
    S' = e^{G_C} S + (e^{G_C - G} K)^T V

Backward, with `dQ_P` and `dK_P` the gradients that reach Q and K through P:

    dP_ij = scale (do_i . v_j)    for j <= i
    dS = e^{G_C} dS' + scale (e^G Q)^T dO
    dQ = dQ_P + scale e^G (dO S^T)
    dK = dK_P + e^{G_C - G} (V dS'^T)
    dV = scale P^T dO + (e^{G_C - G} K) dS'
    dg_t = sum over s >= t in the chunk of (q dq - k dk)_s + rowsum(S' * dS')

With one decay per head, dg is summed over the key channels. All chunks are computed at once; only the states pass from
chunk to chunk in a loop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.backends.decay import MIN_LOG_DECAY, Problem
from fla.backends.torch._layout import Layout

CHUNK = 64
SAFE_RANGE = 80.0  # nats: exp(80) and exp(-80) are normal float32 numbers


@dataclass
class _Chunks:
    """A problem cut into chunks: `q`, `k` `[NC, H, C, K]`, `v` `[NC, H, C, V]`, `log_decay` `[NC, H, C, 1 or K]`."""

    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None  # G in float64; None without a decay

    @property
    def decay_over_chunk(self) -> Tensor | float:
        """`e^{G_C}` in a shape that multiplies states `[NC, H, K, V]`."""
        return 1.0 if self.log_decay is None else self.log_decay[:, :, -1, :, None].exp().to(self.q.dtype)

    def decay_from_start(self, x: Tensor) -> Tensor:
        """`e^G x`."""
        return x if self.log_decay is None else x * self.log_decay.exp().to(x.dtype)

    def decay_to_end(self, x: Tensor) -> Tensor:
        """`e^{G_C - G} x`."""
        return x if self.log_decay is None else x * (self.log_decay[:, :, -1:] - self.log_decay).exp().to(x.dtype)


def forward(problem: Problem, output_final_state: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    chunks = _cut_into_chunks(problem, dtype)
    starts, final_state = _states_at_starts(problem, chunks)
    scores = _scores(problem, chunks)
    o = chunks.decay_from_start(chunks.q) @ starts + scores.values() @ chunks.v
    o = (chunks.layout.join(o) * problem.scale).to(problem.output_dtype)
    return o, final_state if output_final_state else None


def backward(
    problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    chunks = _cut_into_chunks(problem, dtype)
    starts, final_state = _states_at_starts(problem, chunks)
    do = chunks.layout.split(do.to(dtype) * problem.scale)
    ends, dh0 = _state_gradients_at_ends(problem, chunks, do, dht)
    scores = _scores(problem, chunks)
    dv = scores.values().mT @ do + chunks.decay_to_end(chunks.k) @ ends
    dq, dk = scores.gradients((do @ chunks.v.mT).tril())
    dq = dq + chunks.decay_from_start(do @ starts.mT)
    dk = dk + chunks.decay_to_end(chunks.v @ ends.mT)
    dg = dgk = None
    if needs_gates:
        change = _states_at_ends(chunks.layout, starts, final_state) * ends
        dg = _gate_gradient(chunks.q * dq - chunks.k * dk, change.sum(-1))
        if problem.gk is None:
            dg = dg.sum(-1, keepdim=True)
        dg = chunks.layout.join(dg)
        dg, dgk = (dg[..., 0], None) if problem.gk is None else (None, dg)
    dq, dk, dv = (chunks.layout.join(x) for x in (dq, dk, dv))
    return {"q": dq, "k": dk, "v": dv, "g": dg, "gk": dgk, "initial_state": dh0}


def _cut_into_chunks(problem: Problem, dtype: torch.dtype) -> _Chunks:
    layout = Layout(problem.q.shape, problem.cu_seqlens, problem.q.device, CHUNK)
    gate = problem.gk
    if problem.g is not None:
        gate = problem.g[..., None]
    elif problem.g_gamma is not None:
        gate = problem.g_gamma[:, None].expand(*problem.q.shape[:3], 1)
    log_decay = None if gate is None else layout.split(gate.double().clamp(min=MIN_LOG_DECAY)).cumsum(2)
    q, k, v = (layout.split(x.to(dtype)) for x in (problem.q, problem.k, problem.v))
    return _Chunks(layout, q, k, v, log_decay)


def _states_at_starts(problem: Problem, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk `[NC, H, K, V]`, and the final states `[N, H, K, V]`."""
    writes = chunks.decay_to_end(chunks.k).mT @ chunks.v
    state = _copy_or_zeros(problem, problem.initial_state, chunks.q.dtype)
    return _scan(chunks, writes, state, chunks.layout.steps())


def _state_gradients_at_ends(
    problem: Problem, chunks: _Chunks, do: Tensor, dht: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the state at the end of every chunk `[NC, H, K, V]`, and of the initial states `[N, H, K, V]`."""
    reads = chunks.decay_from_start(chunks.q).mT @ do
    return _scan(chunks, reads, _copy_or_zeros(problem, dht, chunks.q.dtype), chunks.layout.steps()[::-1])


def _copy_or_zeros(problem: Problem, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state is None:
        return problem.q.new_zeros(problem.state_shape, dtype=dtype)
    return state.to(dtype, copy=True)


def _scan(chunks: _Chunks, updates: Tensor, state: Tensor, steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run `state <- decay_over_chunk * state + update` along `steps`.

    Returns the state that every chunk found `[NC, H, K, V]`, and the last state of every sequence `[N, H, K, V]`.
    """
    found = torch.empty_like(updates)
    decay = chunks.decay_over_chunk
    for chunk, row in steps:
        current = state[row]
        found[chunk] = current
        state[row] = updates[chunk] + (current if isinstance(decay, float) else decay[chunk] * current)
    return found, state


def _states_at_ends(layout: Layout, starts: Tensor, final_state: Tensor) -> Tensor:
    """The state at the end of every chunk: that at the start of the sequence's next chunk, or the final state."""
    ends = torch.empty_like(starts)
    for chunk, _ in layout.steps()[1:]:
        ends[chunk - 1] = starts[chunk]
    counts = torch.tensor(layout.counts, device=layout.device)
    ends[(counts.cumsum(0) - 1)[counts > 0]] = final_state[counts > 0]
    return ends


def _gate_gradient(row: Tensor, change: Tensor) -> Tensor:
    """The sum of `row` from every token to the end of its chunk, plus `change`, the share of the state after it."""
    return row.flip(2).cumsum(2).flip(2) + change[:, :, None]


def _scores(problem: Problem, chunks: _Chunks) -> "_ScalarScores | _VectorScores":
    return (_ScalarScores if problem.gk is None else _VectorScores)(chunks)


class _ScalarScores:
    """`P_ij = (q_i . k_j) exp(G_i - G_j)`, with one decay per head."""

    def __init__(self, chunks: _Chunks):
        self.q, self.k = chunks.q, chunks.k
        self.decay = None
        if chunks.log_decay is not None:
            # lower triangle before the exponential: above the diagonal it could overflow
            self.decay = (chunks.log_decay - chunks.log_decay.mT).tril().exp().to(self.q.dtype)

    def values(self) -> Tensor:
        return self._decayed(self.q @ self.k.mT)

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        d_scores = self._decayed(d_scores)
        return d_scores @ self.k, d_scores.mT @ self.q

    def _decayed(self, scores: Tensor) -> Tensor:
        return (scores if self.decay is None else scores * self.decay).tril()


class _VectorScores:
    """`P_ij = sum_k q_ik k_jk exp(G_ik - G_jk)`, with one decay per key channel.

    The scores are a matrix product of `q exp(G - M)` and `k exp(M - G)`, where M is G in the middle of the chunk. Where
    one of these exponents exceeds SAFE_RANGE, the (chunk, head) pair is `far`: its scores are computed row by row from
    `exp(G_ik - G_jk)`, whose exponents are never positive.
    """

    def __init__(self, chunks: _Chunks):
        log_decay = chunks.log_decay
        assert log_decay is not None
        half = log_decay.shape[2] // 2
        middle = log_decay[:, :, half - 1 : half] if log_decay.shape[2] > 1 else log_decay
        from_middle = log_decay - middle
        self.far = from_middle.abs().amax((2, 3)) > SAFE_RANGE
        from_middle = from_middle.masked_fill(self.far[..., None, None], 0.0)
        self.q_factor, self.k_factor = from_middle.exp().to(chunks.q.dtype), (-from_middle).exp().to(chunks.q.dtype)
        self.q, self.k = chunks.q * self.q_factor, chunks.k * self.k_factor
        self.any_far = bool(self.far.any())
        if self.any_far:
            self.far_q, self.far_k, self.far_log_decay = chunks.q[self.far], chunks.k[self.far], log_decay[self.far]

    def values(self) -> Tensor:
        scores = (self.q @ self.k.mT).tril()
        if self.any_far:
            scores[self.far] = self._far_scores()
        return scores

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = self.q_factor * (d_scores @ self.k), self.k_factor * (d_scores.mT @ self.q)
        if self.any_far:
            dq[self.far], dk[self.far] = self._far_gradients(d_scores[self.far])
        return dq, dk

    def _decay_to_row(self, i: int) -> Tensor:
        """`exp(G_i - G_j)` for `j <= i` in the far pairs, `[pairs, i + 1, K]`."""
        return (self.far_log_decay[:, i : i + 1] - self.far_log_decay[:, : i + 1]).exp().to(self.q.dtype)

    def _far_scores(self) -> Tensor:
        rows, size = self.far_q.shape[:2]
        scores = self.far_q.new_zeros(rows, size, size)
        for i in range(size):
            scores[:, i, : i + 1] = (self.far_q[:, i : i + 1] * self.far_k[:, : i + 1] * self._decay_to_row(i)).sum(-1)
        return scores

    def _far_gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = torch.zeros_like(self.far_q), torch.zeros_like(self.far_k)
        for i in range(d_scores.shape[1]):
            weight = d_scores[:, i, : i + 1, None] * self._decay_to_row(i)
            dq[:, i] = (weight * self.far_k[:, : i + 1]).sum(1)
            dk[:, : i + 1] += weight * self.far_q[:, i : i + 1]
        return dq, dk
