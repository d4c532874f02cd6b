"""The chunked form.

Inside a chunk, `G` is the running sum of the log decay, `G_C` its last row. `S` is the state before the chunk, `S'`
the state after it, `b` is beta as a diagonal matrix. `P` and `L` are decayed scores:

    P_ij = (q_i . k_j) exp(G_i - G_j)    for j <= i, else 0
    L_ij = (k_i . k_j) exp(G_i - G_j)    for j < i, else 0

With `M = I + b L`, the rows of X are what the tokens write:

    X  = M^-1 b (V - e^G K S) = U - W S
    O  = scale (e^G Q S + P X)
    S' = e^{G_C} S + (e^{G_C - G} K)^T X

where `U = M^-1 b V` and `W = M^-1 b e^G K`. Backward, from dO (times the scale) and dS', without a derivative of the
inverse, because M is differentiated through X:

    dX = P^T dO + e^{G_C - G} K dS'
    dS = e^{G_C} dS' + (e^G Q)^T dO - W^T dX
    Y  = M^-T dX                                      the gradient of b (V - e^G K S)
    dP = tril(dO X^T)
    dL = -b stril(Y X^T)
    dV = b Y
    db = rowsum(Y * (V - e^G K S)) - rowsum(stril(Y X^T) * L)
    dQ = dQ_P + e^G (dO S^T)
    dK = dK_P + dK_L - e^G (b Y S^T) + e^{G_C - G} (X dS'^T)

The gradient of the log decay sums over the pairs of tokens on both sides of a step, and over those of a token and a
state:

    dw_t = sum of (dG_P + dG_L + q dq_S + k dk_S)_s over s >= t
         + sum of (e^{G_C - G} k (X dS'^T))_s over s < t
         + e^{G_C} rowsum(S * dS')

with dG_P and dG_L the gradients of G through P and L, and dq_S and dk_S the terms above that have S. With one decay per
head, it is summed over the key channels. All chunks are computed at once; only the states pass from chunk to chunk in a
loop. `fla.testing.delta` has these formulas for one chunk, in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.backends.delta import CHUNK, Problem
from fla.backends.torch._layout import Layout
from fla.backends.torch._scores import Scores, pair_decay, scan, sum_to_heads, sums_to_end
from fla.backends.torch.delta.prepare import Inputs


@dataclass
class _Chunks:
    """Inputs cut into chunks, with an axis of the G value heads that share a key head.

    `q`, `k` `[NC, H, 1, C, K]`, `v` `[NC, H, G, C, V]`, `beta` `[NC, H, G, C, 1]`, `log_decay` `[NC, H, G, C, 1 or K]`.
    """

    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None  # G in float64; None without a decay

    def __post_init__(self) -> None:
        dtype, total = self.q.dtype, self.log_decay
        decay = pair_decay(total, dtype)
        self.reads: Scores = decay.between(self.q, self.k)  # P
        self.overlaps: Scores = decay.between(self.k, self.k, strict=True)  # L
        self.from_start = None if total is None else total.exp().to(dtype)
        self.to_end = None if total is None else (total[..., -1:, :] - total).exp().to(dtype)

    @property
    def decay_over_chunk(self) -> Tensor | float:
        """`e^{G_C}` in a shape that multiplies states `[NC, HV, K, V]`."""
        return 1.0 if self.from_start is None else self.from_start[..., -1, :, None].flatten(1, 2)

    def decay_from_start(self, x: Tensor) -> Tensor:
        """`e^G x`."""
        return x if self.from_start is None else x * self.from_start

    def decay_to_end(self, x: Tensor) -> Tensor:
        """`e^{G_C - G} x`."""
        return x if self.to_end is None else x * self.to_end

    def written(self, x: Tensor) -> Tensor:
        """`b x`."""
        return x if self.beta is None else self.beta * x

    def of_value_heads(self, x: Tensor) -> Tensor:
        """`x` for each value head, `[NC, HV, ., .]`."""
        return x.expand(*self.v.shape[:3], *x.shape[-2:]).flatten(1, 2)

    def of_key_heads(self, x: Tensor) -> Tensor:
        """`[NC, HV, ., .]` -> `[NC, H, G, ., .]`."""
        return x.unflatten(1, self.v.shape[1:3])

    def join(self, x: Tensor) -> Tensor:
        """`[NC, H, G, C, D]` -> `[B, T, HV, D]`."""
        return self.layout.join(x.flatten(1, 2))


@dataclass
class _States:
    """What passes between chunks forward in time; all `[NC, HV, ., .]` but `final` `[N, HV, K, V]`."""

    starts: Tensor  # S of every chunk
    final: Tensor
    new_values: Tensor  # X
    new_keys: Tensor  # W
    keys_to_end: Tensor  # e^{G_C - G} K


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    o, final, _ = forward_with_states(problem, inputs)
    return o, final


def forward_with_states(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    chunks = _cut_into_chunks(problem, inputs)
    states = _states(problem, chunks, chunks.written(chunks.overlaps.values()))
    starts, new_values = chunks.of_key_heads(states.starts), chunks.of_key_heads(states.new_values)
    o = chunks.decay_from_start(chunks.q @ starts) if _is_scalar(chunks) else chunks.decay_from_start(chunks.q) @ starts
    o = chunks.join((o + chunks.reads.values() @ new_values) * problem.scale)
    return o, states.final, states.starts


def backward(
    problem: Problem, inputs: Inputs, do: Tensor, dht: Tensor | None, needs_gates: bool
) -> tuple[Inputs, Tensor]:
    """The gradients of `inputs`, and of the initial state."""
    chunks = _cut_into_chunks(problem, inputs)
    overlaps, reads = chunks.overlaps.values(), chunks.reads.values()
    inverse_of = chunks.written(overlaps)
    states = _states(problem, chunks, inverse_of)
    do = chunks.of_key_heads(chunks.layout.split(do * problem.scale))
    ends, d_new, dh0 = _state_gradients(problem, chunks, states, reads, do, dht)
    starts, new_values = chunks.of_key_heads(states.starts), chunks.of_key_heads(states.new_values)
    ends, d_new = chunks.of_key_heads(ends), chunks.of_key_heads(d_new)

    y = torch.linalg.solve_triangular(inverse_of.mT, d_new, upper=True, unitriangular=True)
    written = y @ new_values.mT
    read_from_start = y @ starts.mT
    dq_start = chunks.decay_from_start(do @ starts.mT)
    dk_start = -chunks.decay_from_start(chunks.written(read_from_start))
    dk_end = chunks.decay_to_end(new_values @ ends.mT)
    d_reads, d_overlaps = do @ new_values.mT, -chunks.written(written)
    dkeys = None
    if needs_gates and chunks.log_decay is not None:
        dq, dk, between_reads = chunks.reads.gradients_and_decays(reads, d_reads)
        dk_row, dk_column, between_overlaps = chunks.overlaps.gradients_and_decays(overlaps, d_overlaps)
        after = between_reads + between_overlaps + _per_decay(chunks, chunks.q * dq_start + chunks.k * dk_start)
        before, change = (
            _per_decay(chunks, chunks.k * dk_end),
            _per_decay(chunks, (starts * ends).sum(-1)[..., None, :]),
        )
        whole = chunks.log_decay[..., -1:, :].exp() * change
        dkeys = chunks.join(sums_to_end(after) + before.cumsum(-2) - before + whole)
    else:
        dq, dk = chunks.reads.gradients(d_reads)
        dk_row, dk_column = chunks.overlaps.gradients(d_overlaps)
    dq = dq + sum_to_heads(dq_start, chunks.q)
    dk = dk + dk_row + dk_column + sum_to_heads(dk_start + dk_end, chunks.k)
    dbeta = None
    if chunks.beta is not None:
        of_start = (chunks.decay_from_start(chunks.k) * read_from_start).sum(-1)
        dbeta = (y * chunks.v).sum(-1) - of_start - (written * overlaps).sum(-1)
        dbeta = chunks.join(dbeta[..., None])[..., 0]
    found = Inputs(chunks.join(dq), chunks.join(dk), chunks.join(chunks.written(y)), dkeys, None, dbeta)
    return found, dh0


def _cut_into_chunks(problem: Problem, inputs: Inputs) -> _Chunks:
    layout = Layout(inputs.q.shape, problem.cu_seqlens, inputs.q.device, CHUNK)
    H = inputs.q.shape[2]

    def of_value_heads(x: Tensor | None) -> Tensor | None:
        return None if x is None else layout.split(x).unflatten(1, (H, -1))

    v = of_value_heads(inputs.v)
    assert v is not None
    beta = of_value_heads(None if inputs.beta is None else inputs.beta[..., None])
    gates = of_value_heads(inputs.keys)
    q, k = (layout.split(x)[:, :, None] for x in (inputs.q, inputs.k))
    return _Chunks(layout, q, k, v, beta, None if gates is None else gates.cumsum(-2))


def _is_scalar(chunks: _Chunks) -> bool:
    return chunks.log_decay is None or chunks.log_decay.shape[-1] == 1


def _per_decay(chunks: _Chunks, x: Tensor) -> Tensor:
    """`x` `[..., K]` in float64, summed over the channels if they have one decay."""
    return x.sum(-1, keepdim=True, dtype=torch.float64) if _is_scalar(chunks) else x.double()


def _states(problem: Problem, chunks: _Chunks, lower: Tensor) -> _States:
    """Forward in time; `lower` is `b L`."""
    from_start = chunks.written(chunks.decay_from_start(chunks.k))
    both = torch.cat((chunks.written(chunks.v), from_start.expand(*chunks.v.shape[:4], -1)), -1)
    both = torch.linalg.solve_triangular(lower, both, upper=False, unitriangular=True)
    values, keys = (chunks.of_value_heads(x) for x in both.split((chunks.v.shape[-1], chunks.k.shape[-1]), -1))
    to_end, decay = chunks.of_value_heads(chunks.decay_to_end(chunks.k)), chunks.decay_over_chunk
    new_values = torch.empty_like(values)

    def advance(chunk: Tensor, current: Tensor) -> Tensor:
        new = new_values[chunk] = values[chunk] - keys[chunk] @ current
        kept = current if isinstance(decay, float) else decay[chunk] * current
        return kept + to_end[chunk].mT @ new

    state = _copy_or_zeros(problem, problem.initial_state, values.dtype)
    found = values.new_empty(len(values), *state.shape[1:])
    starts, final = scan(chunks.layout.steps(), found, state, advance)
    return _States(starts, final, new_values, keys, to_end)


def _state_gradients(
    problem: Problem, chunks: _Chunks, states: _States, reads: Tensor, do: Tensor, dht: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward in time: dS' and dX of every chunk, and the gradients of the initial states."""
    d_new = chunks.of_value_heads(reads.mT @ do)
    of_reads = chunks.of_value_heads(chunks.decay_from_start(chunks.q).mT @ do)
    decay = chunks.decay_over_chunk

    def advance(chunk: Tensor, current: Tensor) -> Tensor:
        new = d_new[chunk] = d_new[chunk] + states.keys_to_end[chunk] @ current
        kept = current if isinstance(decay, float) else decay[chunk] * current
        return kept + of_reads[chunk] - states.new_keys[chunk].mT @ new

    end = _copy_or_zeros(problem, dht, do.dtype)
    ends, dh0 = scan(chunks.layout.steps()[::-1], torch.empty_like(states.starts), end, advance)
    return ends, d_new, dh0


def _copy_or_zeros(problem: Problem, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state is None:
        return problem.q.new_zeros(problem.state_shape, dtype=dtype)
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)  # a strided state would change last bits
