"""What can be timed: every form of every registered op, its naive loop, and softmax attention beside them."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fla.ops  # noqa: F401 - registers the ops
from fla.ops._spec import REGISTRY, OpSpec, Variant

ATTENTION = {"q": "B T H K", "k": "B T H K", "v": "B T H V"}
SOFTMAX = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
Function = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """One row's function. `call(**tensors)` is timed; `reference(**tensors)` is what it must return."""

    name: str
    op: str
    shapes: dict[str, str]
    call: Function
    reference: Function
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda x: x
    gates: tuple[str, ...] = ()
    family: str | None = None  # None: not ours, so a failure is a missing baseline and no error of ours
    settings: dict[str, Any] = field(default_factory=dict)
    checked: bool = True
    linear: bool = True  # moving bytes bounds it: the memory floor means something


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
        shapes=_tensors(spec, variant, function),
        call=lambda **tensors: function(**tensors, **settings, backend=backend),
        reference=_reference(spec, settings),
        inputs=spec.inputs,
        gates=spec.gates,
        family=spec.family,
        settings=settings,
    )


def _naive(spec: OpSpec) -> Target:
    variant = spec.variants[0]
    settings = _settings(variant, spec.reference)
    reference = _reference(spec, settings)
    return Target(
        name=f"naive_{spec.name}",
        op=spec.name,
        shapes=_tensors(spec, variant, spec.reference),
        call=reference,
        reference=reference,
        inputs=spec.inputs,
        gates=spec.gates,
        settings=settings,
        checked=False,
        linear=False,
    )


def _settings(variant: Variant, function: Function) -> dict[str, Any]:
    """Those of the variant; a normaliser is left out, so that every row times the recurrence itself."""
    settings = dict(variant.settings)
    if "normalize" in inspect.signature(function).parameters:
        settings["normalize"] = False
    return settings


def _tensors(spec: OpSpec, variant: Variant, function: Function) -> dict[str, str]:
    """The tensors that a call gets: those of the variant that the form takes, without the initial state."""
    taken = [name for name in spec.shapes if name in inspect.signature(function).parameters]
    return {
        name: spec.shapes[name]
        for name in taken
        if name not in variant.without and not spec.shapes[name].startswith("N ")
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


def sizes(shapes: dict[str, str], dims: dict[str, int]) -> dict[str, list[int]]:
    """Shape strings to sizes. `HV` (value heads) is `H` unless given; any other unknown axis raises ValueError."""
    known = {"HV": dims["H"]} | dims
    missing = {a for shape in shapes.values() for a in shape.split() if not a.isdigit() and a not in known}
    if missing:
        raise ValueError(f"--shapes must give a size for {', '.join(sorted(missing))}, got {dims}")
    return {n: [int(a) if a.isdigit() else known[a] for a in shape.split()] for n, shape in shapes.items()}


def first_tokens(shapes: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """256 tokens of up to four heads of the last batch row. Ops are causal and heads independent: `o` begins the same.

    The last row, because an offset that overflows shows there; the first heads, because constants follow their number.
    """
    part = {"B": slice(-1, None), "T": slice(256), "H": slice(4), "HV": slice(4)}
    return {
        name: x[tuple(part.get(axis, slice(None)) for axis in shapes[name].split())].contiguous()
        for name, x in tensors.items()
    }
