"""What an op declares of itself, so that tests, benchmarks and docs need nothing else: `OpSpec` and the registry."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar, cast

from torch import Tensor

REGISTRY: dict[str, "OpSpec"] = {}
Op = TypeVar("Op", bound=Callable)


@dataclass(frozen=True)
class Variant:
    """One way to call an op: keyword settings, and the gates or tensors left out or put in."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    forms: tuple[str, ...] | None = None  # None: every form of the op


@dataclass(frozen=True)
class OpSpec:
    """An op, described so that tests, benchmarks and docs need nothing else.

    `shapes`: every tensor argument. `reference(**tensors, scale, initial_state, output_final_state)`: the naive
    recurrence, returns `(o, state)`.
    `forms`: form name -> public function. `inputs`: from noise of those shapes to legal inputs.
    `gates`: the arguments that are log decays. `stateless`: forms without states. `gaps`: what does not work, in words.
    """

    name: str
    family: str
    shapes: dict[str, str]
    reference: Callable[..., tuple[Tensor, Any]]
    forms: dict[str, Callable[..., tuple[Tensor, Any]]]
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda x: x
    gates: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = (Variant("default"),)
    stateless: tuple[str, ...] = ("parallel",)  # forms without initial and final state
    gaps: dict[str, str] = field(default_factory=dict)
    paper: str = ""


def register(spec: OpSpec) -> OpSpec:
    """Make the op known to the suites, and its naive functions importable as `fla.ops.<op>.naive`."""
    REGISTRY[spec.name] = spec
    module = sys.modules[spec.reference.__module__]
    alias = ModuleType(f"{module.__name__}.naive", f"The naive functions of {module.__name__}.")
    for name, value in vars(module).items():
        if name.startswith("naive_"):
            setattr(alias, name, value)
    sys.modules[alias.__name__] = alias
    return spec


def current_names(function: Op) -> Op:
    """A public op that answers the spellings of former years, `head_first=` and `offsets=`, with today's: TypeError."""

    @functools.wraps(function)
    def call(*args, **keywords):
        if "head_first" in keywords or "offsets" in keywords:
            raise TypeError(_renamed(function.__name__, keywords))
        return function(*args, **keywords)

    return cast(Op, call)


def _renamed(op: str, keywords: dict[str, Any]) -> str:
    if "head_first" in keywords:
        return f"{op} takes no head_first (got {keywords['head_first']!r}): inputs are [B, T, H, D], gates [B, T, H]"
    return f"{op} takes no offsets (got {type(keywords['offsets']).__name__}): packed sequences are given as cu_seqlens"
