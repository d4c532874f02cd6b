"""Triton's interpreter without work whose result it throws away: a third of the time, and the same bits.

- A launch puts interpreted functions in the place of those of `triton.language`, and looks through all of its names for
  that. Every call of a device function does so again, though nothing has changed since.
- Every sum and product of integers is computed once more in 64 bits, to assert that it fits into 32. Outside of debug
  mode nothing is asserted.
- Every operation makes the table of Triton's and NumPy's dtypes anew.

All these are inner parts of Triton. Where a version lacks one, that part stays as slow as it is.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

Change = tuple[Any, str, Any, Any]  # an object, one of its attributes, and the attribute's value before and after


def _one_patch_a_launch() -> Iterator[Change]:
    executor = getattr(interpreter, "GridExecutor", None)
    if executor is None or not hasattr(interpreter, "_patch_lang"):
        return
    patch, launch = interpreter._patch_lang, executor.__call__
    done: set[tuple[int, ...]] = set()  # of the current launch
    known: dict[int, tuple[int, ...]] = {}  # by a module's names, which no module gives up

    def patch_once(fn: Any) -> Any:
        names = fn.__globals__
        if id(names) not in known:
            known[id(names)] = tuple(sorted({id(x) for x in names.values() if x is tl or x is tl.core}))
        if known[id(names)] in done:
            return None  # only the launch itself undoes its patches
        done.add(known[id(names)])
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    yield interpreter, "_patch_lang", patch, patch_once
    yield executor, "__call__", launch, launch_anew


def _no_second_sums() -> Iterator[Change]:
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        yield builder, "options", options, dataclasses.replace(options, sanitize_overflow=False)


def _remembered_dtypes() -> Iterator[Change]:
    find = getattr(interpreter, "_get_np_dtype", None)
    if find is None:
        return
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    yield interpreter, "_get_np_dtype", find, remembered


CHANGES = (*_one_patch_a_launch(), *_no_second_sums(), *_remembered_dtypes())


def hasten() -> None:
    """Change the interpreter of this process."""
    for owner, name, _, after in CHANGES:
        setattr(owner, name, after)


@contextmanager
def unhastened() -> Iterator[None]:
    """Within it the interpreter is as Triton has it."""
    for owner, name, before, _ in CHANGES:
        setattr(owner, name, before)
    try:
        yield
    finally:
        hasten()
