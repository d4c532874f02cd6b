"""Seeded inputs of an op from its `OpSpec`, gates of a chosen strength, and allocation that shows unwritten memory."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fla.ops._spec import OpSpec, Variant

USUAL_AXES = {"H": 2, "HV": "H", "K": 16, "V": 16, "D": "H K"}  # sizes of axes for which an op need not give any
DEFAULT_DIMS = {"B": 2, "T": 65}
EXTREME_GATES = (0.0, -1e-6, -5.0, -50.0, -1e4, -float("inf"))
STRONG_GATE = -16.0  # for log decays below it the gradient is defined as 0; its true value is under e^-16


def axes_of(spec: OpSpec) -> tuple[str, ...]:
    """The axes that tests choose sizes for: all letters in its shapes but those of rows, tokens and sequences."""
    letters = (axis for shape in spec.shapes.values() for axis in shape.split() if not axis.isdigit())
    return tuple(axis for axis in dict.fromkeys(letters) if axis not in ("B", "T", "N"))


def sizes_of(spec: OpSpec, given: Mapping[str, int], turn: int = 0) -> dict[str, int]:
    """The size of each of `axes_of(spec)`: as given, else by the op's own `axes`, else the usual one.

    `turn`: which of several sizes. A size over the op's limit becomes the limit. Raises ValueError for an axis that
    nothing gives a size for.
    """
    found: dict[str, int] = {}

    def size(axis: str) -> int:
        if axis in found:
            return found[axis]
        rule: Any = given.get(axis, spec.axes.get(axis, USUAL_AXES.get(axis)))
        if rule is None:
            raise ValueError(f"OpSpec.axes of {spec.name} must give sizes of the axis {axis}, got {spec.axes}")
        if isinstance(rule, tuple):
            rule = rule[turn % len(rule)]
        if isinstance(rule, str):
            rule = math.prod(int(word) if word.isdigit() else size(word) for word in rule.split())
        return min(rule, spec.limits.get(axis, rule))

    for axis in axes_of(spec):
        found[axis] = size(axis)
    return found


def state_shapes(spec: OpSpec) -> dict[str, str]:
    """Name -> shape of every part of a state: the tensors whose first axis is `N`."""
    return {name: shape for name, shape in spec.shapes.items() if shape.startswith("N ")}


def state_names(spec: OpSpec, variant: Variant) -> tuple[str, ...]:
    """The tensors that make up the initial state."""
    return tuple(name for name in state_shapes(spec) if name not in variant.without)


def pack(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    """`cu_seqlens` of sequences of these lengths."""
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype).to(device)


def make_inputs(
    spec: OpSpec,
    dims: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    variant: Variant | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    gate_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    gates: str | float = "ordinary",
) -> dict[str, Tensor]:
    """Legal inputs of an op by argument name, from seeded noise; what `variant` leaves out is left out.

    `dims`: sizes of axes in `spec.shapes`, over `DEFAULT_DIMS` and those of `sizes_of`; `N` follows from `B` or
    `cu_seqlens`. `gate_dtype`: of the log decays of tokens (default `dtype`); `state_dtype`: of the initial state
    (default float32, float64 for float64). `gates`: see `set_gates`. The state is in the layout of `spec.shapes`.
    Raises ValueError for an axis without a size.
    """
    variant = variant or spec.variants[0]
    spec = spec.of(variant)
    sizes = DEFAULT_DIMS | (dims or {})
    sizes |= sizes_of(spec, sizes)
    sizes["N"] = sizes["B"] if cu_seqlens is None else len(cu_seqlens) - 1
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = {}
    for name, shape in spec.shapes.items():
        size = [int(axis) if axis.isdigit() else sizes[axis] for axis in shape.split()]
        noise[name] = torch.randn(size, generator=generator, device=device, dtype=wide)
    states = state_names(spec, variant)
    # a constant decay is a parameter; its gradient is a sum over all tokens, which would overflow float16
    dtypes = {name: gate_dtype or dtype if "T" in spec.shapes[name].split() else wide for name in spec.gates}
    dtypes |= dict.fromkeys(spec.wide, wide) | dict.fromkeys(states, state_dtype or wide)
    legal = {name: x for name, x in spec.inputs(noise).items() if name not in variant.without}
    present = spec.log_decays(variant)
    for name in present if gates == "weak" else present[:1]:  # two strong gates would multiply to another strength
        legal[name] = set_gates(legal[name], gates, generator)
    return {name: x.to(dtypes.get(name, dtype)).contiguous() for name, x in legal.items()}


def set_gates(g: Tensor, kind: str | float, generator: torch.Generator) -> Tensor:
    """Log decays of a kind: "ordinary" (as made), "weak" (1/16 of that), a number for all, "uneven" or "mixed".

    "uneven" is weak, but -4 in the first half of the first axis that is longer than 1: rows of a batch, tokens, heads.

    "mixed" replaces three in ten by one of `EXTREME_GATES`; the others stay, so that gradients do not all vanish.
    """
    if kind == "ordinary":
        return g
    if kind == "weak":
        return g / 16
    if kind == "uneven":
        g = g / 16
        axis = next((axis for axis, size in enumerate(g.shape) if size > 1), 0)
        g.narrow(axis, 0, g.shape[axis] // 2).fill_(-4.0)
        return g
    if kind != "mixed":
        return torch.full_like(g, float(kind))
    extreme = torch.tensor(EXTREME_GATES, dtype=g.dtype, device=g.device)
    pick = torch.randint(len(EXTREME_GATES), g.shape, generator=generator, device=g.device)
    replaced = torch.rand(g.shape, generator=generator, device=g.device) < 0.3
    return torch.where(replaced, extreme[pick], g)


@contextmanager
def poisoned_allocation() -> Iterator[None]:
    """Within it, memory that `fla` allocates without writing holds NaN (floats) or the smallest integer.

    A result that reads memory nobody wrote is then NaN, not a number that happens to be right.
    """
    functions: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    functions += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    with torch.device("cpu"):
        torch.empty(0)  # PyTorch lists the functions that a device context redirects once: before they are replaced
    originals = [(owner, name, getattr(owner, name)) for owner, name in functions]
    try:
        for owner, name, original in originals:
            setattr(owner, name, _poisoned(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _poisoned(original):
    def allocate(*args, **kwargs):
        x = original(*args, **kwargs)
        if torch.compiler.is_compiling():  # a traced graph has no frames to look at
            return x
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if x.device.type == "meta" or not caller.startswith("fla.") or caller.startswith("fla.testing"):
            return x
        if x.is_floating_point():
            return x.fill_(float("nan"))
        return x.fill_(torch.iinfo(x.dtype).min) if x.dtype != torch.bool else x

    return allocate
