"""The recurrent form, for decays per value channel, which only this form has.

`S_t` is the state after token t, and `dS_t` its gradient.

Forward in time:

    S_t  = e^{gk_t} S_{t-1} e^{gv_t} + k_t v_t^T
    o_t  = scale S_t^T q_t
    dq_t = scale S_t do_t

Backward in time:

    dS_t += scale q_t do_t^T
    dk_t = dS_t v_t
    dv_t = dS_t^T k_t
    dS_{t-1} = e^{gk_t} dS_t e^{gv_t}

From these, with T the last token:

    dgk_t = sum_{s >= t} (q dq - k dk)_s + rowsum(S_T * dS_T)
    dgv_t = sum_{s >= t} (o do - v dv)_s + colsum(S_T * dS_T)
"""

import torch
from torch import Tensor

from fla.backends._gates import MIN_LOG_DECAY
from fla.backends.decay import Problem
from fla.backends.torch._layout import Layout


def forward(problem: Problem, output_final_state: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    o, state, _ = _forward_in_time(problem, dtype)
    return o.to(problem.output_dtype), state if output_final_state else None


def backward(
    problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    do = do.to(dtype)
    o, final_state, dq = _forward_in_time(problem, dtype, do)
    layout, q, k, v, decays = _token_by_token(problem, dtype)
    d_out = layout.split(do)[:, :, 0] * problem.scale
    dk, dv = torch.empty_like(q), torch.empty_like(v)
    end = problem.q.new_zeros(problem.state_shape, dtype=dtype) if dht is None else dht.to(dtype)
    state = end.clone()
    for token, row in layout.steps()[::-1]:
        state[row] += q[token][..., None] * d_out[token][..., None, :]
        dk[token] = (state[row] @ v[token][..., None])[..., 0]
        dv[token] = (k[token][..., None, :] @ state[row])[..., 0, :]
        state[row] *= _decay_of_state(decays, token)
    dk, dv = layout.join(dk[:, :, None]), layout.join(dv[:, :, None])
    dgk = dgv = dg = None
    if needs_gates:
        change = final_state * end
        key = _suffix_sums(layout, problem.q * dq - problem.k * dk, change.sum(-1))
        dgk = key if problem.gk is not None else None
        dg = key.sum(-1) if problem.g is not None else None
        dgv = _suffix_sums(layout, o * do - problem.v * dv, change.sum(-2))
    return {"q": dq, "k": dk, "v": dv, "g": dg, "gk": dgk, "gv": dgv, "initial_state": state}


def _token_by_token(problem: Problem, dtype: torch.dtype):
    """The layout, q, k and v as `[tokens, H, D]`, and the decays of key and value channels (each may be None)."""
    layout = Layout(problem.q.shape, problem.cu_seqlens, problem.q.device, 1)
    q, k, v = (layout.split(x.to(dtype))[:, :, 0] for x in (problem.q, problem.k, problem.v))
    key = problem.gk
    if problem.g is not None:
        scalar = problem.g[..., None]
        key = scalar if key is None else key + scalar
    elif problem.g_gamma is not None:
        scalar = problem.g_gamma[:, None].expand(*problem.q.shape[:3], 1)
        key = scalar if key is None else key + scalar
    gates = [None if x is None else x.double().clamp(min=MIN_LOG_DECAY).exp().to(dtype) for x in (key, problem.gv)]
    return layout, q, k, v, [None if x is None else layout.split(x)[:, :, 0] for x in gates]


def _decay_of_state(decays: list[Tensor | None], token: Tensor) -> Tensor | float:
    """The outer product of `e^{gk}` and `e^{gv}` of some tokens, which multiplies states `[., H, K, V]`."""
    key, value = decays
    result: Tensor | float = 1.0
    if key is not None:
        result = result * key[token][..., None]
    if value is not None:
        result = result * value[token][..., None, :]
    return result


def _forward_in_time(problem: Problem, dtype: torch.dtype, do: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final states and the gradient of q, which is undefined without `do`."""
    layout, q, k, v, decays = _token_by_token(problem, dtype)
    d_out = None if do is None else layout.split(do)[:, :, 0]
    o, dq = torch.empty_like(v), torch.empty_like(q)
    state = problem.q.new_zeros(problem.state_shape, dtype=dtype)
    if problem.initial_state is not None:
        state += problem.initial_state
    for token, row in layout.steps():
        state[row] = state[row] * _decay_of_state(decays, token) + k[token][..., None] * v[token][..., None, :]
        o[token] = (q[token][..., None, :] @ state[row])[..., 0, :]
        if d_out is not None:
            dq[token] = (state[row] @ d_out[token][..., None])[..., 0]
    o, dq = (layout.join(x[:, :, None]) * problem.scale for x in (o, dq))
    return o, state, dq


def _suffix_sums(layout: Layout, row: Tensor, change: Tensor) -> Tensor:
    """The sum of `row` from every token to the end of its sequence, plus `change`, the share of the final state."""
    row = layout.split(row)[:, :, 0]
    running = change.clone()
    sums = torch.empty_like(row)
    for token, sequence in layout.steps()[::-1]:
        running[sequence] += row[token]
        sums[token] = running[sequence]
    return layout.join(sums[:, :, None])
