"""Bad calls of an op, and what each must raise: a ValueError or TypeError that names the argument, expected and actual.

A bad call is a change to the keywords of a good one. All are refused before anything is computed, on every backend.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fla.testing.contract import Case, accepts
from fla.testing.inputs import state_names
from fla.testing.runs import initial_state

Keywords = dict[str, Any]


@dataclass(frozen=True)
class BadCall:
    """`change` turns good keywords into bad ones; the message must match every pattern in `says`."""

    name: str
    case: Case
    change: Callable[[Keywords], Keywords]
    says: tuple[str, ...]
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError)

    def __str__(self) -> str:
        return f"{self.case.spec.name}-{self.case.form}-{self.name}"


def good_call(case: Case) -> Keywords:
    """Keywords of a legal call of the case."""
    states = state_names(case.spec, case.variant)
    inputs = case.inputs()
    keywords: Keywords = {name: x for name, x in inputs.items() if name not in states} | case.variant.settings
    keywords |= initial_state(tuple(inputs[name] for name in states if name in inputs))
    if case.cu_seqlens is not None:
        keywords["cu_seqlens"] = case.cu_seqlens
    return keywords | {"backend": case.backend}


def check_bad_call(bad: BadCall) -> None:
    """The bad call raises what it must. (That the good one passes is for the caller to check, once a case.)"""
    try:
        bad.case.function(**bad.change(good_call(bad.case)))
    except bad.error as error:
        for pattern in bad.says:
            if not re.search(pattern, str(error)):
                raise AssertionError(f"{bad}: the message must say {pattern!r}, got: {error}") from error
        return
    raise AssertionError(f"{bad}: no error")


def bad_calls(cases: list[Case]) -> list[BadCall]:
    """Every mistake that calls of these forms can make. A mistake that several variants share is tried once."""
    found = {str(bad): bad for case in reversed(cases) for bad in _bad_calls(small(case))}
    return list(reversed(found.values()))


def small(case: Case) -> Case:
    """Five tokens, and sizes that tell the axes apart."""
    return replace(case.resized(H=2, K=4, V=3, D=6), tokens=5, batch=2)


def _bad_calls(case: Case) -> Iterator[BadCall]:
    packed = replace(case, tokens=(2, 0, 3))
    left_out = (*case.variant.without, *state_names(case.spec, case.variant))
    tensors = [name for name in case.spec.shapes if name not in left_out]
    for name in tensors:
        yield from _bad_tensor(case, name, tensors)
    if accepts(case, "initial_state"):
        yield from _bad_state(case, packed)
    yield from _bad_values(case)
    if accepts(case, "cu_seqlens"):
        yield from _bad_packing(case, packed)


def _bad_tensor(case: Case, name: str, tensors: list[str]) -> Iterator[BadCall]:
    shape = case.spec.shapes[name].split()
    first = tensors[0]

    def bad(what: str, change: Callable[[Tensor], Any], *says: str, error: Any = (ValueError, TypeError)) -> BadCall:
        return BadCall(f"{name}-{what}", case, lambda good: good | {name: change(good[name])}, says, error)

    yield bad("not_a_tensor", lambda x: x.tolist(), name, "list", error=TypeError)
    if name not in case.spec.flat:
        yield bad("one_axis_more", lambda x: x.unsqueeze(0), name, str(len(shape) + 1), error=ValueError)
    yield bad("one_axis_less", lambda x: x[0], name, error=ValueError)
    yield bad("integer", lambda x: x.long(), name, "int64", error=TypeError)
    if name in case.spec.required:
        yield bad("missing", lambda x: None, name)
    for i, axis in enumerate(shape):
        # the first tensor sets the sizes of its axes: if it is the wrong one, the error names another
        shared = [other for other in tensors if other != name and axis in case.spec.shapes[other].split()]
        if not shared:
            continue
        named = name if name != first else "|".join(shared)
        yield bad(f"wrong_{axis}", _lengthen(i), named, r"\d", error=ValueError)
        if not axis.isdigit():
            yield bad(f"one_{axis}", _keep_one(i), named, r"\b1\b", error=ValueError)
    if name != first:
        yield bad("other_device", lambda x: x.to("meta"), name, "meta", error=ValueError)
    if name in case.spec.same_dtype and name != first:
        yield bad("other_dtype", lambda x: x.to(torch.float64), name, "float64")


def _lengthen(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat((x, x.narrow(axis, 0, 1)), axis)


def _keep_one(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(axis, 0, 1)


def _bad_state(case: Case, packed: Case) -> Iterator[BadCall]:
    first = state_names(case.spec, case.variant)[0]

    def bad(
        what: str, change: Callable[[Tensor], Any], *says: str, of: Case = case, error: Any = ValueError
    ) -> BadCall:
        def changed(good: Keywords) -> Keywords:
            state = good["initial_state"]
            wrong = (change(state[0]), *state[1:]) if isinstance(state, tuple) else change(state)
            return good | {"initial_state": wrong}

        return BadCall(f"initial_state-{what}", of, changed, (f"initial_state|{first}", *says), error)

    yield bad("one_axis_less", lambda s: s[0], r"\d")
    yield bad("wrong_N", lambda s: s[:1], r"\b1\b")
    yield bad("wrong_N_packed", lambda s: s[:1], r"\b1\b", of=packed)
    axes = case.spec.shapes[first].split()
    dims = case.dims | {"N": case.batch}
    sizes = [int(axis) if axis.isdigit() else dims[axis] for axis in axes]
    for i in [i for i in range(1, len(axes)) if sizes[i] > 1]:
        yield bad(f"wrong_{axes[i]}", _keep_one(i), r"\b1\b")
    if sizes[-1] != sizes[-2]:
        yield bad("transposed", lambda s: s.transpose(-1, -2), rf"\b{sizes[-1]}\b", rf"\b{sizes[-2]}\b")
    yield bad("integer", lambda s: s.long(), "int64", error=TypeError)
    yield bad("other_device", lambda s: s.to("meta"), "meta")


def _bad_values(case: Case) -> Iterator[BadCall]:
    def bad(what: str, settings: Keywords, *says: str, error: Any = (ValueError, TypeError)) -> BadCall:
        return BadCall(what, case, lambda good: good | settings, says, error)

    if accepts(case, "scale"):
        yield bad("scale-nan", {"scale": float("nan")}, "scale", "nan", error=ValueError)
        yield bad("scale-inf", {"scale": float("inf")}, "scale", "inf", error=ValueError)
        yield bad("scale-string", {"scale": "1.0"}, "scale", "str")
    yield bad("backend-unknown", {"backend": "cuda"}, "backend", "'cuda'", error=ValueError)
    yield bad("head_first", {"head_first": True}, "head_first", error=TypeError)


def _bad_packing(case: Case, packed: Case) -> Iterator[BadCall]:
    def bad(
        what: str, value: Any, *says: str, of: Case = packed, error: Any = ValueError, name: str = "cu_seqlens"
    ) -> BadCall:
        def changed(good: Keywords) -> Keywords:
            return good | {"cu_seqlens": value(good) if callable(value) else value}

        return BadCall(f"cu_seqlens-{what}", of, changed, (name, *says), error)

    def bounds(*values: int) -> Callable[[Keywords], Tensor]:
        return lambda good: torch.tensor(values, dtype=torch.int32, device=case.device)

    yield bad("not_a_tensor", [0, 2, 2, 5], "list", error=TypeError)
    yield bad("float", lambda good: good["cu_seqlens"].float(), "float32", error=TypeError)
    yield bad("two_axes", lambda good: good["cu_seqlens"][None], r"\[1, 4\]")
    yield bad("one_bound", bounds(0), r"\[1\]")
    yield bad("batch", bounds(0, 2, 5), r"batch", "2", of=replace(case, state="none"))
    yield bad("other_device", lambda good: good["cu_seqlens"].to("meta"), "meta")
    yield BadCall("offsets", packed, lambda good: good | {"offsets": good["cu_seqlens"]}, ("offsets",), TypeError)
    if case.device == "cpu":  # on a GPU the values are checked only on request, since reading them waits for it
        yield bad("start", bounds(1, 2, 2, 5), "start", "0", r"\b1\b")
        yield bad("end_early", bounds(0, 2, 2, 4), r"\b5\b", r"\b4\b")
        yield bad("end_late", bounds(0, 2, 2, 6), r"\b5\b", r"\b6\b")
        yield bad("decreasing", bounds(0, 3, 2, 5), "decrease", r"3, 2")
