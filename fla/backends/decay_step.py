"""Decoding for the family `decay` on states that a server owns: overwritten in place, or found in a pool by index.

The recurrence is that of `fla.backends.decay`. A backend module `fla.backends.<backend>.decay.step` computes
`step(problem, state_indices, output_final_state, in_place, v_first) -> (o, fresh final states or None)`, reading and
writing the states in the layout they have: a pool is never copied or transposed.

Inference only. `torch.compile` sees the operators `fla::decay_step` (which writes its argument `states`) and
`fla::decay_step_fresh`; eager calls skip their overhead.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from fla.backends import decay, family, resolve
from fla.backends.decay import FAMILY, Problem
from fla.varlen import check_cu_seqlens

MODULE = "decay.step"


def recurrent(q, k, v, *, state_indices=None, inplace_final_state=False, **options) -> tuple[Tensor, Tensor | None]:
    """`decay.recurrent`, or `step` where the caller owns the states."""
    if state_indices is None and not inplace_final_state:
        return decay.recurrent(q, k, v, **options)
    return step(q, k, v, state_indices=state_indices, inplace_final_state=inplace_final_state, **options)


def state_shapes(shapes: dict[str, str], state_indices: Tensor | None) -> dict[str, str]:
    """The shapes of an op's arguments; with indices its states are a pool of P slots."""
    if state_indices is None:
        return shapes
    return {name: "P" + shape[1:] if shape.startswith("N ") else shape for name, shape in shapes.items()}


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None,
    state_indices: Tensor | None = None,
    inplace_final_state: bool = False,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    wide: bool = False,
    backend: str | None = None,
    op: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`decay.recurrent` on `initial_state` `[N, H, K, V]`, or with `state_indices` `[N]` on a pool `[P, H, K, V]`.

    In place the final states overwrite the initial ones, and `initial_state` itself is returned. A sequence with the
    index -1 is skipped: its outputs are 0 and no state is touched. Raises ValueError or TypeError for states that
    cannot be used without a copy, for `reverse`, and where a gradient is needed.
    """
    tensors = (q, k, v, g, gk, gv, g_gamma)
    check(tensors, initial_state, state_indices, inplace_final_state, reverse, cu_seqlens)
    assert initial_state is not None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = resolve(FAMILY, q, backend)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        family(MODULE, backend, op)
    arguments = (*tensors, initial_state, cu_seqlens, state_indices, scale, state_v_first, wide)
    if inplace_final_state:
        o = (_operator if compiling else _in_place)(*arguments, backend)
        if not compiling and not initial_state.is_inference():
            torch.autograd.graph.increment_version(initial_state)
        return o, initial_state
    o, state = (_operator_fresh if compiling else _fresh)(*arguments, output_final_state, backend)
    return o, state if output_final_state else None


def check(
    tensors: tuple[Tensor | None, ...],
    states: Tensor | None,
    indices: Tensor | None,
    in_place: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> None:
    """ValueError or TypeError unless `states` can be used as they are; `tensors`: q, k, v and gates."""
    asked = "inplace_final_state" if in_place else "state_indices"
    if reverse:
        raise ValueError(f"reverse must be False with {asked}, got True: a state is taken on from its last token")
    q = tensors[0]
    assert q is not None
    if not isinstance(states, Tensor):
        raise ValueError(f"initial_state must be a tensor with {asked}: it holds the states, got {states}")
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    if states.dtype != expected:
        raise TypeError(f"initial_state must be {expected} with {asked}, got {states.dtype}")
    if not states.is_contiguous():
        raise ValueError(
            f"initial_state must be contiguous with {asked}, got strides {tuple(states.stride())} for the shape "
            f"{list(states.shape)}: a copy would not be the states that you own"
        )
    if torch.is_grad_enabled():
        names = ("q", "k", "v", "g", "gk", "gv", "g_gamma")
        for name, x in (("initial_state", states), *zip(names, tensors, strict=False)):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{asked} is for inference: {name} must not need a gradient, got requires_grad=True; "
                    "call under torch.no_grad()"
                )
    if indices is None:
        return
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"state_indices must be an int32 or int64 tensor, got {got}")
    if tuple(indices.shape) != (N,):
        raise ValueError(f"state_indices must have shape [N] with N = {N} sequences, got {list(indices.shape)}")
    if indices.device != q.device:
        raise ValueError(f"state_indices must be on {q.device} like q, got {indices.device}")


def _check_values(indices: Tensor | None, slots: int, in_place: bool) -> None:
    """Of a CPU tensor: reading them from a GPU would wait for it."""
    if indices is None or indices.device.type != "cpu":
        return
    used = [i for i in indices.tolist() if i != -1]
    for i in used:
        if not 0 <= i < slots:
            raise ValueError(f"state_indices must be -1 or slots of the pool, 0 to {slots - 1}, got {i}")
    if in_place and len(set(used)) < len(used):
        raise ValueError(f"state_indices must name a slot once with inplace_final_state, got {indices.tolist()}")


def gather(pool: Tensor, indices: Tensor | None) -> Tensor:
    """The states at `indices`; some number where there is none."""
    return pool if indices is None else pool[indices.clamp(min=0).long()]


def _in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional[Tensor],
    gk: Optional[Tensor],
    gv: Optional[Tensor],
    g_gamma: Optional[Tensor],
    states: Tensor,
    cu_seqlens: Optional[Tensor],
    state_indices: Optional[Tensor],
    scale: float,
    v_first: bool,
    wide: bool,
    backend: str,
) -> Tensor:
    _check_values(state_indices, states.shape[0], True)
    problem = _problem((q, k, v, g, gk, gv, g_gamma, states, cu_seqlens), scale, wide)
    if q.numel() == 0 or v.numel() == 0:
        return v.new_zeros(v.shape, dtype=problem.output_dtype)
    return family(MODULE, backend).step(problem, _contiguous(state_indices), True, True, v_first)[0]


def _fresh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional[Tensor],
    gk: Optional[Tensor],
    gv: Optional[Tensor],
    g_gamma: Optional[Tensor],
    states: Tensor,
    cu_seqlens: Optional[Tensor],
    state_indices: Optional[Tensor],
    scale: float,
    v_first: bool,
    wide: bool,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`o`, and the final states (an empty tensor when they are not wanted: an operator returns tensors)."""
    _check_values(state_indices, states.shape[0], False)
    problem = _problem((q, k, v, g, gk, gv, g_gamma, states, cu_seqlens), scale, wide)
    if q.numel() == 0 or v.numel() == 0:
        o, state = v.new_zeros(v.shape, dtype=problem.output_dtype), None
        if output_final_state:
            state = gather(states, state_indices).clone()
            if state_indices is not None:
                state.masked_fill_((state_indices < 0)[:, None, None, None], 0.0)
    else:
        indices = _contiguous(state_indices)
        o, state = family(MODULE, backend).step(problem, indices, output_final_state, False, v_first)
    return o, states.new_empty(0) if state is None else state


def _problem(tensors: tuple, scale: float, wide: bool) -> Problem:
    made: Any = map(_contiguous, (*tensors, scale, "recurrent", wide))
    problem = Problem(*made)
    if problem.cu_seqlens is not None:
        check_cu_seqlens(problem.cu_seqlens, problem.q.shape[1])
    return problem


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


_operator = torch.library.custom_op("fla::decay_step", _in_place, mutates_args=("states",))
_operator_fresh = torch.library.custom_op("fla::decay_step_fresh", _fresh, mutates_args=())


@_operator.register_fake
def _(q, k, v, g, gk, gv, g_gamma, states, cu_seqlens, state_indices, scale, v_first, wide, backend):
    problem = Problem(q, k, v, g, gk, gv, g_gamma, states, cu_seqlens, scale, "recurrent", wide)
    return v.new_empty(v.shape, dtype=problem.output_dtype)


@_operator_fresh.register_fake
def _(
    q, k, v, g, gk, gv, g_gamma, states, cu_seqlens, state_indices, scale, v_first, wide, output_final_state, backend
):
    problem = Problem(q, k, v, g, gk, gv, g_gamma, states, cu_seqlens, scale, "recurrent", wide)
    shape = (problem.num_states, *states.shape[1:]) if output_final_state else (0,)
    return v.new_empty(v.shape, dtype=problem.output_dtype), states.new_empty(shape)
