"""Decoding on states that the caller owns, for every family: states overwritten in place, or kept in a pool.

Beside its `forward`, a backend's module of the family computes

    step(problem, state_indices, output_final_state, in_place, v_first) -> (o, fresh final states or None)

`problem.initial_state` holds the states `[N, ...]`; with `state_indices` `[N]` it is a pool of states `[P, ...]`, and
sequence n uses the slot `state_indices[n]`. The backend reads and writes the states where they are: a pool is never
copied or transposed. `v_first` says that the last two axes of the states are swapped. The index -1 skips a sequence:
its outputs and its fresh final state are 0, and no slot is touched.

Steps have no gradients. `torch.compile` sees two operators, derived from the fields of the family's dataclass:
`fla::<name>_step` writes to its argument `initial_state`, `fla::<name>_step_fresh` returns new states. Eager calls do
not go through the operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fla.backends import family, resolve
from fla.varlen import check_cu_seqlens

if TYPE_CHECKING:
    from fla.backends._recurrence import Family


class Stepping:
    """The steps of one family."""

    def __init__(self, owner: Family) -> None:
        self.owner, self.names = owner, tuple(owner.types)
        self.states_position = self.names.index("initial_state")
        self.cu_seqlens_position = self.names.index("cu_seqlens")
        kinds = owner.types | {"initial_state": "Tensor"}
        fresh = ", ".join(f"{kind} {name}" for name, kind in kinds.items())
        written = ", ".join(f"{kind} {name}" for name, kind in (kinds | {"initial_state": "Tensor(a!)"}).items())
        tail = "Tensor? state_indices, bool v_first"
        self._operator = torch.library.custom_op(
            f"fla::{owner.name}_step",
            self._step_in_place,
            mutates_args=("initial_state",),
            schema=f"({written}, {tail}, str backend) -> Tensor",
        )
        self._operator_fresh = torch.library.custom_op(
            f"fla::{owner.name}_step_fresh",
            self._step_fresh,
            mutates_args=(),
            schema=f"({fresh}, {tail}, bool output_final_state, str backend) -> (Tensor, Tensor)",
        )
        self._operator.register_fake(self._step_in_place_fake)
        self._operator_fresh.register_fake(self._step_fresh_fake)

    def __call__(
        self,
        values: tuple,
        state_indices: Tensor | None,
        inplace_final_state: bool,
        output_final_state: bool,
        v_first: bool,
        backend: str | None,
        op: str | None,
        called: Mapping[str, str],
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `o`, and the final states or None.

        With `inplace_final_state` the final states overwrite `initial_state`, which is returned. Raises ValueError or
        TypeError if the states could be used only after a copy, or if a gradient is needed.
        """
        self.check(values, state_indices, inplace_final_state, called)
        backend = resolve(self.owner.name, values[0], backend)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            family(self.owner.name, backend, op)
        states = values[self.states_position]
        if inplace_final_state:
            o = (self._operator if compiling else self._step_in_place)(*values, state_indices, v_first, backend)
            if not compiling and not states.is_inference():
                torch.autograd.graph.increment_version(states)
            return o, states
        call = self._operator_fresh if compiling else self._step_fresh
        o, state = call(*values, state_indices, v_first, output_final_state, backend)
        return o, state if output_final_state else None

    def check(
        self, values: tuple, indices: Tensor | None, in_place: bool, called: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Raise ValueError or TypeError unless the states can be used as they are, without a copy."""
        option = "inplace_final_state" if in_place else "state_indices"
        first, states, bounds = values[0], values[self.states_position], values[self.cu_seqlens_position]
        if not isinstance(states, Tensor):
            raise ValueError(f"initial_state must be a tensor with {option}: it holds the states, got {states}")
        expected = torch.float64 if first.dtype == torch.float64 else torch.float32
        if states.dtype != expected:
            raise TypeError(f"initial_state must be {expected} with {option}, got {states.dtype}")
        if not states.is_contiguous():
            raise ValueError(
                f"initial_state must be contiguous with {option}, got strides {tuple(states.stride())} for the shape "
                f"{list(states.shape)}: make it contiguous once, since a step cannot write to a copy"
            )
        if torch.is_grad_enabled():
            for name, x in zip(self.names, values, strict=True):
                if isinstance(x, Tensor) and x.requires_grad:
                    raise ValueError(
                        f"{option} is for inference: {called.get(name, name)} must not need a gradient, got "
                        "requires_grad=True; call under torch.no_grad()"
                    )
        if indices is not None:
            N = first.shape[0] if bounds is None else bounds.shape[0] - 1
            _check_indices(indices, N, first, called.get(self.names[0], self.names[0]))

    def _problem(self, values: list) -> Any:
        problem = self.owner.make(*values)
        if problem.cu_seqlens is not None:
            check_cu_seqlens(problem.cu_seqlens, problem.sizes[1])
        return problem

    def _step_in_place(self, *arguments: Any) -> Tensor:
        *values, indices, v_first, backend = arguments
        _check_index_values(indices, values[self.states_position].shape[0], True)
        problem = self._problem(values)
        if problem.is_empty:
            return self.owner.zero_output(problem)
        return self._run(backend, problem, indices, True, True, v_first)[0]

    def _step_fresh(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """`o`, and the final states; an empty tensor if they are not wanted, because operators return tensors only."""
        *values, indices, v_first, output_final_state, backend = arguments
        states: Tensor = values[self.states_position]
        _check_index_values(indices, states.shape[0], False)
        problem = self._problem(values)
        if problem.is_empty:
            o, state = self.owner.zero_output(problem), None
            if output_final_state:
                state = gather(states, indices).clone()
                if indices is not None:
                    state[indices < 0] = 0.0
        else:
            o, state = self._run(backend, problem, indices, output_final_state, False, v_first)
        return o, states.new_empty(0) if state is None else state

    def _run(self, backend: str, problem: Any, indices: Tensor | None, *options: bool) -> tuple[Tensor, Tensor | None]:
        return family(self.owner.name, backend).step(
            problem, None if indices is None else indices.contiguous(), *options
        )

    def _step_in_place_fake(self, *arguments: Any) -> Tensor:
        *values, _, _, _ = arguments
        return self.owner.zero_output(self.owner.problem(*values))

    def _step_fresh_fake(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        *values, _, _, output_final_state, _ = arguments
        problem, states = self.owner.problem(*values), values[self.states_position]
        shape = (problem.num_states, *states.shape[1:]) if output_final_state else (0,)
        return self.owner.zero_output(problem), states.new_empty(shape)


def _check_indices(indices: Any, N: int, first: Tensor, name: str) -> None:
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"state_indices must be an int32 or int64 tensor, got {got}")
    if tuple(indices.shape) != (N,):
        raise ValueError(f"state_indices must have shape [N] with N = {N} sequences, got {list(indices.shape)}")
    if indices.device != first.device:
        raise ValueError(f"state_indices must be on {first.device} like {name}, got {indices.device}")


def _check_index_values(indices: Tensor | None, slots: int, in_place: bool) -> None:
    """Raise ValueError for an index outside the pool or, in place, one that is used twice.

    Only values on the CPU are checked: reading them from a GPU would wait for it.
    """
    if indices is None or indices.device.type != "cpu":
        return
    used = [i for i in indices.tolist() if i != -1]
    for i in used:
        if not 0 <= i < slots:
            raise ValueError(f"state_indices must be -1 or slots of the pool, 0 to {slots - 1}, got {i}")
    if in_place and len(set(used)) < len(used):
        raise ValueError(f"state_indices must name a slot once with inplace_final_state, got {indices.tolist()}")


def gather(pool: Tensor, indices: Tensor | None) -> Tensor:
    """The states at `indices`, or all states without indices. At the index -1 the result is the first slot's state."""
    return pool if indices is None else pool[indices.clamp(min=0).long()]
