"""Host overhead of the ops: `python -m benchmarks.host`. Wall time per call in a loop on inputs too tiny to compute.

Modes `host_fwd` (without autograd) and `host_fwdbwd` (forward, and the gradients of every input). Every op is first
checked on the same inputs. Rows are printed in us and appended to the records (in ms). Exit code 1: a row failed.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import _local
from benchmarks import _timing as timing
from benchmarks._local import Recorder
from benchmarks._ours import checked
from benchmarks._plan import parse, show
from benchmarks._progress import progress, say
from fla.ops._spec import REGISTRY

MODES = ("fwd", "fwdbwd")
SHAPE = "B1 T64 H1 D64"
LOOPS = 7


def per_call(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of wall time per call: the least of a few loops, each long enough to time, that end synchronised."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    wait()
    start = time.perf_counter()
    for _ in range(10):
        call()
    wait()
    calls = max(10, int(seconds / LOOPS / ((time.perf_counter() - start) / 10)))
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(LOOPS):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            times.append((time.perf_counter() - start) / calls)
    finally:
        if collecting:
            gc.enable()
    return min(times)


def time_op(op: str, a: argparse.Namespace, recorder: Recorder) -> bool:
    """Check and time one op; whether it failed."""
    form, dims = a.form, parse(a.shape)
    request = {"op": op, "form": form, "backend": a.backend, "dims": dims, "device": a.device, "dtype": a.dtype}
    request |= {"seed": a.seed, "modes": a.mode}
    common = {"op": REGISTRY[op].forms[form].__name__, "shape": show(dims), "dtype": a.dtype}
    mode = a.mode[0]
    try:
        target, tensors, backend = checked(request)
        for mode in a.mode:
            call = timing.make_call(target.call, tensors, mode, a.seed)
            seconds = per_call(call.run, a.device, a.seconds)
            where = "" if a.device == "cuda" else f"; {recorder.info['machine']}"
            settings = "".join(f"; {name}={value}" for name, value in target.settings.items())
            note = f"{backend} backend; wall time per call in a loop{settings}{where}"
            recorder.add(**common, mode=f"host_{mode}", ms=seconds * 1e3, note=note)
    except Exception as error:
        note, failed = _local.why_not(error)
        recorder.add(**common, mode=f"host_{mode}", note=note)
        return failed
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.host", description="Host overhead of the ops.")
    _local.op_arguments(p)
    p.add_argument("--form", default="chunk", help="form of the ops; default chunk")
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--shape", default=SHAPE, help=f"default {SHAPE!r}")
    p.add_argument("--seconds", type=float, default=0.5, help="about how long a row is timed; default 0.5")
    a = p.parse_args(arguments)
    try:
        _local.settle(a)
        ops = _local.with_form(a.op, a.form)
        parse(a.shape)
    except ValueError as error:
        p.error(str(error))
    recorder = Recorder(a.device, a.out, a.commit)
    failures = sum([time_op(op, a, recorder) for op in progress(ops, "ops")])
    say("\nus per call: " + ", ".join(a.mode))
    for op in dict.fromkeys(row["op"] for row in recorder.rows):
        found = {row["mode"]: row["ms"] for row in recorder.rows if row["op"] == op and row["ms"]}
        cells = [f"{found[f'host_{m}'] * 1e3:9.1f}" if f"host_{m}" in found else "        -" for m in a.mode]
        say(f"  {op:<30}" + "".join(cells))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
