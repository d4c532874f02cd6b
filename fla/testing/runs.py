"""Calling an op the way tests need it: any form by argument names, its reference on packs, all gradients at once.

States are handled in the layout of `OpSpec.shapes` throughout: `call` transposes at the op's door for `state_v_first`.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fla.ops._spec import OpSpec, Variant
from fla.testing.inputs import state_names, state_shapes

# keywords that change how an op is called but not what it computes; its reference does not know them
CALLING = ("state_v_first", "reverse", "output_attentions", "backend")


@dataclass(frozen=True)
class Result:
    """What a run gives: output, final state (a tensor for each part; empty if not asked for), gradient per input."""

    output: Tensor
    state: tuple[Tensor, ...] = ()
    grads: dict[str, Tensor | None] = field(default_factory=dict)


def parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def call(
    spec: OpSpec,
    function: Callable,
    inputs: dict[str, Tensor],
    variant: Variant,
    *,
    state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = True,
    **settings: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One call of a public form: `(output, parts of the final state)`. Settings of `variant` are applied.

    `state`: the parts of the initial state, when they are not those among `inputs` (a state handed over).
    """
    states, turn = state_names(spec, variant), variant.settings.get("state_v_first", False)
    state = tuple(inputs[name] for name in states if name in inputs) if state is None else state
    keywords: dict[str, Any] = {**variant.settings, **settings, **{n: x for n, x in inputs.items() if n not in states}}
    keywords |= initial_state(turned(spec, state) if turn else state)
    taken = parameters(function)
    if "output_final_state" in taken:
        keywords["output_final_state"] = output_final_state
    if "scale" not in taken:
        keywords.pop("scale", None)
    output, final = function(**keywords)
    return output, turned(spec, parts_of(final)) if turn else parts_of(final)


def call_reference(
    spec: OpSpec,
    inputs: dict[str, Tensor],
    variant: Variant,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The op's naive reference; a pack is cut and its sequences are computed one by one. Differentiable."""
    if cu_seqlens is None:
        return _call_reference(spec, inputs, variant, scale)
    pieces = []
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        piece = slice_axis(spec, slice_axis(spec, inputs, "N", n, 1), "T", start, end - start)
        pieces.append(_call_reference(spec, piece, variant, scale))
    outputs, parts = zip(*pieces, strict=True)
    return torch.cat(outputs, 1), tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _call_reference(spec, inputs, variant, scale) -> tuple[Tensor, tuple[Tensor, ...]]:
    names, states = parameters(spec.reference), state_names(spec, variant)
    keywords = {name: value for name, value in variant.settings.items() if name in names or name not in CALLING}
    flipped = variant.settings.get("reverse", False) and "reverse" not in names
    if flipped:
        inputs = {name: _flip_tokens(spec, name, x) for name, x in inputs.items()}
    keywords |= {name: x for name, x in inputs.items() if name not in states}
    keywords |= initial_state(tuple(inputs[name] for name in states if name in inputs))
    keywords |= {name: value for name, value in (("scale", scale), ("output_final_state", True)) if name in names}
    output, state = spec.reference(**keywords)
    return (output.flip(1) if flipped else output), parts_of(state)


def initial_state(parts: tuple[Tensor, ...]) -> dict[str, Any]:
    """The keyword for a state of these parts: one tensor, or a tuple where an op has several."""
    return {"initial_state": parts if len(parts) > 1 else parts[0]} if parts else {}


def run(
    evaluate: Callable[[dict[str, Tensor]], tuple[Tensor, tuple[Tensor, ...]]],
    inputs: dict[str, Tensor],
    *,
    needs: tuple[str, ...] | None = None,
    use: tuple[str, ...] = ("output", "state"),
    cotangents: Callable[[int, Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Result:
    """`evaluate(inputs)` and the gradient of every input in `needs` (default: all), through the results in `use`.

    `cotangents(i, result)` gives the incoming gradient of the i-th result. `dtype` casts the output to the dtype under
    test (and states to float32, or float64 for float64) before gradients are taken: how a naive result is rounded.
    """
    needs = tuple(inputs) if needs is None else needs
    leaves = {name: x.detach().requires_grad_(name in needs) for name, x in inputs.items()}
    output, state = evaluate(leaves)
    if dtype is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        output, state = output.to(dtype), tuple(part.to(wide) for part in state)
    results = [(0, output)] if "output" in use else []
    results += list(enumerate(state, 1)) if "state" in use else []
    results = [(i, x) for i, x in results if x.requires_grad]
    incoming = [(cotangents or seeded_cotangent)(i, x) for i, x in results]
    grads: dict[str, Tensor | None] = dict.fromkeys(needs)
    if results and needs:
        found = torch.autograd.grad([x for _, x in results], [leaves[n] for n in needs], incoming, allow_unused=True)
        grads = dict(zip(needs, found, strict=True))
    return Result(output.detach(), tuple(part.detach() for part in state), grads)


def seeded_cotangent(i: int, result: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Noise of the shape of `result`, the same for every dtype once rounded to `dtype` (default: that of `result`)."""
    generator = torch.Generator(result.device).manual_seed(1000 + i)
    noise = torch.randn(result.shape, generator=generator, device=result.device)
    return noise.to(dtype or result.dtype).to(result.dtype)


def parts_of(state: Any) -> tuple[Tensor, ...]:
    """The tensors of a state that an op returned."""
    parts = state if isinstance(state, (tuple, list)) else (state,)
    return tuple(part for part in parts if part is not None)


def turned(spec: OpSpec, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parts of a state moved from layout `[N, H, K, V]` to `[N, H, V, K]` or back. A part without K and V stays."""
    shapes = state_shapes(spec).values()
    return tuple(x.mT if shape.endswith(" K V") else x for x, shape in zip(parts, shapes, strict=False))


def slice_axis(spec: OpSpec, inputs: dict[str, Tensor], axis: str, start: int, length: int) -> dict[str, Tensor]:
    """Every tensor narrowed to `length` positions from `start` on along its axis `axis`, where it has one."""
    return {
        name: x.narrow(axes.index(axis), start, length) if axis in axes else x
        for name, x in inputs.items()
        for axes in [spec.shapes[name].split()]
    }


def _flip_tokens(spec: OpSpec, name: str, x: Tensor) -> Tensor:
    axes = spec.shapes[name].split()
    return x.flip(axes.index("T")) if "T" in axes else x
