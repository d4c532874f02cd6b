"""What the settings of layers and models may be: it follows from their annotations.

A setting annotated `bool` must be True or False, an `int` at least 1, a `float` a finite number above 0 and a `str` a
string; with `| None` it may be None too. `BOUNDS` names the numbers that have another range.
"""

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from types import NoneType
from typing import Any

# Name -> lowest and highest value, both allowed. None in place of one means 0, which itself is not allowed.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "layer_idx": (0, math.inf),
    "v_first_layer": (0, math.inf),
    "norm_eps": (0, math.inf),
    "initializer_range": (0, math.inf),
    "clamp_min": (-math.inf, 0),
    "lower_bound": (-math.inf, None),
    # Some config files say -1 where there is no such token.
    "pad_token_id": (-1, math.inf),
    "bos_token_id": (-1, math.inf),
    "eos_token_id": (-1, math.inf),
}


def check_setting(name: str, annotation: Any, value: Any) -> None:
    """Raise TypeError or ValueError, naming `name`, unless `value` is what the annotation and `BOUNDS` allow.

    Annotations of other types than those above say nothing here.
    """
    kinds = set(typing.get_args(annotation)) or {annotation}
    if value is None and NoneType in kinds:
        return
    kinds -= {NoneType}
    if kinds == {int, float}:
        kinds = {float}
    kind = kinds.pop() if len(kinds) == 1 else None
    got = f"{type(value).__name__} {value!r}"
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {got}")
    if kind is str and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {got}")
    if kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, int if kind is int else Real):
            raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {got}")
        _check_range(name, value, kind is int)


def _check_range(name: str, value: Any, whole: bool) -> None:
    low, high = BOUNDS.get(name, (1, math.inf) if whole else (None, math.inf))
    in_range = (value > 0 if low is None else low <= value) and (value < 0 if high is None else value <= high)
    if math.isfinite(value) and in_range:
        return
    of = "" if whole else "of "
    ranges = [] if low == -math.inf else ["above 0" if low is None else f"{of}at least {low}"]
    ranges += [] if high == math.inf else ["below 0" if high is None else f"{of}at most {high}"]
    raise ValueError(f"{name} must be {'' if whole else 'a finite number '}{' and '.join(ranges)}, got {value}")


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[inspect.Signature, Mapping[str, Any]]:
    return inspect.signature(function), typing.get_type_hints(function)


def check_arguments(constructor: Callable[..., None], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """`check_setting` for every argument of a call of a class's `__init__` whose parameter is annotated."""
    signature, annotations = _parameters(constructor)
    try:
        given = signature.bind_partial(None, *arguments, **keywords).arguments
    except TypeError:
        return  # the call itself fails, and says which argument is one too many
    for name, value in given.items():
        if name in annotations:
            check_setting(name, annotations[name], value)


def did_you_mean(name: Any, known: Iterable[str], likeness: float = 0.6) -> str:
    """The words " (did you mean ...?)" for the nearest of the known names; nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(known), 1, likeness)
    return f" (did you mean {near[0]}?)" if near else ""
