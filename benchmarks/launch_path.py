"""What launching a kernel costs the host: `python -m benchmarks.launch_path`, on a CUDA GPU.

A kernel with 12 arguments that does next to nothing is launched in two ways:

    triton    `kernel[grid](*args, **constants)`
    run       `fla.backends.triton._launch`, which calls the compiled kernel's `run`

The ways take turns. A round has so few launches that the driver's queue never fills, and the program waits for the GPU
between rounds. The quietest round of each way counts. Times are printed as one table, and appended to the records.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks import _local
from benchmarks._local import RESULTS, Recorder
from benchmarks._progress import say
from fla.backends.triton._launch import Launcher

LAUNCHES = 200  # of a round; the driver's queue holds 1,024
WAYS = {
    "triton": "kernel[grid](...)",
    "run": "our launcher, by the compiled kernel's run",
}


@triton.jit(do_not_specialize=["T", "H", "L"])
def touch_kernel(q, k, v, g, h0, sums, o, ht, scale, T, H, L, K: tl.constexpr, V: tl.constexpr):
    """It has the arguments of the chunked forward but one, and stores a number, so that nothing is compiled away."""
    tl.store(o, scale + T + H + L + K + V)


def ways(device: str) -> dict[str, Callable[[], None]]:
    """Name of a way -> a launch by it, which was compiled and run once."""
    tensors = [torch.zeros(64, device=device, dtype=torch.bfloat16) for _ in range(7)]
    args = (*tensors[:4], None, *tensors[4:], 0.5, 64, 1, 64)
    constants = {"K": 64, "V": 64}
    launcher = Launcher(touch_kernel, constants)
    launcher(1, args)
    return {
        "triton": lambda: touch_kernel[(1,)](*args, **constants, num_warps=4, num_stages=1),
        "run": lambda: launcher(1, args),
    }


def quietest(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Name -> seconds per launch in its quietest round."""
    least = dict.fromkeys(calls, float("inf"))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                for _ in range(10):
                    call()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(LAUNCHES):
                    call()
                least[name] = min(least[name], (time.perf_counter() - start) / LAUNCHES)
                torch.cuda.synchronize()
    finally:
        if collecting:
            gc.enable()
    return least


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.launch_path", description="What a launch costs the host.")
    p.add_argument("--rounds", type=int, default=300, help=f"rounds of {LAUNCHES} launches by each way; default 300")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the records; default benchmarks/results")
    _local.common_arguments(p)
    a = p.parse_args(arguments)
    if not torch.cuda.is_available() or a.device == "cpu":
        p.error("a launch needs a CUDA GPU")
    calls = ways("cuda")
    recorder = Recorder("cuda", a.out, a.commit)
    least = quietest(calls, a.rounds)
    for name, seconds in least.items():
        note = f"{WAYS[name]}; wall time of a launch, the quietest of {a.rounds} rounds of {LAUNCHES}"
        shape = {"op": "launch", "shape": "12 arguments", "dtype": "bfloat16"}
        recorder.add(**shape, mode=f"launch_{name}", ms=seconds * 1e3, note=note)
    say("\nus per launch")
    for name, seconds in least.items():
        say(f"  {name:<8}{seconds * 1e6:8.2f}  {WAYS[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
