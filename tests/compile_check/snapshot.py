"""Registers, spills, shared memory and tensor-core instructions of every kernel on sm_90, as text.

`python -m tests.compile_check.snapshot` writes `tests/snapshots/kernels.txt` (minutes); a change is reviewed like code.
"""

import functools
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from tests.compile_check.compiling import Report, compile_kernel
from tests.compile_check.variants import DTYPES, HEADS, Variant, variants

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "snapshots" / "kernels.txt"
TITLE = "# sm_90, Triton {}: python -m tests.compile_check.snapshot\n"


@functools.cache
def variants_of(dtype: str) -> dict[str, Variant]:
    """float32 has the recurrent kernels only, whose slices differ in the largest heads too."""
    return variants(dtype, (*HEADS, (256, 512)) if dtype == "fp32" else HEADS)


def line(variant: Variant, report: Report) -> str:
    made = f"{report.registers} registers, {report.spilled} spilled, {report.shared} shared, {report.wgmma} wgmma"
    return f"{made}, {variant.warps} warps, {variant.stages} stages"


def is_comparable() -> bool:
    """Whether this is the compiler of the snapshot: the pinned one."""
    return re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1] == triton.__version__


@functools.cache
def read() -> dict[tuple[str, str], str]:
    """(dtype, name) -> what was committed of it."""
    found = {}
    for text in FILE.read_text().splitlines()[1:]:
        dtype, name, rest = text.split(maxsplit=2)
        found[dtype, name] = rest
    return found


def measured(key: tuple[str, str]) -> str:
    dtype, name = key
    variant = variants_of(dtype)[name]
    report = compile_kernel(variant.kernel, variant.types, variant.constants, "sm_90", variant.warps, variant.stages)
    return f"{dtype} {name:46} {line(variant, report)}\n"


def write() -> None:
    keys = [(dtype, name) for dtype in DTYPES for name in variants_of(dtype)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        lines = list(pool.map(measured, keys, chunksize=4))
    FILE.write_text(TITLE.format(triton.__version__) + "".join(lines))


if __name__ == "__main__":
    write()
