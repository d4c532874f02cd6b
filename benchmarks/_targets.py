"""What can be timed: every form of every registered op, its naive loop, and softmax attention beside them."""

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
    """One row's function. `call(**tensors)` is timed; `reference(**tensors)` is what it must return."""

    name: str
    op: str
    shapes: dict[str, str]
    call: Function
    reference: Function
    states: dict[str, str] = field(default_factory=dict)  # the parts of the initial state
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda x: x
    gates: tuple[str, ...] = ()
    declared: dict[str, int] = field(default_factory=dict)  # sizes of axes of the op's own
    family: str | None = None  # None: not ours, so a failure is a missing baseline and no error of ours
    settings: dict[str, Any] = field(default_factory=dict)
    checked: bool = True
    linear: bool = True  # moving bytes bounds it: the memory floor means something

    def fit(self, written: dict[str, int]) -> dict[str, int]:
        """The sizes of the op's axes from a written shape. Raises ValueError for an axis without a size."""
        wanted = _shapes.axes([*self.shapes.values(), *self.states.values()])
        return _shapes.fit(written, wanted, self.declared, self.op)

    def state_elements(self, dims: dict[str, int]) -> int:
        """Elements of the states of one sequence; of an op without states, what a token's tensors hold."""
        parts = _shapes.sizes(self.states, dims | {"N": 1}) if self.states else {}
        of_a_token = [axis for axis in dims if axis not in ("B", "T")]
        return sum(map(math.prod, parts.values())) or math.prod(dims[axis] for axis in of_a_token)


def find(op: str, form: str, backend: str | None = None) -> Target:
    """The target of an op's form ("chunk", "naive", ...) or of a softmax baseline. Raises ValueError naming those."""
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
    """Those of the variant; a normaliser is left out, so that every row times the recurrence itself."""
    settings = dict(variant.settings)
    if "normalize" in inspect.signature(function).parameters:
        settings["normalize"] = False
    return settings


def _described(spec: OpSpec, variant: Variant, function: Function) -> dict[str, Any]:
    """What a target takes from the spec: the tensors that a call gets are those of the variant that the form takes."""
    present = {name: shape for name, shape in spec.shapes.items() if name not in variant.without}
    states = {name: shape for name, shape in present.items() if shape.split()[0] == "N"}
    taken = inspect.signature(function).parameters
    return {
        "shapes": {name: shape for name, shape in present.items() if name in taken and name not in states},
        "states": states,
        "inputs": spec.inputs,
        "gates": spec.gates,
        "declared": getattr(spec, "sizes", None) or {},
    }


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
    """Causal softmax attention by its formula, scale K ** -0.5."""
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)


def cut(shapes: dict[str, str], tensors: dict[str, Tensor], rows: slice, tokens: slice) -> dict[str, Tensor]:
    """These rows and tokens of the first heads, up to four; of heads that others share, all that belong together."""
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
    """256 tokens of up to four heads of the last batch row. Ops are causal and heads independent: `o` begins the same.

    The last row, because an offset that overflows shows there; the first heads, because constants follow their number.
    """
    return cut(shapes, tensors, slice(-1, None), slice(256))
