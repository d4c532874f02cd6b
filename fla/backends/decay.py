"""The family `decay`: linear attention whose state decays, for every backend.

    S_t = diag(exp(gk_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

Log decays are natural logs. There may be none, or

- one per head, the same for all tokens: `g_gamma` [H]
- one per head and token: `g` [B, T, H]
- one per key channel: `gk` [B, T, H, K]
- in the recurrent form one per value channel: `gv` [B, T, H, V]

The gradient of a gate below -16 nats is 0. `fla.backends._recurrence` says which functions a backend has.
"""

import functools
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from fla.backends._gates import MIN_LOG_DECAY
from fla.backends._recurrence import Family, Recurrence
from fla.backends._reverse import refuse_steps, turned_around, turned_back


@dataclass(slots=True, eq=False)
class Problem(Recurrence):
    """The arguments of one call.

    `form`: "chunk" or "recurrent". `wide`: the output is float32 even if `v` has 16 bits. `mild`: `g_gamma` is known to
    hold weak decays, those of `retention_decay`.
    """

    constants: ClassVar[tuple[str, ...]] = ("g_gamma", "cu_seqlens")

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    gv: Tensor | None
    initial_state: Tensor | None
    g_gamma: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    form: str
    wide: bool = False
    mild: bool = False

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
        return torch.promote_types(self.v.dtype, torch.float32) if self.wide else self.v.dtype

    @property
    def is_empty(self) -> bool:
        return self.q.numel() == 0 or self.v.numel() == 0


FAMILY = Family("decay", Problem)


def chunk(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    g_gamma=None,
    mild=False,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    wide=False,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """The form that is parallel over chunks of tokens, for training and prefill.

    `state_v_first`: states are `[N, H, V, K]`. `op`: the op's name in logs and messages.
    """
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    values = _values(q, k, v, g, gk, None, initial_state, g_gamma, cu_seqlens, scale, "chunk", wide, mild)
    o, state = FAMILY.call(values, output_final_state, backend, op)
    return o, state.mT if state_v_first and state is not None else state


def recurrent(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    gv=None,
    g_gamma=None,
    mild=False,
    scale=None,
    initial_state=None,
    output_final_state=False,
    reverse=False,
    state_v_first=False,
    cu_seqlens=None,
    inplace_final_state=False,
    state_indices=None,
    wide=False,
    called=MappingProxyType({}),
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """The form that goes token by token, for decoding and short inputs.

    It takes the options of `chunk` and `gv`. `reverse` runs from the last token to the first. `inplace_final_state` and
    `state_indices` are for decoding on states that the caller owns (`fla.backends._step`), without `reverse`. `called`:
    what the op calls an argument that has another name here, for messages.
    """
    if inplace_final_state or state_indices is not None:
        if reverse:
            refuse_steps(inplace_final_state)
        return FAMILY.step(
            _values(q, k, v, g, gk, gv, initial_state, g_gamma, cu_seqlens, scale, "recurrent", wide, mild),
            state_indices=state_indices,
            inplace_final_state=inplace_final_state,
            output_final_state=output_final_state,
            state_v_first=state_v_first,
            backend=backend,
            op=op,
            called=called,
        )
    if reverse:
        tensors, initial_state, cu_seqlens = turned_around((q, k, v, g, gk, gv), initial_state, cu_seqlens)
        q, k, v, g, gk, gv = tensors
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    values = _values(q, k, v, g, gk, gv, initial_state, g_gamma, cu_seqlens, scale, "recurrent", wide, mild)
    o, state = FAMILY.call(values, output_final_state, backend, op)
    if reverse:
        o, state = turned_back(o, state, cu_seqlens is not None)
    return o, state.mT if state_v_first and state is not None else state


def parallel(
    q,
    k,
    v,
    *,
    g=None,
    g_gamma=None,
    mild=False,
    scale=None,
    output_attentions=False,
    cu_seqlens=None,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk form without states, and with `output_attentions` the attention matrix `A` of `o = A v`."""
    if output_attentions and cu_seqlens is not None:
        raise ValueError(
            "output_attentions=True needs a batch without cu_seqlens: packed sequences have no common matrix"
        )
    o, _ = chunk(q, k, v, g=g, g_gamma=g_gamma, mild=mild, scale=scale, cu_seqlens=cu_seqlens, backend=backend, op=op)
    return o, attention_matrix(q, k, g, g_gamma, scale=scale) if output_attentions else None


@torch.no_grad()
def attention_matrix(q, k, g=None, g_gamma=None, *, scale=None) -> Tensor:
    """`A_ij = scale (q_i . k_j) exp(G_i - G_j)` for `j <= i`, else 0: `[B, H, T, T]` in float32.

    `G` is the running sum of the log decay.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype)) * scale
    if g_gamma is not None:
        g = g_gamma.expand(*q.shape[:3])
    if g is not None:
        total = g.transpose(1, 2).double().clamp(min=MIN_LOG_DECAY).cumsum(-1)
        scores = scores * (total[..., :, None] - total[..., None, :]).tril().exp().to(dtype)
    return scores.tril()


def _values(q, k, v, g, gk, gv, initial_state, g_gamma, cu_seqlens, scale, form, wide, mild) -> tuple:
    """The values of the fields of `Problem`, in their order."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if g_gamma is not None and g_gamma.requires_grad:
        # its gradient is a sum over all tokens, whose terms need more digits than 16-bit dtypes have
        g, g_gamma = g_gamma.to(torch.promote_types(g_gamma.dtype, torch.float32)).expand(q.shape[:3]), None
    return q, k, v, g, gk, gv, initial_state, g_gamma, cu_seqlens, scale, form, wide, mild


def check_states(q, k, v, initial_state, cu_seqlens, state_indices, inplace_final_state) -> None:
    """Raise ValueError or TypeError unless `recurrent` can use the caller's states as they are, without a copy."""
    values = (q, k, v, None, None, None, initial_state, None, cu_seqlens, 1.0, "recurrent", False, False)
    FAMILY.check_states(values, state_indices, inplace_final_state)


def combine(g: Tensor | None, g_gamma: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`g` and `g_gamma` as the one that `chunk` and `recurrent` take: both given, their sum in at least float32."""
    if g is None or g_gamma is None:
        return g, g_gamma
    return g.to(torch.promote_types(g.dtype, torch.float32)) + g_gamma, None


def retention_decay(num_heads: int, device: torch.device) -> Tensor:
    """RetNet's constant log decays `log(1 - 2^(-5 - h))` of the heads h, float64 `[H]`."""
    if torch.compiler.is_compiling():
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, device=device, dtype=torch.float64)))
    return _retention_decay(num_heads, device)


@functools.cache
def _retention_decay(num_heads: int, device: torch.device) -> Tensor:
    # cached: a copy from the host in every call costs more than a kernel, and a CUDA graph cannot capture it
    values = [math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]
    with torch.inference_mode(False):  # a tensor of inference mode could not be used in training afterwards
        return torch.tensor(values, dtype=torch.float64, device=device)
