"""One checkout's side of `benchmarks.host`: it prepares the calls of an op, and times rounds of them.

This runs in the command's own process or, with `--against`, in a process for each checkout (`_checkout.py`).
"""

import contextlib
import time
from typing import Any

from benchmarks import _timing as timing
from benchmarks._idle import idle
from benchmarks._local import why_not
from benchmarks._ours import checked, prepared

_calls: dict[str, timing.Call] = {}  # mode -> call of the op that is prepared
_idling = contextlib.ExitStack()


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Prepare the calls of an op in every mode.

    Its results are checked first, unless the backend is to compute nothing.
    """
    release(request)
    try:
        if request["idle"]:
            target, tensors = prepared(request)
            assert target.family is not None
            _idling.enter_context(idle(target.family))
            backend = "idle"
        else:
            target, tensors, backend = checked(request)
        for mode in request["modes"]:
            _calls[mode] = timing.make_call(target.call, tensors, mode, request["seed"])
    except Exception as error:
        note, failed = why_not(error)
        return {"status": "failed" if failed else "unsupported", "why": note}
    return {"status": "ok", "backend": backend, "settings": target.settings}


def time_round(request: dict[str, Any]) -> dict[str, Any]:
    """Time one loop of calls. Returns microseconds a call."""
    call = _calls[request["mode"]]
    # a backend that computes nothing never waits: its processor time is its time, and other programs do not disturb it
    clock = time.process_time if request["idle"] else time.perf_counter
    seconds = timing.per_call(call.run, request["device"], request["seconds"], 1, clock)
    return {"status": "ok", "us": seconds * 1e6}


def release(request: dict[str, Any]) -> dict[str, Any]:
    """Forget the op that is prepared. Its backend computes again."""
    _calls.clear()
    _idling.close()
    return {"status": "ok"}


HANDLERS = {"prepare": prepare, "round": time_round, "release": release}
