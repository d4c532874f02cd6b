"""The C function behind Triton's launcher, for `_launch.py`: where it is known, `Compiled.run` is not called but it.

All that knows of it: this file, the field `entry` of `Compiled`, and the block for it in `Launcher.__call__`;
`tests/test_launch_entry.py`, `test_launches_go_to_the_c_function` of the GPU suite, and `benchmarks/launch_path.py`,
which measures what it saves.
"""

import sys
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

ALLOCATED = 512  # bytes to which torch aligns what it allocates
# what the C function takes before the kernel's arguments, in the one form known here (Triton 3.6): grid, stream,
# function, cooperative, dependent launch, scratch, profiler's scratch, metadata, its launch's, hooks
ENTRY_FORMAT = "iiiKKppOOOOOO"


def entry_of(run: Any, scratch: int) -> tuple[Callable, int, int] | None:
    """What `run` calls, with what `run` knows for it, where it is a launcher whose every step is known; else None."""
    launch = getattr(run, "launch", None)
    if type(run).__name__ != "CudaLauncher" or type(launch) is not BuiltinFunctionType:  # one may wrap another
        return None
    if getattr(sys.modules[type(run).__module__], "_BASE_ARGS_FORMAT", None) != ENTRY_FORMAT:
        return None
    parts = ("num_ctas", "global_scratch_size", "global_scratch_align", "profile_scratch_size")
    ctas, size, alignment, profiled = (getattr(run, name, None) for name in parts)
    flags = getattr(run, "launch_cooperative_grid", None), getattr(run, "launch_pdl", None)
    if ctas != 1 or size != scratch or profiled != 0 or None in (alignment, *flags) or (size and ALLOCATED % alignment):
        return None
    return launch, *flags
