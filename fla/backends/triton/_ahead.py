"""All kernels of a call are compiled side by side, instead of each when its turn to be launched comes.

The first launch whose kernel is not compiled yet rehearses its call: it runs the call's forward, and the backward that
will follow, once more on tensors without memory. Nothing is computed, but every launch is seen. Threads then compile
all of these kernels (Triton's compiler releases the GIL), and each launch waits for its own kernel alone.

A family's forward is rehearsed if it goes through `with_rehearsal`. The forward and the backward must obey these rules:

- They decide from shapes, dtypes, devices and settings alone, never from what a tensor holds: no `.item()`,
  `.tolist()`, `if x.any()`, no copy to the host. (The tensors of a rehearsal are on the device "meta".)
- They make tensors out of the problem's: `x.new_empty(...)`, `empty_as(x)`, or torch operations that work without
  memory. They never name a device: `torch.empty(..., device="cuda")` would allocate.
- They launch through `launch` or a `Launcher`, and ask `has_tensor_descriptors` what a device can do.
- They change nothing that outlives the call: not the problem, and no cache of tensors.
- What a forward hands to its backward is in its `Saved`. The rehearsed backward gets the `Saved` of the rehearsed
  forward.

A rehearsal does not foresee everything: a gradient of the final state, gradients that are not wanted, an input that is
not aligned. This costs time alone: a kernel is compiled when it is launched, or it is compiled and never used.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fla.backends._recurrence import Recurrence

logger = logging.getLogger("fla")


class _ThreadState(threading.local):
    """What this thread is doing.

    `call`: the arguments of `rehearse` for the call that is being computed. `device` and `seen`: during a rehearsal,
    the GPU of the call and the launches so far (launcher and arguments of each).
    """

    call: tuple | None = None
    device: torch.device | None = None
    seen: list[tuple[Any, tuple]] | None = None


thread_state = _ThreadState()


def with_rehearsal(forward: Callable, backward: Callable, problem: Recurrence, output_final_state: bool, keep: bool):
    """Returns `forward(problem, output_final_state, keep)`.

    If a kernel of it is not compiled yet, all kernels of the forward and of the `backward` that follows are compiled
    side by side.
    """
    thread_state.call = forward, backward, problem, output_final_state, keep
    try:
        return forward(problem, output_final_state, keep)
    finally:
        thread_state.call = None  # it holds the problem's tensors


def rehearse(forward: Callable, backward: Callable, problem: Recurrence, output_final_state: bool, keep: bool) -> None:
    """Runs a forward, and the backward for all of its inputs, on tensors without memory.

    The final state gets no gradient here, because it has none in most calls.
    """
    given = {field.name: getattr(problem, field.name) for field in fields(problem)}
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    made = type(problem)(**given | {name: given[name].to("meta") for name in names})
    o, _, saved = forward(made, output_final_state, keep)
    if saved is not None:
        needs = frozenset(names).difference(problem.constants)
        backward(saved.problem, saved.tensors, o.to(made.dtype), None, needs)


def rehearse_current_call(device: int) -> list[tuple[Any, tuple]]:
    """Launcher and arguments of every launch of the call that this thread computes on this GPU.

    The list is empty where no call is known, while a CUDA graph is captured, and where the rehearsal fails.
    """
    call, thread_state.call = thread_state.call, None
    if call is None or torch.cuda.is_current_stream_capturing():
        return []
    thread_state.device, thread_state.seen = torch.device("cuda", device), []
    try:
        rehearse(*call)
        return thread_state.seen
    except Exception:  # the call itself meets the same error, and raises it
        logger.debug("a call could not be rehearsed", exc_info=True)
        return []
    finally:
        thread_state.device = thread_state.seen = None


@functools.cache
def compiler_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="fla-compile")
