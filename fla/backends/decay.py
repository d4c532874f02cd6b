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
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fla.backends import family, resolve
from fla.varlen import check_cu_seqlens

FAMILY = "decay"


@dataclass(slots=True, eq=False)  # not frozen: that makes it three times as slow to build
class Problem:
    """One call, all tensors contiguous. `form`: "chunk" or "recurrent"; `wide`: outputs in float32 at least.

    `keeps`: a backward will follow, for which the backend's forward may leave tensors in `kept` and `prepared`, and may
    put in place of q and k what it made of them in their shapes and dtypes: the backward's problem has all of these.
    `begins` `[T]`: the first token of each token's sequence, of a pack that the backend computes as one row.
    """

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
    keeps: bool = False
    kept: Tensor | None = None
    prepared: Tensor | None = None
    begins: Tensor | None = None

    @property
    def lengths(self) -> Tensor | None:
        """`cu_seqlens` of sequences that are computed one by one. None: the rows are, all of one length."""
        return self.cu_seqlens if self.begins is None else None

    @property
    def pack(self) -> Tensor | None:
        """What tells a chunk kernel the sequences of a pack."""
        return self.cu_seqlens if self.begins is None else self.begins

    @property
    def num_states(self) -> int:
        return self.state_shape[0]

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        B, _, H, K = self.q.shape
        bounds = self.lengths
        return (B if bounds is None else bounds.shape[0] - 1, H, K, self.v.shape[3])

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.promote_types(self.v.dtype, torch.float32) if self.wide else self.v.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Gradients(NamedTuple):
    """Of the inputs, in any dtypes. `final`: a gate's gradient is 0 already where the gate is below -16."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    gv: Tensor | None
    initial_state: Tensor | None
    final: bool = False


def chunk(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    g_gamma=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    wide=False,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """Parallel over chunks of tokens: training and prefill. `state_v_first`: states are `[N, H, V, K]`."""
    decays = (g, gk, None, g_gamma)
    return _call(
        "chunk", q, k, v, decays, scale, initial_state, output_final_state, state_v_first, cu_seqlens, wide, backend, op
    )


def recurrent(
    q,
    k,
    v,
    *,
    g=None,
    gk=None,
    gv=None,
    g_gamma=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    reverse=False,
    state_v_first=False,
    cu_seqlens=None,
    wide=False,
    backend=None,
    op=None,
) -> tuple[Tensor, Tensor | None]:
    """Token by token: decoding and short inputs.

    Options as in `chunk`, and `gv`; `reverse` runs from the last token to the first.
    """
    packed = cu_seqlens is not None
    if reverse:
        # the problem backwards in time: a packed row is read from its end, so its sequences change places too
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
        g, gk, gv = (None if x is None else x.flip(1) for x in (g, gk, gv))
        if packed:
            cu_seqlens = q.shape[1] - cu_seqlens.flip(0)
            initial_state = None if initial_state is None else initial_state.flip(0)
    decays = (g, gk, gv, g_gamma)
    o, state = _call(
        "recurrent",
        q,
        k,
        v,
        decays,
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
        wide,
        backend,
        op,
    )
    if reverse:
        o = o.flip(1)
        state = state.flip(0) if packed and state is not None else state
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


def _call(form, q, k, v, decays, scale, state, output_final_state, state_v_first, cu_seqlens, wide, backend, op):
    g, gk, gv, g_gamma = decays
    if state_v_first and state is not None:
        state = state.mT
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = resolve(FAMILY, q, backend)
    if g_gamma is not None and g_gamma.requires_grad:
        # one number a head, summed over all tokens: its terms need more digits than 16 bits
        g, g_gamma = g_gamma.to(torch.promote_types(g_gamma.dtype, torch.float32)).expand(q.shape[:3]), None
    if torch.compiler.is_compiling():
        tensors = (q, k, v, g, gk, gv, g_gamma, state, cu_seqlens)
        o, state = _operator(*tensors, scale, form, wide, output_final_state, backend)
    else:
        module = family(FAMILY, backend, op)
        if torch.is_grad_enabled() and _needs_gradient(q, k, v, g, gk, gv, state):
            others = (g_gamma, cu_seqlens, scale, form, wide, module, output_final_state)
            o, state = _Function.apply(q, k, v, g, gk, gv, state, others)  # it takes its time over every argument
        else:
            problem = _problem(q, k, v, g, gk, gv, g_gamma, state, cu_seqlens, scale, form, wide)
            o, state = _run(problem, output_final_state, module)
    if not output_final_state:
        return o, None
    return o, state.mT if state_v_first else state


def _needs_gradient(q, k, v, g, gk, gv, state) -> bool:
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return any(x is not None and x.requires_grad for x in (g, gk, gv, state))


def _problem(q, k, v, g, gk, gv, g_gamma, state, cu_seqlens, scale, form, wide) -> Problem:
    return Problem(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if g is None else g.contiguous(),
        None if gk is None else gk.contiguous(),
        None if gv is None else gv.contiguous(),
        None if g_gamma is None else g_gamma.contiguous(),
        None if state is None else state.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        scale,
        form,
        wide,
    )


def _run(problem: Problem, output_final_state: bool, module) -> tuple[Tensor, Tensor | None]:
    """The backend's forward."""
    q, v = problem.q, problem.v
    if problem.cu_seqlens is not None:
        check_cu_seqlens(problem.cu_seqlens, q.shape[1])
    if q.numel() == 0 or v.numel() == 0:
        return v.new_zeros(v.shape, dtype=problem.output_dtype), _idle_state(problem) if output_final_state else None
    if _autocasts(q):
        with torch.autocast(q.device.type, enabled=False):  # the kernels choose their precision themselves
            return module.forward(problem, output_final_state)
    return module.forward(problem, output_final_state)


def _autocasts(x: Tensor) -> bool:
    # asked first, for the context costs more than the rest of a call
    return torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type)


def _idle_state(problem: Problem) -> Tensor:
    """The final state of a call without tokens: the initial one."""
    state = problem.q.new_zeros(problem.state_shape, dtype=problem.state_dtype)
    return state if problem.initial_state is None else state + problem.initial_state


def _gradients(
    problem: Problem, do: Tensor, dht: Tensor | None, needs_gates: bool, module
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, gk, gv, initial_state in their dtypes."""
    q, v, state = problem.q, problem.v, problem.initial_state
    if q.numel() == 0 or v.numel() == 0:
        inputs = (q, problem.k, v, problem.g, problem.gk, problem.gv, None if dht is not None else state)
        *found, dh0 = (None if x is None else torch.zeros_like(x) for x in inputs)
        return (*found, dh0 if dht is None or state is None else dht.to(state.dtype))
    do = do.contiguous() if do.dtype == v.dtype else do.to(v.dtype).contiguous()
    dht = None if dht is None else dht.contiguous()
    if _autocasts(q):
        with torch.autocast(q.device.type, enabled=False):
            found = module.backward(problem, do, dht, needs_gates)
    else:
        found = module.backward(problem, do, dht, needs_gates)
    dq, dk, dv, dg, dgk, dgv, dh0, final = found
    dead = not final and q.dtype != torch.float64
    return (
        _as(dq, q),
        _as(dk, problem.k),
        _as(dv, v),
        _gate_gradient(dg, problem.g, dead),
        _gate_gradient(dgk, problem.gk, dead),
        _gate_gradient(dgv, problem.gv, dead),
        None if dh0 is None or state is None else _as(dh0, state),
    )


def _as(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient if gradient.dtype == x.dtype else gradient.to(x.dtype)


def _gate_gradient(gradient: Tensor | None, gate: Tensor | None, dead: bool) -> Tensor | None:
    """In the gate's dtype, and if `dead` 0 where the gate is below -16: there it is rounding noise (its true size is
    under e^-16)."""
    if gradient is None or gate is None:
        return None
    return _as(gradient.masked_fill(gate < DEAD_LOG_DECAY, 0.0) if dead else gradient, gate)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, gk, gv, state, others):
        g_gamma, cu_seqlens, scale, form, wide, module, output_final_state = others
        problem = _problem(q, k, v, g, gk, gv, g_gamma, state, cu_seqlens, scale, form, wide)
        problem.keeps = True
        results = _run(problem, output_final_state, module)
        ctx.save_for_backward(
            problem.q,
            problem.k,
            problem.v,
            problem.g,
            problem.gk,
            problem.gv,
            problem.g_gamma,
            problem.initial_state,
            problem.cu_seqlens,
            problem.kept,
            problem.prepared,
            problem.begins,
        )
        ctx.settings = scale, form, wide, module
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, do, dht):
        if torch.is_grad_enabled():
            return _differentiated_twice(ctx, do, dht)
        return _input_gradients(ctx, do, dht)


def _input_gradients(ctx, do, dht):
    *tensors, kept, prepared, begins = ctx.saved_tensors
    scale, form, wide, module = ctx.settings
    do = torch.zeros_like(tensors[2]) if do is None else do
    needs = ctx.needs_input_grad
    problem = Problem(*tensors, scale, form, wide, kept=kept, prepared=prepared, begins=begins)
    found = _gradients(problem, do, dht, needs[3] or needs[4] or needs[5], module)
    return (*found, None)


# Apart, because its wrapping costs 4 us a call and matters only when the gradient itself is to be differentiated.
_differentiated_twice = torch.autograd.function.once_differentiable(_input_gradients)


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
    problem = _problem(q, k, v, g, gk, gv, g_gamma, initial_state, cu_seqlens, scale, form, wide)
    o, state = _run(problem, output_final_state, family(FAMILY, backend))
    return o, o.new_empty(0, dtype=problem.state_dtype) if state is None else state


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
    found = _gradients(problem, do, dht, needs_gates, family(FAMILY, backend))
    return [q.new_empty(0) if d is None else _own(d, dht) for d in found]


def _own(result: Tensor, dht: Tensor | None) -> Tensor:
    """`result`, or a copy of it where it is an input or shares its memory: the results of an operator must not."""
    shares = result.untyped_storage().nbytes() != result.numel() * result.element_size()
    return result.clone() if shares or result is dht else result


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
    """The seven gradients at the places of the fourteen inputs."""
    tensors = ctx.saved_tensors
    dht = dht if ctx.output_final_state else None
    found = _operator_backward(do, dht, ctx.needs_gates, *tensors, *ctx.settings)
    dq, dk, dv, dg, dgk, dgv, dh0 = found
    gradients = (dq, dk, dv, dg, dgk, dgv, None, dh0)
    kept = tuple(d if need else None for d, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*kept, None, None, None, None, None, None)


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
