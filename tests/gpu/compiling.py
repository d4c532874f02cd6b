"""Kernels compiled once for all processes of a run.

Triton keeps what it compiled on disk, where other processes find it, but processes that reach a kernel at the same time
would each compile it: with 14 workers over the same kernels that is most of a run. So a compilation holds a lock on a
file that is named after the kernel, its types, constants and options: who comes second waits, and then finds it done.
Another kernel has another lock, so that kernels are still compiled side by side. The system frees a lock when its
process ends, however it does.
"""

import fcntl
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def one_at_a_time(compile: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Triton's `compile`, which no two processes (or threads) call at once for the same kernel."""
    folder.mkdir(exist_ok=True)

    @functools.wraps(compile)
    def locked(src: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        named = f"{src.hash()} {target} {sorted((options or {}).items())}"
        with (folder / hashlib.sha256(named.encode()).hexdigest()).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            return compile(src, target=target, options=options, **others)

    return locked
