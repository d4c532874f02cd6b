"""A backend that computes nothing, so that the time of a call is that of the Python code around the kernels.

Outputs and gradients are memory that nobody writes. So that older checkouts can be timed too, the stand-ins come with
both interfaces that a backend has had. Today's is `forward(problem, output_final_state, keep)` with
`backward(problem, saved, do, dht, needs) -> dict`; the earlier one is `forward(problem, output_final_state)` with
`backward(problem, do, dht, needs_gates) -> Gradients`.
"""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


@contextlib.contextmanager
def idle(family: str, backend: str = "torch") -> Iterator[None]:
    """A block in which `backend` computes nothing for `family`. All calls in it must have outputs of one shape."""
    module = importlib.import_module(f"fla.backends.{backend}.{family}")
    before = module.forward, module.backward
    is_current = "keep" in inspect.signature(module.forward).parameters
    module.forward, module.backward = _stand_ins() if is_current else _earlier_stand_ins(family)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.forward, module.backward = before  # type: ignore[attr-defined]


def _stand_ins() -> tuple[Function, Function]:
    saved_of = importlib.import_module("fla.backends._recurrence").Saved
    outputs: list[Tensor] = []  # one, made by the first call: later calls need a single `empty_like`

    def forward(problem: Any, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Any]:
        if not outputs:
            like = getattr(problem, problem.first)
            outputs.append(torch.empty(problem.output_shape, dtype=problem.output_dtype, device=like.device))
        o = torch.empty_like(outputs[0])
        return o, _state(problem, o) if output_final_state else None, saved_of(problem) if keep else None

    def backward(problem: Any, saved: Any, do: Tensor, dht: Tensor | None, needs: Any) -> dict[str, Tensor]:
        return {name: torch.empty_like(getattr(problem, name)) for name in needs}

    return forward, backward


def _earlier_stand_ins(family: str) -> tuple[Function, Function]:
    gradients: ModuleType = importlib.import_module(f"fla.backends.{family}").Gradients

    def forward(problem: Any, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
        o = torch.empty_like(problem.v)
        return o, _state(problem, o) if output_final_state else None

    def backward(problem: Any, do: Tensor, dht: Tensor | None, needs_gates: bool) -> Any:
        inputs = (problem.q, problem.k, problem.v, problem.g, problem.gk, problem.gv, problem.initial_state)
        return gradients(*(None if x is None else torch.empty_like(x) for x in inputs), final=True)

    return forward, backward


def _state(problem: Any, o: Tensor) -> Tensor:
    return torch.empty(problem.state_shape, dtype=problem.state_dtype, device=o.device)
