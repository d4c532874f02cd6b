"""The family `delta`: linear attention that writes what a key does not yet give, for every backend.

    S'_t = diag(exp(g_t + gk_t)) S_{t-1} diag(exp(gv_t))               S in R^{K x V}
    u_t  = beta_t * (v_t - S'_t^T k_t)
    S_t  = S'_t + k_t u_t^T
    o_t  = scale * S_t^T q_t

`v`, the gates, `beta` and the states have HV heads, a multiple of the H heads of `q` and `k`: value head h reads key
head `h // (HV / H)`. The decays are natural logs. There may be none, or

- one per head and token: `g` [B, T, HV]
- one per key channel: `gk` [B, T, HV, K]; with `g` too, both decay the state
- in the recurrent form one per value channel: `gv` [B, T, HV, V]

`beta` is [B, T, HV], in the recurrent form also [B, T, HV, V]; None means ones. On request a backend computes from raw
inputs, in this order:

- `qk_l2norm`: q and k become `x / sqrt(sum x^2 + 1e-6)`.
- `gate_in_op`: `g`, or `gk` where there is no `g`, becomes `-exp(A_log) softplus(g + dt_bias)`; with a `lower_bound`
  it becomes `lower_bound sigmoid(exp(A_log) (g + dt_bias))`. `A_log` is [HV], `dt_bias` of the shape of the gate of one
  token; None means 0.
- `beta_sigmoid`: `beta` becomes `sigmoid(beta)`, with `neg_eigval` `2 sigmoid(beta)`.

The gradient of a decay below -16 nats is 0. `fla.backends._recurrence` says which functions a backend has. A backend
also has `chunk_states(problem, output_final_state) -> (o, final state or None, states)`, without gradients: the states
`[chunks, HV, K, V]` before each chunk of CHUNK tokens, those of a sequence in succession.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fla.backends import family, resolve
from fla.backends._recurrence import Family, Recurrence
from fla.varlen import check_cu_seqlens

CHUNK = 64  # tokens between the states that `chunk_states` returns
L2_EPS = 1e-6


@dataclass(slots=True, eq=False)
class Problem(Recurrence):
    """The arguments of one call. `form`: "chunk" or "recurrent"."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    gv: Tensor | None
    beta: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    form: str
    qk_l2norm: bool = False
    gate_in_op: bool = False
    lower_bound: float | None = None
    beta_sigmoid: bool = False
    neg_eigval: bool = False

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        B, _, HV, V = self.v.shape
        bounds = self.cu_seqlens
        return (B if bounds is None else bounds.shape[0] - 1, HV, self.q.shape[3], V)

    @property
    def output_shape(self) -> torch.Size:
        return self.v.shape

    @property
    def is_empty(self) -> bool:
        return self.q.numel() == 0 or self.v.numel() == 0


FAMILY = Family("delta", Problem)


class Options(NamedTuple):
    """What the op computes from raw inputs: the last fields of `Problem`."""

    qk_l2norm: bool = False
    gate_in_op: bool = False
    lower_bound: float | None = None
    beta_sigmoid: bool = False
    neg_eigval: bool = False


NOTHING_RAW = Options()


def chunk(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    beta=None,
    A_log=None,
    dt_bias=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    options=NOTHING_RAW,
    state_v_first=False,
    cu_seqlens=None,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """The form that is parallel over chunks of tokens, for training and prefill.

    `state_v_first`: states are `[N, HV, V, K]`. `op`: the op's name in logs and messages.
    """
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    tensors = (q, k, v, g, gk, None, beta, A_log, dt_bias, initial_state, cu_seqlens)
    o, state = FAMILY.call((*tensors, _scale(q, scale), "chunk", *options), output_final_state, backend, op)
    return o, state.mT if state_v_first and state is not None else state


def recurrent(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    gv=None,
    beta=None,
    A_log=None,
    dt_bias=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    options=NOTHING_RAW,
    state_v_first=False,
    cu_seqlens=None,
    inplace_final_state=False,
    state_indices=None,
    backend=None,
    op=None,
    called=MappingProxyType({}),
) -> tuple[Tensor, Tensor | None]:
    """The form that goes token by token, for decoding and short inputs.

    It takes the options of `chunk`, `gv` and a `beta` per value channel. `inplace_final_state` and `state_indices` are
    for decoding on states that the caller owns (`fla.backends._step`). `called`: gates that the op has under other
    names -> these names, for messages.
    """
    steps = inplace_final_state or state_indices is not None
    if state_v_first and initial_state is not None and not steps:
        initial_state = initial_state.mT
    tensors = (q, k, v, g, gk, gv, beta, A_log, dt_bias, initial_state, cu_seqlens)
    values = (*tensors, _scale(q, scale), "recurrent", *options)
    if steps:
        return FAMILY.step(
            values,
            state_indices=state_indices,
            inplace_final_state=inplace_final_state,
            output_final_state=output_final_state,
            state_v_first=state_v_first,
            backend=backend,
            op=op,
            called=called,
        )
    o, state = FAMILY.call(values, output_final_state, backend, op)
    return o, state.mT if state_v_first and state is not None else state


def parallel(
    q, k, v, beta, *, scale=None, output_attentions=False, cu_seqlens=None, backend=None, op=None
) -> tuple[Tensor, Tensor | None]:
    """The chunk form without gates and states, and with `output_attentions` the attention matrix `A` of `o = A v`."""
    if output_attentions and cu_seqlens is not None:
        raise ValueError(
            "output_attentions=True needs a batch without cu_seqlens: packed sequences have no common matrix"
        )
    o, _ = chunk(q, k, v, beta=beta, scale=scale, cu_seqlens=cu_seqlens, backend=backend, op=op)
    return o, attention_matrix(q, k, beta, scale=scale) if output_attentions else None


@torch.no_grad()
def attention_matrix(q, k, beta, *, scale=None) -> Tensor:
    """`A = scale tril(Q K^T) (I + diag(beta) stril(K K^T))^-1 diag(beta)`: `[B, H, T, T]` in float32."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = (x.transpose(1, 2).to(dtype) for x in (q, k))
    strength = beta.transpose(1, 2).to(dtype)
    lower = (k @ k.mT).tril(-1) * strength[..., None]
    writes = torch.linalg.solve_triangular(lower, torch.diag_embed(strength), upper=False, unitriangular=True)
    return (q @ k.mT * _scale(q, scale)).tril() @ writes


@torch.no_grad()
def chunk_states(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    beta=None,
    A_log=None,
    dt_bias=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    options=NOTHING_RAW,
    state_v_first=False,
    cu_seqlens=None,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`chunk` without gradients, and the states before each chunk of CHUNK tokens: `[B, NT, HV, K, V]`.

    NT counts the chunks of a row: with `cu_seqlens` those of all sequences, in succession.
    """
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    tensors = (q, k, v, g, gk, None, beta, A_log, dt_bias, initial_state, cu_seqlens)
    module = family(FAMILY.name, resolve(FAMILY.name, q, backend), op)
    problem = FAMILY.make(*tensors, _scale(q, scale), "chunk", *options)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[1])
    if problem.is_empty:
        o, state = FAMILY.call((*tensors, 1.0, "chunk", *options), output_final_state, backend, op)
        states = q.new_zeros(0, *problem.state_shape[1:], dtype=problem.state_dtype)
    else:
        with torch.autocast(problem.device_type, enabled=False):
            o, state, states = module.chunk_states(problem, output_final_state)
    states = states.unflatten(0, (len(q), -1)) if len(states) else states[None].expand(len(q), *states.shape)
    if state_v_first:
        state, states = None if state is None else state.mT, states.mT
    return o, state, states


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
