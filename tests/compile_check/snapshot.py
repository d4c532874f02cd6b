"""Registers, spills, shared memory and tensor-core instructions of every kernel on sm_90, as text.

`python -m tests.compile_check.snapshot` writes `tests/snapshots/kernels.txt` (minutes); a change is reviewed like code.
With a regular expression it compiles only the variants whose "dtype name" it is found in, and those that are new, and
prints what changed: the quick look while a kernel is being written.
"""

import functools
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from tests.compile_check.compiling import Report, compile_kernel
from tests.compile_check.recording import DTYPES, Variant, variants_of

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "snapshots" / "kernels.txt"
TITLE = "# sm_90, Triton {}: python -m tests.compile_check.snapshot\n"


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
    return _entry(dtype, name, line(variant, report))


def _entry(dtype: str, name: str, rest: str) -> str:
    return f"{dtype} {name:46} {rest}\n"


def write(pattern: str = "") -> None:
    if pattern and not is_comparable():
        sys.exit(f"the snapshot is another Triton's than {triton.__version__}: only all of it can be written")
    keys = [(dtype, name) for dtype in DTYPES for name in variants_of(dtype)]
    before = {key: _entry(*key, rest) for key, rest in read().items()} if FILE.exists() else {}
    chosen = [key for key in keys if key not in before or re.search(pattern, " ".join(key))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        now = dict(zip(chosen, pool.map(measured, chosen, chunksize=4), strict=True))
    for key, text in now.items():
        if text != before.get(key):
            print(f"was: {before.get(key, 'not there').strip()}\nnow: {text.strip()}")
    FILE.write_text(TITLE.format(triton.__version__) + "".join(now.get(key) or before[key] for key in keys))


if __name__ == "__main__":
    write(*sys.argv[1:2])
