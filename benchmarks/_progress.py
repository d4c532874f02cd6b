"""Progress on a terminal, lines above it, and work in parallel."""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_parallel(function: Callable[[Any], Any], items: list[Any], workers: int, what: str) -> list[Any]:
    """`function` of every item, in order, some at a time."""
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        return list(progress(pool.map(function, items), what, len(items)))
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A progress bar on a terminal, where tqdm is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, total=total, leave=False)


def say(text: str) -> None:
    """Print a line above the progress bar, at once."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, flush=True)
    else:
        tqdm.tqdm.write(text)
        sys.stdout.flush()
