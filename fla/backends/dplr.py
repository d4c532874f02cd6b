"""The family `dplr`: a state whose transition is a diagonal plus a low-rank matrix, for every backend.

    S_t = diag(exp(gk_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

`a` reads the state as it is before the decay. Log decays `gk` `[B, T, H, K]` are natural logs; without them the
transition is the identity plus a low-rank matrix. The gradient of a gate below -16 nats is 0.
`fla.backends._recurrence` says which functions a backend has.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fla.backends._recurrence import Family, Recurrence
from fla.backends._reverse import refuse_steps, turned_around, turned_back


@dataclass(slots=True, eq=False)
class Problem(Recurrence):
    """The arguments of one call. `form`: "chunk" or "recurrent"."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    gk: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    form: str

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        B, _, H, K = self.q.shape
        bounds = self.cu_seqlens
        return (B if bounds is None else bounds.shape[0] - 1, H, K, self.v.shape[3])

    @property
    def output_shape(self) -> torch.Size:
        return self.v.shape

    @property
    def output_dtype(self) -> torch.dtype:
        return self.v.dtype


FAMILY = Family("dplr", Problem)


def chunk(
    q,
    k,
    v,
    a,
    b,
    *,
    gk=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """The form that is parallel over chunks of tokens, for training and prefill. `op`: its name in messages."""
    values = _values(q, k, v, a, b, gk, initial_state, cu_seqlens, scale, "chunk")
    return FAMILY.call(values, output_final_state, backend, op)


def recurrent(
    q,
    k,
    v,
    a,
    b,
    *,
    gk=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    reverse=False,
    cu_seqlens=None,
    inplace_final_state=False,
    state_indices=None,
    called=MappingProxyType({}),
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """The form for decoding and short inputs.

    It takes the options of `chunk`. `reverse` runs from the last token to the first. `inplace_final_state` and
    `state_indices` are for decoding on states that the caller owns (`fla.backends._step`), without `reverse`. `called`:
    what the op calls an argument that has another name here, for messages.
    """
    if inplace_final_state or state_indices is not None:
        if reverse:
            refuse_steps(inplace_final_state)
        return FAMILY.step(
            _values(q, k, v, a, b, gk, initial_state, cu_seqlens, scale, "recurrent"),
            state_indices=state_indices,
            inplace_final_state=inplace_final_state,
            output_final_state=output_final_state,
            backend=backend,
            op=op,
            called=called,
        )
    if reverse:
        tensors, initial_state, cu_seqlens = turned_around((q, k, v, a, b, gk), initial_state, cu_seqlens)
        q, k, v, a, b, gk = tensors
    values = _values(q, k, v, a, b, gk, initial_state, cu_seqlens, scale, "recurrent")
    o, state = FAMILY.call(values, output_final_state, backend, op)
    return turned_back(o, state, cu_seqlens is not None) if reverse else (o, state)


def _values(q, k, v, a, b, gk, initial_state, cu_seqlens, scale, form) -> tuple:
    """The values of the fields of `Problem`, in their order."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return q, k, v, a, b, gk, initial_state, cu_seqlens, scale, form
