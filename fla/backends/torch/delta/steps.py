"""The recurrent form, for decays and write strengths per value channel, which only this form has.

`D_t` is the product of the decays of key and value channels, `S'_t = D_t S_{t-1}` the decayed state, `S_t` the state
after token t, and `dS_t` its gradient.

Forward in time:

    r_t  = v_t - S'_t^T k_t
    u_t  = beta_t r_t
    S_t  = S'_t + k_t u_t^T
    o_t  = scale S_t^T q_t

Backward in time, with u and r kept:

    dS_t    += scale q_t do_t^T
    du_t     = dS_t^T k_t              dbeta_t = du_t r_t            dv_t = beta_t du_t
    dkw_t    = dS_t u_t
    dS_{t-1} = D_t (dS_t - k_t dv_t^T)

Forward in time once more, as no states are kept:

    dq_t  = scale S_t do_t
    dkr_t = -S'_t dv_t                 dk_t = dkw_t + dkr_t

From these, with T the last token:

    dgk_t = sum_{s >= t} (q dq + k dkr - k dkw)_s + rowsum(S_T * dS_T)
    dgv_t = sum_{s >= t} (o do - u du - (v - r) dv)_s + colsum(S_T * dS_T)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.backends.delta import Problem
from fla.backends.torch._layout import Layout
from fla.backends.torch.delta.prepare import Inputs


@dataclass
class _Tokens:
    """Inputs token by token, with an axis of the G value heads that share a key head.

    `q`, `k` `[tokens, H, 1, K]`; `v`, `beta`, `values` `[tokens, H, G, V]`, `keys` `[tokens, H, G, 1 or K]`.
    """

    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | float
    keys: Tensor | None  # decays, not logarithms
    values: Tensor | None

    def decay(self, token: Tensor) -> Tensor | float:
        """`D` of some tokens, which multiplies states `[., H, G, K, V]`."""
        result: Tensor | float = 1.0
        if self.keys is not None:
            result = self.keys[token][..., None]
        if self.values is not None:
            result = result * self.values[token][..., None, :]
        return result

    def strength(self, token: Tensor) -> Tensor | float:
        return self.beta if isinstance(self.beta, float) else self.beta[token]


@dataclass
class _Forward:
    """`o`, `r` and `u` `[tokens, H, G, V]`, and the final states."""

    o: Tensor
    r: Tensor
    u: Tensor
    final: Tensor


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    tokens = _token_by_token(problem, inputs)
    found = _forward_in_time(problem, tokens)
    return _join(tokens, found.o * problem.scale), found.final.flatten(1, 2)


def backward(
    problem: Problem, inputs: Inputs, do: Tensor, dht: Tensor | None, needs_gates: bool
) -> tuple[Inputs, Tensor]:
    """The gradients of `inputs`, and of the initial state."""
    tokens = _token_by_token(problem, inputs)
    layout, q, k = tokens.layout, tokens.q, tokens.k
    d_out = _split(layout, do, q.shape[1]) * problem.scale
    found = _forward_in_time(problem, tokens)
    du, dv = torch.empty_like(tokens.v), torch.empty_like(tokens.v)
    dk_written = found.u.new_empty(*found.u.shape[:3], k.shape[3])
    end = _states(problem, tokens, dht)
    state = end.clone()
    for token, row in layout.steps()[::-1]:
        current = state[row] + q[token][..., None] * d_out[token][..., None, :]
        du[token] = _read(k[token], current)
        dv[token] = tokens.strength(token) * du[token]
        dk_written[token] = (current @ found.u[token][..., None])[..., 0]
        state[row] = tokens.decay(token) * (current - k[token][..., None] * dv[token][..., None, :])
    dq, dk_read = _read_by_gradients(problem, tokens, found, d_out, dv)
    dkeys = dvalues = None
    if needs_gates:
        change = found.final * end
        if tokens.keys is not None:
            of_keys = _suffix_sums(layout, q * dq + k * (dk_read - dk_written), change.sum(-1))
            of_keys = of_keys if inputs.keys is None or inputs.keys.shape[-1] > 1 else of_keys.sum(-1, keepdim=True)
            dkeys = _join(tokens, of_keys)
        exchanged = found.o * d_out - found.u * du - (tokens.v - found.r) * dv
        dvalues = _join(tokens, _suffix_sums(layout, exchanged, change.sum(-2)))
    dbeta = None
    if inputs.beta is not None:
        dbeta = _join(tokens, du * found.r)
        dbeta = dbeta if inputs.beta.dim() == 4 else dbeta.sum(-1)
    dq, dk = (_join(tokens, x.sum(2, keepdim=True)) for x in (dq, dk_read + dk_written))
    return Inputs(dq, dk, _join(tokens, dv), dkeys, dvalues, dbeta), state.flatten(1, 2)


def _token_by_token(problem: Problem, inputs: Inputs) -> _Tokens:
    layout = Layout(inputs.q.shape, problem.cu_seqlens, inputs.q.device, 1)
    H, dtype = inputs.q.shape[2], inputs.q.dtype
    q, k, v = (_split(layout, x, H) for x in (inputs.q, inputs.k, inputs.v))
    beta: Tensor | float = 1.0
    if inputs.beta is not None:
        beta = _split(layout, inputs.beta if inputs.beta.dim() == 4 else inputs.beta[..., None], H)
    keys, values = (None if x is None else _split(layout, x.exp().to(dtype), H) for x in (inputs.keys, inputs.values))
    return _Tokens(layout, q, k, v, beta, keys, values)


def _split(layout: Layout, x: Tensor, heads: int) -> Tensor:
    """`[B, T, HV, D]` -> `[tokens, H, G, D]`."""
    return layout.split(x)[:, :, 0].unflatten(1, (heads, -1))


def _join(tokens: _Tokens, x: Tensor) -> Tensor:
    """`[tokens, H, G, D]` -> `[B, T, HV, D]`."""
    return tokens.layout.join(x.flatten(1, 2)[:, :, None])


def _states(problem: Problem, tokens: _Tokens, given: Tensor | None) -> Tensor:
    """States `[N, H, G, K, V]` that the caller may write to: a copy of those given, or zeros."""
    states = problem.q.new_zeros(problem.state_shape, dtype=tokens.q.dtype)
    states = states if given is None else states.add_(given)
    return states.unflatten(1, tokens.v.shape[1:3])


def _read(key: Tensor, state: Tensor) -> Tensor:
    """`S^T k`."""
    return (key[..., None, :] @ state)[..., 0, :]


def _forward_in_time(problem: Problem, tokens: _Tokens) -> _Forward:
    o, r, u = (torch.empty_like(tokens.v) for _ in range(3))
    state = _states(problem, tokens, problem.initial_state)
    for token, row in tokens.layout.steps():
        key, current = tokens.k[token], state[row] * tokens.decay(token)
        r[token] = tokens.v[token] - _read(key, current)
        u[token] = tokens.strength(token) * r[token]
        state[row] = current + key[..., None] * u[token][..., None, :]
        o[token] = _read(tokens.q[token], state[row])
    return _Forward(o, r, u, state)


def _read_by_gradients(
    problem: Problem, tokens: _Tokens, found: _Forward, d_out: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dkr of every value head, `[tokens, H, G, K]`."""
    dq, dk = (dv.new_empty(*dv.shape[:3], tokens.k.shape[3]) for _ in range(2))
    state = _states(problem, tokens, problem.initial_state)
    for token, row in tokens.layout.steps():
        current = state[row] * tokens.decay(token)
        dk[token] = -(current @ dv[token][..., None])[..., 0]
        state[row] = current + tokens.k[token][..., None] * found.u[token][..., None, :]
        dq[token] = (state[row] @ d_out[token][..., None])[..., 0]
    return dq, dk


def _suffix_sums(layout: Layout, row: Tensor, change: Tensor) -> Tensor:
    """The sum of `row` from every token to the end of its sequence, plus `change`, the share of the final state."""
    running = change.clone()
    sums = torch.empty_like(row)
    for token, sequence in layout.steps()[::-1]:
        running[sequence] += row[token]
        sums[token] = running[sequence]
    return sums
