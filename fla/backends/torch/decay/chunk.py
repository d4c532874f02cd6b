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
from fla.backends.torch._scores import Scores, pair_decay, scan, states_at_ends, sums_to_end

CHUNK = 64


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

    def scores(self) -> Scores:
        return pair_decay(self.log_decay, self.q.dtype).between(self.q, self.k)


def forward(problem: Problem, output_final_state: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    chunks = _cut_into_chunks(problem, dtype)
    starts, final_state = _states_at_starts(problem, chunks)
    scores = chunks.scores()
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
    scores = chunks.scores()
    dv = scores.values().mT @ do + chunks.decay_to_end(chunks.k) @ ends
    dq, dk = scores.gradients((do @ chunks.v.mT).tril())
    dq = dq + chunks.decay_from_start(do @ starts.mT)
    dk = dk + chunks.decay_to_end(chunks.v @ ends.mT)
    dg = dgk = None
    if needs_gates:
        change = states_at_ends(chunks.layout, starts, final_state) * ends
        dg = sums_to_end(chunks.q * dq - chunks.k * dk) + change.sum(-1)[:, :, None]
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
    decay = chunks.decay_over_chunk

    def advance(chunk: Tensor, current: Tensor) -> Tensor:
        return updates[chunk] + (current if isinstance(decay, float) else decay[chunk] * current)

    return scan(steps, torch.empty_like(updates), state, advance)
