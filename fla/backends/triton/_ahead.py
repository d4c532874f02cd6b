"""Compiling all that a call will launch side by side, instead of each kernel when its turn comes.

The first launch that is not compiled yet rehearses its call, and the backward that will follow it, on tensors without
memory: nothing runs, but every launch is seen. Threads then compile them, for Triton's compiler leaves the GIL to
others, and a launch waits for its own kernel alone.

A family's forward is rehearsed if it goes through `with_rehearsal`. What its forward and backward must obey:

- They decide from shapes, dtypes, devices and settings alone, never from what a tensor holds: no `.item()`,
  `.tolist()`, `if x.any()`, no copy to the host. (Tensors of a rehearsal are on the device "meta".)
- They make tensors out of the problem's: `x.new_empty(...)`, `empty_as(x)`, or torch operations that work without
  memory. A device is never named: `torch.empty(..., device="cuda")` would be memory.
- They launch through `launch` or a `Launcher`, and ask `has_tensor_descriptors` for what a device can do.
- They change nothing that outlives the call: not the problem, no cache of tensors.
- What a forward hands to its backward is in its `Saved`: the rehearsed backward gets that of the rehearsed forward.

What a rehearsal does not foresee (a gradient of the final state, gradients that are not wanted, an input that is not
aligned) costs nothing but time: it is compiled when it is launched, or compiled and not used.
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


class _UnderWay(threading.local):
    """Of this thread: the arguments of `rehearse` for the call that is being computed, and during a rehearsal its
    device and the launches seen so far."""

    call: tuple | None = None
    device: torch.device | None = None
    seen: list[tuple[Any, tuple]] | None = None


under_way = _UnderWay()


def with_rehearsal(forward: Callable, backward: Callable, problem: Recurrence, output_final_state: bool, keep: bool):
    """`forward(problem, output_final_state, keep)`. If a launch of it is not compiled yet, all of its launches and
    those of the `backward` that follows are compiled side by side."""
    under_way.call = forward, backward, problem, output_final_state, keep
    try:
        return forward(problem, output_final_state, keep)
    finally:
        under_way.call = None  # it holds the problem's tensors


def rehearse(forward: Callable, backward: Callable, problem: Recurrence, output_final_state: bool, keep: bool) -> None:
    """The launches of this forward, and of the backward of all its inputs that follows it, on tensors without memory.

    The final state gets no gradient: most calls have none."""
    given = {field.name: getattr(problem, field.name) for field in fields(problem)}
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    made = type(problem)(**given | {name: given[name].to("meta") for name in names})
    o, _, saved = forward(made, output_final_state, keep)
    if saved is not None:
        needs = frozenset(names).difference(problem.constants)
        backward(saved.problem, saved.tensors, o.to(made.dtype), None, needs)


def rehearsed(device: int) -> list[tuple[Any, tuple]]:
    """Launcher and arguments of every launch of the call under way on this GPU; nothing where no call is known."""
    call, under_way.call = under_way.call, None
    if call is None or torch.cuda.is_current_stream_capturing():
        return []
    under_way.device, under_way.seen = torch.device("cuda", device), []
    try:
        rehearse(*call)
        return under_way.seen
    except Exception:  # the call itself will say what is wrong with it
        logger.debug("a call could not be rehearsed", exc_info=True)
        return []
    finally:
        under_way.device = under_way.seen = None


@functools.cache
def compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="fla-compile")
