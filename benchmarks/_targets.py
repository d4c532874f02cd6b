"""The functions that can be timed: every form of every registered op, its naive loop, and softmax attention."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fla.ops  # noqa: F401 - registers the ops
from benchmarks import _shapes
from fla.ops._spec import REGISTRY, OpSpec, Variant

ATTENTION = {"q": "B T H K", "k": "B T H K", "v": "B T H V"}
SOFTMAX = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
HEADS_CHECKED = 4
Function = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """A function to time: `call(**tensors)`. `reference(**tensors)` computes what it must return."""

    name: str
    op: str
    shapes: dict[str, str]
    call: Function
    reference: Function
    states: dict[str, str] = field(default_factory=dict)  # the parts of the initial state
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda x: x
    gates: tuple[str, ...] = ()
    declared: dict[str, int] = field(default_factory=dict)  # sizes of axes that only this op has
    family: str | None = None  # None for softmax attention: if it fails, a baseline is missing, no more
    settings: dict[str, Any] = field(default_factory=dict)
    checked: bool = True  # whether its results are compared with the reference
    linear: bool = True  # whether the memory floor tells how good it is: not a naive loop, not softmax attention

    def fit(self, written: dict[str, int]) -> dict[str, int]:
        """The sizes of the op's axes from a written shape. Raises ValueError for an axis without a size."""
        wanted = _shapes.axes([*self.shapes.values(), *self.states.values()])
        return _shapes.fit(written, wanted, self.declared, self.op)

    def state_elements(self, dims: dict[str, int]) -> int:
        """Elements of the states of one sequence; for an op without states, the product of a token's axes."""
        parts = _shapes.sizes(self.states, dims | {"N": 1}) if self.states else {}
        of_a_token = [axis for axis in dims if axis not in ("B", "T")]
        return sum(map(math.prod, parts.values())) or math.prod(dims[axis] for axis in of_a_token)


def find(op: str, form: str, backend: str | None = None) -> Target:
    """The target of an op's form ("chunk", "naive", ...) or of a softmax baseline.

    A ValueError lists those that exist.
    """
    if op in SOFTMAX:
        return _softmax(op)
    if op not in REGISTRY:
        raise ValueError(f"--op must be among {', '.join([*REGISTRY, *SOFTMAX])}, got {op!r}")
    spec = REGISTRY[op]
    if form == "naive":
        return _naive(spec)
    if form not in spec.forms:
        raise ValueError(f"--form of {op} must be among {', '.join(spec.forms)}, got {form!r}")
    function = spec.forms[form]
    variant = next(v for v in spec.variants if v.forms is None or form in v.forms)
    settings = _settings(variant, function)
    return Target(
        name=function.__name__,
        op=op,
        call=lambda **tensors: function(**tensors, **settings, backend=backend),
        reference=_reference(spec, settings),
        family=spec.family,
        settings=settings,
        **_described(spec, variant, function),
    )


def _naive(spec: OpSpec) -> Target:
    variant = spec.variants[0]
    settings = _settings(variant, spec.reference)
    reference = _reference(spec, settings)
    return Target(
        name=f"naive_{spec.name}",
        op=spec.name,
        call=reference,
        reference=reference,
        settings=settings,
        checked=False,
        linear=False,
        **_described(spec, variant, spec.reference),
    )


def _settings(variant: Variant, function: Function) -> dict[str, Any]:
    """The variant's settings, without a normalizer, so that every row times the recurrence itself."""
    settings = dict(variant.settings)
    if "normalize" in inspect.signature(function).parameters:
        settings["normalize"] = False
    return settings


def _described(spec: OpSpec, variant: Variant, function: Function) -> dict[str, Any]:
    """The fields of a target that follow from the spec.

    A call gets the tensors of the variant that `function` takes.
    """
    present = {name: shape for name, shape in spec.shapes.items() if name not in variant.without}
    states = {name: shape for name, shape in present.items() if shape.split()[0] == "N"}
    taken = inspect.signature(function).parameters
    return {
        "shapes": {name: shape for name, shape in present.items() if name in taken and name not in states},
        "states": states,
        "inputs": spec.inputs,
        "gates": spec.gates,
        "declared": _declared_sizes(spec),
    }


def _declared_sizes(spec: OpSpec) -> dict[str, int]:
    """The sizes of axes that only this op has, of several the first.

    Older checkouts, which `benchmarks.host --against` times too, have ops without axes of their own.
    """
    axes = getattr(spec, "axes", {})
    first = {axis: sizes[0] if isinstance(sizes, tuple) else sizes for axis, sizes in axes.items()}
    return {axis: int(size) for axis, size in first.items() if str(size).isdigit()}


def _reference(spec: OpSpec, settings: dict[str, Any]) -> Function:
    taken = inspect.signature(spec.reference).parameters
    used = {name: value for name, value in settings.items() if name in taken}
    return lambda **tensors: spec.reference(**tensors, **used)[0]


def _softmax(name: str) -> Target:
    backend = SOFTMAX[name]

    @contextlib.contextmanager
    def chosen() -> Iterator[None]:
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            yield

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with chosen():
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return Target(name, name, ATTENTION, call, causal_softmax, linear=False)


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by its formula, with the scale K ** -0.5."""
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)


def cut(shapes: dict[str, str], tensors: dict[str, Tensor], rows: slice, tokens: slice) -> dict[str, Tensor]:
    """These rows and tokens of the first heads, at most four. Heads that share another head stay together."""
    found = [pair for name, x in tensors.items() for pair in zip(shapes[name].split(), x.shape, strict=True)]
    heads = {axis: size for axis, size in found if axis.startswith("H")}
    fewest = min(heads.values(), default=1)
    part = {"B": rows, "T": tokens}
    part |= {axis: slice(min(fewest, HEADS_CHECKED) * size // fewest) for axis, size in heads.items()}
    return {
        name: x[tuple(part.get(axis, slice(None)) for axis in shapes[name].split())].contiguous()
        for name, x in tensors.items()
    }


def first_tokens(shapes: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first 256 tokens of the last batch row, in up to four heads.

    Ops are causal and heads independent, so their output is the same part of the whole output. It is the last row,
    because an offset that overflows shows there, and the first heads, because a head's constants depend on its number.
    """
    return cut(shapes, tensors, slice(-1, None), slice(256))
