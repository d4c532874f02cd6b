"""A backend that computes nothing: what is then left of a call's time is the Python around the kernels.

It serves both shapes that a family's backend has had: `forward(problem, output_final_state, keep)` with
`backward(problem, saved, do, dht, needs) -> dict`, and before it `forward(problem, output_final_state)` with
`backward(problem, do, dht, needs_gates) -> Gradients`. Outputs and gradients are memory that nobody writes.
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
    """Within it, `backend` computes nothing for `family`. For calls whose outputs all have one shape."""
    module = importlib.import_module(f"fla.backends.{backend}.{family}")
    before = module.forward, module.backward
    current = "keep" in inspect.signature(module.forward).parameters
    module.forward, module.backward = _stand_ins() if current else _stand_ins_of_before(family)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.forward, module.backward = before  # type: ignore[attr-defined]


def _stand_ins() -> tuple[Function, Function]:
    saved_of = importlib.import_module("fla.backends._recurrence").Saved
    outputs: list[Tensor] = []  # one like those that are asked for, so that a call makes its own in one step

    def forward(problem: Any, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor | None, Any]:
        if not outputs:
            like = getattr(problem, problem.first)
            outputs.append(torch.empty(problem.output_shape, dtype=problem.output_dtype, device=like.device))
        o = torch.empty_like(outputs[0])
        return o, _state(problem, o) if output_final_state else None, saved_of(problem) if keep else None

    def backward(problem: Any, saved: Any, do: Tensor, dht: Tensor | None, needs: Any) -> dict[str, Tensor]:
        return {name: torch.empty_like(getattr(problem, name)) for name in needs}

    return forward, backward


def _stand_ins_of_before(family: str) -> tuple[Function, Function]:
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
