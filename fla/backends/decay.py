"""The family `decay`, for every backend: what it computes, its gradient, and its one operator boundary.

    S_t = diag(exp(gk_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t

The decay is none, constant per head (`g_gamma` [H]), per head and token (`g` [B, T, H]), per key channel (`gk`
[B, T, H, K]), and in the recurrent form also per value channel (`gv` [B, T, H, V]); all are natural logs. A backend
module `fla.backends.<backend>.decay` computes `forward(problem, output_final_state) -> (o, final state)` and
`backward(problem, do, dht, needs_gates) -> Gradients`.

`torch.compile` sees one operator, `fla::decay`, with a registered gradient; eager calls skip its overhead.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fla.backends import family, resolve
from fla.varlen import check_cu_seqlens

FAMILY = "decay"


@dataclass(frozen=True)
class Problem:
    """One call, all tensors contiguous. `form`: "chunk" or "recurrent"; `wide`: outputs in float32 at least."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    gv: Tensor | None
    g_gamma: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    form: str
    wide: bool = False

    @property
    def num_states(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return (self.num_states, self.q.shape[2], self.q.shape[3], self.v.shape[3])

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.promote_types(self.v.dtype, torch.float32) if self.wide else self.v.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    gv: Tensor | None
    initial_state: Tensor | None


def chunk(
    q, k, v, *, scale=None, output_final_state=False, backend=None, op=None, **options
) -> tuple[Tensor, Tensor | None]:
    """Parallel over chunks of tokens: training and prefill.

    Options: `g`, `gk`, `g_gamma`, `initial_state`, `state_v_first` (states are `[N, H, V, K]`), `cu_seqlens`, `wide`.
    """
    return _call("chunk", q, k, v, scale, output_final_state, backend, op, **options)


def recurrent(
    q, k, v, *, scale=None, output_final_state=False, reverse=False, backend=None, op=None, **options
) -> tuple[Tensor, Tensor | None]:
    """Token by token: decoding and short inputs.

    Options as in `chunk`, and `gv`; `reverse` runs from the last token to the first.
    """
    if reverse:
        q, k, v, options = _flip(q, k, v, options)
    o, state = _call("recurrent", q, k, v, scale, output_final_state, backend, op, **options)
    if reverse:
        o = o.flip(1)
        state = state if state is None or options.get("cu_seqlens") is None else state.flip(0)
    return o, state


def parallel(
    q, k, v, *, g=None, g_gamma=None, scale=None, output_attentions=False, cu_seqlens=None, backend=None, op=None
) -> tuple[Tensor, Tensor | None]:
    """The chunk form without states, and on request the attention matrix that it equals."""
    if output_attentions and cu_seqlens is not None:
        raise ValueError(
            "output_attentions=True needs a batch without cu_seqlens: packed sequences have no common matrix"
        )
    o, _ = chunk(q, k, v, g=g, g_gamma=g_gamma, scale=scale, cu_seqlens=cu_seqlens, backend=backend, op=op)
    return o, attention_matrix(q, k, g, g_gamma, scale=scale) if output_attentions else None


def _flip(q, k, v, options):
    """The problem backwards in time: a packed row is read from its end, so its sequences change places too."""
    options = {name: x.flip(1) if x is not None and name in ("g", "gk", "gv") else x for name, x in options.items()}
    cu_seqlens, state = options.get("cu_seqlens"), options.get("initial_state")
    if cu_seqlens is not None:
        options["cu_seqlens"] = q.shape[1] - cu_seqlens.flip(0)
        options["initial_state"] = None if state is None else state.flip(0)
    return q.flip(1), k.flip(1), v.flip(1), options


@torch.no_grad()
def attention_matrix(q, k, g=None, g_gamma=None, *, scale=None) -> Tensor:
    """`A_ij = scale (q_i . k_j) exp(G_i - G_j)` for `j <= i`, `[B, H, T, T]` float32: what `parallel_*` can return."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype)) * scale
    if g_gamma is not None:
        g = g_gamma.expand(*q.shape[:3])
    if g is not None:
        total = g.transpose(1, 2).double().clamp(min=MIN_LOG_DECAY).cumsum(-1)
        scores = scores * (total[..., :, None] - total[..., None, :]).tril().exp().to(dtype)
    return scores.tril()


DEAD_LOG_DECAY = -16.0  # nats a step: what survives such a decay is below float32's digits
MIN_LOG_DECAY = -1000.0  # exp(-1000) is 0 in every dtype; finite, so that running sums of -inf gates stay numbers


def _call(
    form,
    q,
    k,
    v,
    scale,
    output_final_state,
    backend,
    op,
    g=None,
    gk=None,
    gv=None,
    g_gamma=None,
    initial_state=None,
    state_v_first=False,
    cu_seqlens=None,
    wide=False,
):
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = resolve(FAMILY, q, backend)
    if g_gamma is not None and g_gamma.requires_grad:
        # one number a head, summed over all tokens: its terms need more digits than 16 bits
        g, g_gamma = g_gamma.to(torch.promote_types(g_gamma.dtype, torch.float32)).expand(q.shape[:3]), None
    tensors = (q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens)
    if torch.compiler.is_compiling():
        o, state = _operator(*tensors, scale, form, wide, output_final_state, backend)
    else:
        family(FAMILY, backend, op)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            o, state = _Function.apply(*tensors, scale, form, wide, output_final_state, backend)
        else:
            o, state = _forward(*tensors, scale, form, wide, output_final_state, backend)
    if not output_final_state:
        return o, None
    return o, state.mT if state_v_first else state


def _problem(*args: Any) -> Problem:
    made: Any = (x.contiguous() if isinstance(x, Tensor) else x for x in args)
    return Problem(*made)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional[Tensor],
    gk: Optional[Tensor],
    gv: Optional[Tensor],
    g_gamma: Optional[Tensor],
    initial_state: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    scale: float,
    form: str,
    wide: bool,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`o`, and the final state (an empty tensor when it is not wanted: an operator returns tensors)."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[1])
    problem = _problem(q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide)
    if q.numel() == 0 or v.numel() == 0:
        return v.new_zeros(v.shape, dtype=problem.output_dtype), _idle_state(problem, output_final_state)
    with torch.autocast(q.device.type, enabled=False):  # the kernels choose their precision themselves
        o, state = family(FAMILY, backend).forward(problem, output_final_state)
    return o, o.new_empty(0, dtype=problem.state_dtype) if state is None else state


def _idle_state(problem: Problem, wanted: bool) -> Tensor:
    """The final state of a call without tokens: the initial one."""
    if not wanted:
        return problem.q.new_empty(0, dtype=problem.state_dtype)
    state = problem.q.new_zeros(problem.state_shape, dtype=problem.state_dtype)
    return state if problem.initial_state is None else state + problem.initial_state


def _backward(
    do: Tensor,
    dht: Optional[Tensor],
    needs_gates: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional[Tensor],
    gk: Optional[Tensor],
    gv: Optional[Tensor],
    g_gamma: Optional[Tensor],
    initial_state: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    scale: float,
    form: str,
    wide: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of q, k, v, g, gk, gv, initial_state; an empty tensor stands for none."""
    problem = _problem(q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide)
    inputs = (q, k, v, g, gk, gv, initial_state)
    if q.numel() == 0 or v.numel() == 0:
        found = tuple(None if x is None else torch.zeros_like(x) for x in inputs[:6])
        found = (*found, None if initial_state is None else torch.zeros_like(initial_state) if dht is None else dht)
    else:
        dht = None if dht is None else dht.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            found = family(FAMILY, backend).backward(problem, do.to(v.dtype).contiguous(), dht, needs_gates)
    if q.dtype != torch.float64:
        found = (*found[:3], *(_alive(d, x) for d, x in zip(found[3:6], inputs[3:6], strict=True)), found[6])
    return [q.new_empty(0) if d is None or x is None else d.to(x.dtype) for d, x in zip(found, inputs, strict=True)]


def _alive(gradient: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """A gate's gradient, 0 where the gate is below -16: there it is rounding noise (its true size is under e^-16)."""
    if gradient is None or gate is None:
        return gradient
    return gradient.masked_fill(gate < DEAD_LOG_DECAY, 0.0)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide, output_final_state, backend
    ):
        tensors = tuple(
            x if x is None else x.contiguous() for x in (q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens)
        )
        o, state = _forward(*tensors, scale, form, wide, output_final_state, backend)
        ctx.needs_gates = any(ctx.needs_input_grad[3:6])
        ctx.save_for_backward(*tensors)
        ctx.settings = (scale, form, wide, backend)
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dht):
        tensors = ctx.saved_tensors
        if dht is not None and dht.numel() == 0:
            dht = None
        do = torch.zeros_like(tensors[2]) if do is None else do
        found = _backward(do, dht, ctx.needs_gates, *tensors, *ctx.settings)
        return _arrange(found, ctx.needs_input_grad)


def _arrange(found: list[Tensor], needed) -> tuple:
    """The seven gradients at the places of the fourteen inputs."""
    dq, dk, dv, dg, dgk, dgv, dh0 = found
    gradients = (dq, dk, dv, dg, dgk, dgv, None, dh0)
    kept = tuple(d if need and d is not None else None for d, need in zip(gradients, needed, strict=False))
    return (*kept, None, None, None, None, None, None)


_operator = torch.library.custom_op("fla::decay", _forward, mutates_args=())
_operator_backward = torch.library.custom_op("fla::decay_backward", _backward, mutates_args=())


@_operator.register_fake
def _(q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide, output_final_state, backend):
    problem = Problem(q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide)
    shape = problem.state_shape if output_final_state else (0,)
    return v.new_empty(v.shape, dtype=problem.output_dtype), q.new_empty(shape, dtype=problem.state_dtype)


@_operator_backward.register_fake
def _(do, dht, needs_gates, q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide, backend):
    inputs = (
        q,
        k,
        v,
        g if needs_gates else None,
        gk if needs_gates else None,
        gv if needs_gates else None,
        initial_state,
    )
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, scale, form, wide, output_final_state, backend = inputs
    ctx.needs_gates = any(x is not None for x in tensors[3:6])
    ctx.save_for_backward(*tensors)
    ctx.settings = (scale, form, wide, backend)
    ctx.output_final_state = output_final_state


def _operator_gradient(ctx, do, dht):
    tensors = ctx.saved_tensors
    dht = dht if ctx.output_final_state else None
    return _arrange(_operator_backward(do, dht, ctx.needs_gates, *tensors, *ctx.settings), ctx.needs_input_grad)


_operator.register_autograd(_operator_gradient, setup_context=_setup_context)


def combine(g: Tensor | None, g_gamma: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A per-token and a constant decay multiply: their logs add, into the per-token one, with float32's digits."""
    if g is None or g_gamma is None:
        return g, g_gamma
    return g.to(torch.promote_types(g.dtype, torch.float32)) + g_gamma, None


def retention_decay(num_heads: int, device: torch.device) -> Tensor:
    """RetNet's constant log decays, `log(1 - 2^(-5 - h))` for head `h`, float64 `[H]`."""
    if torch.compiler.is_compiling():
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, device=device, dtype=torch.float64)))
    return _retention_decay(num_heads, device)


@functools.cache
def _retention_decay(num_heads: int, device: torch.device) -> Tensor:
    # kept: a copy from the host on every call costs more than a kernel and cannot be captured in a CUDA graph
    values = [math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]
    decays = torch.tensor(values, dtype=torch.float64, device=device)
    _mild.add(id(decays))  # the cache keeps it, so the id stays its own
    return decays


_mild: set[int] = set()


def is_mild(g_gamma: Tensor) -> bool:
    """Whether these constant decays are known, without looking, to be weak: those that `retention_decay` made."""
    return id(g_gamma) in _mild
