"""One checkout's side of `benchmarks.host`: makes the calls of an op ready, and times rounds of them.

In the command's own process, or with `--against` in one process for each checkout: `benchmarks/_checkout.py`.
"""

import contextlib
import time
from typing import Any

from benchmarks import _timing as timing
from benchmarks._idle import idle
from benchmarks._local import why_not
from benchmarks._ours import checked, prepared

_calls: dict[str, timing.Call] = {}  # by mode, of the op at hand
_idling = contextlib.ExitStack()


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Make the calls of an op ready, in every mode. It is checked first, unless the backend is to compute nothing."""
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
    """Microseconds of a call in one loop of calls."""
    call = _calls[request["mode"]]
    # a backend that computes nothing waits for nothing: processor time is what a call takes, whoever else is at work
    clock = time.process_time if request["idle"] else time.perf_counter
    seconds = timing.per_call(call.run, request["device"], request["seconds"], 1, clock)
    return {"status": "ok", "us": seconds * 1e6}


def release(request: dict[str, Any]) -> dict[str, Any]:
    """Let go of the op at hand: its backend computes again."""
    _calls.clear()
    _idling.close()
    return {"status": "ok"}


HANDLERS = {"prepare": prepare, "round": time_round, "release": release}
