"""What an op declares of itself, so that tests, benchmarks and docs need nothing else: `OpSpec` and the registry."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.compiler import is_compiling

from fla.ops._names import name_forms

REGISTRY: dict[str, "OpSpec"] = {}
Op = TypeVar("Op", bound=Callable)


@dataclass(frozen=True)
class Variant:
    """One way to call an op: keyword settings, and the gates or tensors left out or put in.

    `forms`: those that have it, by default all. `steps`: whether it is also a way to decode on states that the caller
    owns (where a form has `state_indices`); not so where a part of the state is left out. `shapes`: of tensors that
    have other shapes than in the op's. `raw`: gates that are no log decays here, because the op makes the log decays
    from them. `inputs`: from noise to legal inputs, where it is not the op's.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    forms: tuple[str, ...] | None = None
    steps: bool = True
    shapes: dict[str, str] = field(default_factory=dict)
    raw: tuple[str, ...] = ()
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class OpSpec:
    """An op, described so that tests, benchmarks and docs need nothing else.

    `shapes`: every tensor argument; the parts of the state are those whose first axis is `N`.
    `reference(**tensors, scale, initial_state, output_final_state)`: the naive recurrence, returns `(o, state)`.
    `forms`: form name -> public function. `same`: forms that only call another one -> that one.
    `inputs`: from noise of those shapes to legal inputs.
    `gates`: the arguments that are log decays, or from which the op makes them in some variant. `flat`: tensors of
    which only the number of elements counts. `wide`: tensors that are float32 whatever the others are.
    `required`, `same_dtype`: the tensors that may not be None, and that share a dtype (as `check_shapes` has them).
    `axes`: sizes of axes in tests, a product of numbers and other axes ("2 H") or a few of these or of numbers to take
    in turn; the usual axes (`fla.testing.inputs.USUAL_AXES`) need none. `limits`: the largest size an axis may have.
    `default_scale`: what `scale=None` means, by default K ** -0.5. An op without the parameter has no scale.
    `stateless`: forms without states. `gaps`: what does not work, in words. `also`: form or "naive" -> functions that
    other programs import from `fla.ops.<op>.<form>`, whatever their names. `parameters`: the most that a form has, more
    than usual only where the programs that call it give so many.
    """

    name: str
    family: str
    shapes: dict[str, str]
    reference: Callable[..., tuple[Tensor, Any]]
    forms: dict[str, Callable[..., tuple[Tensor, Any]]]
    same: dict[str, str] = field(default_factory=dict)
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda x: x
    gates: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    required: tuple[str, ...] = ("q", "k", "v")
    same_dtype: tuple[str, ...] = ("q", "k", "v")
    axes: dict[str, str | tuple[str | int, ...]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    default_scale: float | None = None
    variants: tuple[Variant, ...] = (Variant("default"),)
    stateless: tuple[str, ...] = ("parallel",)
    gaps: dict[str, str] = field(default_factory=dict)
    paper: str = ""
    flat: tuple[str, ...] = ()
    also: dict[str, tuple[Callable, ...]] = field(default_factory=dict)
    parameters: int = 16

    def of(self, variant: Variant) -> "OpSpec":
        """The op as the variant has it: its shapes and inputs."""
        if not variant.shapes and variant.inputs is None:
            return self
        return replace(self, shapes=self.shapes | variant.shapes, inputs=variant.inputs or self.inputs)

    def log_decays(self, variant: Variant) -> tuple[str, ...]:
        """The gates that are given as log decays."""
        return tuple(name for name in self.gates if name not in variant.without and name not in variant.raw)


def register(spec: OpSpec) -> OpSpec:
    """Make the op known to the suites, and its forms and naive functions importable as `fla.ops.<op>.<form>`."""
    REGISTRY[spec.name] = spec
    name_forms(spec.reference.__module__, spec.forms, spec.also)
    return spec


def current_names(function: Op) -> Op:
    """A public op that answers the spellings of former years: TypeError with today's for `head_first=` and `offsets=`,
    a DeprecationWarning for `transpose_state_layout=`, where there is `state_v_first`."""

    @functools.wraps(function)
    def call(*args, **keywords):
        if "head_first" in keywords or "offsets" in keywords or "transpose_state_layout" in keywords:
            keywords = _renamed(function, keywords)
        return function(*args, **keywords)

    return cast(Op, call)


def _renamed(function: Callable, keywords: dict[str, Any]) -> dict[str, Any]:
    op = function.__name__
    if "head_first" in keywords:
        got = repr(keywords["head_first"])
        raise TypeError(f"{op} takes no head_first (got {got}): inputs are [B, T, H, D], gates [B, T, H]")
    if "offsets" in keywords:
        got = type(keywords["offsets"]).__name__
        raise TypeError(f"{op} takes no offsets (got {got}): packed sequences are given as cu_seqlens")
    if "state_v_first" not in function.__annotations__:
        return keywords  # it takes neither name, as Python will say
    if "state_v_first" in keywords:
        raise TypeError(f"{op}: state_v_first and transpose_state_layout, its former name, are both given")
    if not is_compiling():  # a warning would break the graph
        message = f"{op}: transpose_state_layout is the former name of state_v_first"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    others = {name: value for name, value in keywords.items() if name != "transpose_state_layout"}
    return others | {"state_v_first": keywords["transpose_state_layout"]}
