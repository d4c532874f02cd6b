"""Progress bars, printed lines that do not disturb them, and work in parallel."""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_parallel(function: Callable[[Any], Any], items: list[Any], workers: int, what: str) -> list[Any]:
    """Apply `function` to every item, up to `workers` at a time. The results have the order of the items."""
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        return list(progress(pool.map(function, items), what, len(items)))
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """The items, with a progress bar if stderr is a terminal and tqdm is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, total=total, leave=False)


def say(text: str) -> None:
    """Print a line above the progress bar, without delay."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, flush=True)
    else:
        tqdm.tqdm.write(text)
        sys.stdout.flush()
