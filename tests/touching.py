"""What a test is about: the op, layer, model or family that its parameters name, and the ops that these hang on.

Nothing is listed here: a layer class names its op's functions in `forms`, a model's block names its layer class, an op
names its family. What a test is about is read off its parameters: an op's `Case` or spec, one of its functions, a
layer's or a model's class, a name under an argument called `op`, `layer`, `model`, `model_type` or `family`, or a key
of the test file's `CASES`. The marker `touches` adds ops or families by name. Where neither says anything, the
functions and classes do that the test's body names.
"""

import functools
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest

import fla.ops  # noqa: F401  (registers the ops)
from fla.ops._spec import REGISTRY, OpSpec

KINDS = ("model", "layer", "op", "family")  # a test of several kinds is counted under the first of them


class Part(NamedTuple):
    """Something that is registered, by its kind (one of KINDS) and name."""

    kind: str
    name: str


@functools.cache
def layers() -> dict[str, type]:
    """Class name -> class of every layer."""
    from fla import layers

    return {name: value for name, value in vars(layers).items() if isinstance(value, type)}


@functools.cache
def models() -> dict[str, Any]:
    """Model type -> causal LM class."""
    import fla.models  # noqa: F401  (registers them)
    from fla.models._loading import REGISTRY as found

    return found


def ops_of(part: Part) -> set[str]:
    """The ops that run when this part does."""
    if part.kind == "op":
        return {part.name}
    if part.kind == "family":
        return {spec.name for spec in REGISTRY.values() if spec.family == part.name}
    layer = layers()[part.name] if part.kind == "layer" else models()[part.name].model_cls.block_cls.mixer_cls
    functions = list(layer.forms.values())
    return {spec.name for spec in REGISTRY.values() if any(f in functions for f in spec.forms.values())}


def _of_name(kind: str, name: str) -> set[Part]:
    if kind == "op" and name in REGISTRY:
        return {Part("op", name)}
    if kind == "family" and any(spec.family == name for spec in REGISTRY.values()):
        return {Part("family", name)}
    known = layers() if kind == "layer" else models() if kind in ("model", "model_type") else ()
    return {Part(kind.removesuffix("_type"), name)} if name in known else set()


def _of_class(given: type) -> set[Part]:
    home = given.__module__
    if home.startswith("fla.layers"):
        return _of_name("layer", given.__name__)
    if home.startswith("fla.models"):
        config = getattr(given, "config_class", given)
        return _of_name("model", getattr(config, "model_type", ""))
    return set()


def of_value(argument: str, value: Any) -> set[Part]:
    """What a parameter of a test names."""
    if isinstance(value, str):
        return _of_name(argument, value)
    if isinstance(value, OpSpec):
        return {Part("op", value.name)}
    if isinstance(value, type):
        return _of_class(value)
    if isinstance(value, FunctionType):
        return {Part("op", spec.name) for spec in REGISTRY.values() if value in spec.forms.values()}
    found: set[Part] = set()
    for name in ("spec", "case", "cls"):
        inner = getattr(value, name, None)
        if inner is not None and inner is not value:
            found |= of_value(name, inner)
    family = getattr(value, "family", None)
    return found | (_of_name("family", family) if isinstance(family, str) else set())


def names_in(code: CodeType) -> set[str]:
    """The global names that a function's body uses, functions inside it included."""
    inner = [names_in(x) for x in code.co_consts if isinstance(x, CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*inner)


def said_of(item: pytest.Item) -> set[Part]:
    """What markers and parameters say that a test is about."""
    found: set[Part] = set()
    for marker in item.iter_markers("touches"):
        for name in marker.args:
            parts = _of_name("op", name) | _of_name("family", name)
            assert parts, f"{item.nodeid}: touches({name!r}) names neither an op nor a family"
            found |= parts
    cases = getattr(item.module, "CASES", None)
    for argument, value in getattr(getattr(item, "callspec", None), "params", {}).items():
        stands_for = cases.get(value) if isinstance(value, str) and isinstance(cases, dict) else None
        found |= of_value(argument, value if stands_for is None else stands_for)
    return found


def used_by(item: pytest.Item) -> set[Part]:
    """What a test's body names."""
    named = (getattr(item.module, name, None) for name in names_in(item.function.__code__))
    return set().union(*(of_value("", x) for x in named if isinstance(x, type | FunctionType)))


def counted_under(parts: Iterable[Part]) -> list[Part]:
    """The parts of the first kind among KINDS that there are any of."""
    parts = sorted(parts)
    return next(
        ([part for part in parts if part.kind == kind] for kind in KINDS if any(p.kind == kind for p in parts)), []
    )


def unknown_ops(names: Iterable[str]) -> str | None:
    """What to say of names that are no op's; None if all are."""
    wrong = [name for name in names if name not in REGISTRY]
    return f"OPS must name ops among {', '.join(sorted(REGISTRY))}, got {', '.join(wrong)}" if wrong else None
