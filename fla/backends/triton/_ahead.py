"""Compiling all that a call will launch side by side, instead of each kernel when its turn comes.

The first launch that is not compiled yet rehearses its call, and the backward that will follow it, on tensors without
memory: nothing runs, but every launch is seen. Threads then compile them, for Triton's compiler leaves the GIL to
others, and a launch waits for its own kernel alone. What a rehearsal does not foresee (a gradient of the final state,
an input that is not aligned) is compiled when it is launched.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

logger = logging.getLogger("fla")


class _UnderWay(threading.local):
    """Of this thread: how to rehearse the call that is being computed, and during a rehearsal its device and the
    launches seen so far."""

    call: Callable[[], Any] | None = None
    device: torch.device | None = None
    seen: list[tuple[Any, tuple]] | None = None


under_way = _UnderWay()


def rehearsed(device: int) -> list[tuple[Any, tuple]]:
    """Launcher and arguments of every launch of the call under way on this GPU; nothing where no call is known."""
    rehearse, under_way.call = under_way.call, None
    if rehearse is None or torch.cuda.is_current_stream_capturing():
        return []
    under_way.device, under_way.seen = torch.device("cuda", device), []
    try:
        rehearse()
        return under_way.seen
    except Exception:  # the call itself will say what is wrong with it
        logger.debug("a call could not be rehearsed", exc_info=True)
        return []
    finally:
        under_way.device = under_way.seen = None


@functools.cache
def compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="fla-compile")
