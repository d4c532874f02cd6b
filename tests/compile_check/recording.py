"""Kernels as their launchers launch them: recorded on tensors that have no memory, with all that a compiler is told.

A family declares in `tests/families/<family>_kernels.py`, as `KERNELS`, what is to be compiled of it.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fla.backends.triton import _launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float64: "fp64", torch.int32: "i32"}
FAMILIES = Path(__file__).parents[1] / "families"


@dataclass(frozen=True)
class Variant:
    """A kernel with all that a compiler is told; what else is known of it, a family's subclass says."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def base(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def is_matrix(self) -> bool:
        """Whether it has dots."""
        return True

    @property
    def uses_wgmma(self) -> bool:
        """Whether Hopper's warpgroups issue its dots: those of 64 rows or more."""
        return self.is_matrix

    @property
    def operands(self) -> str:
        """Type of what dots read, or of what else the kernel is about."""
        return next(iter(self.types.values()))

    @property
    def programs(self) -> int:
        """How many different programs it holds, each of which may spill."""
        return 1

    @property
    def fits_twice(self) -> bool:
        """Whether two programs are to fit on a multiprocessor."""
        return False

    @property
    def traits(self) -> set[Any]:
        """What it is an example of: `make test` compiles an example of every trait, `make test-all` every variant."""
        return {self.base}


@dataclass(frozen=True)
class Kernels:
    """What is compiled of a family. `variants(dtype)`: name -> variant, on a GPU with tensor descriptors (Hopper).

    `elsewhere()`: the same in bfloat16 for GPUs without; `everywhere`: those of them that `make test` compiles too.
    `fits_twice`: how many of the bfloat16 variants are to fit twice.
    """

    variants: Callable[[str], dict[str, Variant]]
    elsewhere: Callable[[], dict[str, Variant]]
    everywhere: tuple[str, ...]
    fits_twice: int = 0


@functools.cache
def families() -> dict[str, Kernels]:
    """Family -> its `KERNELS`, for every family that has a `_kernels.py`."""
    names = sorted(path.stem for path in FAMILIES.glob("*_kernels.py"))
    modules = {name: importlib.import_module(f"tests.families.{name}") for name in names}
    return {name.removesuffix("_kernels"): module.KERNELS for name, module in modules.items()}


@functools.cache
def variants_of(dtype: str) -> dict[str, Variant]:
    """Name -> variant, of all families."""
    found: dict[str, Variant] = {}
    for family, kernels in families().items():
        for name, variant in kernels.variants(dtype).items():
            assert name not in found, f"{family}: another family has a kernel {name}"
            found[name] = variant
    return found


def record(call: Callable[[], Any]) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Kernel, types, constants and settings of everything that `call` launches; nothing runs."""
    seen: list = []
    launch = _launch.Launcher.__call__

    def keep(self, grid: int, args: tuple) -> None:
        given = dict(zip(self._kernel.arg_names, args, strict=False))
        types = {name: type_of(x) for name, x in given.items() if x is not None}
        constants = {name: None for name, x in given.items() if x is None} | self._constants
        seen.append((self._kernel, types, constants, self._settings))

    _launch.Launcher.__call__ = keep  # type: ignore[method-assign]
    try:
        call()
    finally:
        _launch.Launcher.__call__ = launch  # type: ignore[method-assign]
    return seen


def type_of(value: Any) -> str:
    """The Triton type of an argument."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@contextmanager
def descriptors(are_there: bool) -> Iterator[None]:
    """As on a GPU that has tensor descriptors, or on one that has none."""
    has_descriptors = _launch._has_descriptors
    _launch._has_descriptors = lambda device: are_there  # type: ignore[assignment]
    try:
        yield
    finally:
        _launch._has_descriptors = has_descriptors


def examples(cases: dict[Any, Variant]) -> set[Any]:
    """Keys of few variants that have every trait: first those with most new ones for what they cost to compile."""
    traits = {key: variant.traits for key, variant in cases.items()}
    missing, chosen = set().union(*traits.values()), set()
    while missing:
        best = max(cases, key=lambda key: len(traits[key] & missing) / (1 + cases[key].programs * cases[key].is_matrix))
        chosen.add(best)
        missing -= traits[best]
    return chosen
