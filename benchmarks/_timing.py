"""How a call is timed: inputs from a seed, CUDA events with a cold L2 cache, medians, peak memory, copy bandwidth.

This file imports torch and nothing of this project, because the peer's process uses it too and has another `fla`.
"""

import gc
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIB = 2**20
WARM_SECONDS = 0.1  # of calls that do not count: the clocks of a processor that was idle rise slowly
ROUNDS, LEAST = 5, 5  # rounds of runs, of which the quietest counts, and the fewest runs of a round
LOOPS = 7  # loops of calls, of which the quickest counts, where a single call is too short to time
FLUSH_BYTES = 128 * MIB  # more than any L2 cache holds: every run finds its inputs in device memory
BANDWIDTH_BYTES = {"cuda": 2**30, "cpu": 2**26}


@dataclass(frozen=True)
class Call:
    """The call that a mode times, and the bytes of its results: of the output, and in a backward of the gradients."""

    run: Callable[[], Any]
    result_bytes: int

    def __call__(self) -> Any:
        return self.run()


@dataclass(frozen=True)
class Budget:
    """How long one row is timed: at most `runs` runs and about `seconds`, but always a few runs."""

    seconds: float = 0.3
    runs: int = 500


def noise(shapes: dict[str, list[int]], dtype: torch.dtype, device: str, seed: int) -> dict[str, Tensor]:
    """Standard normal tensors.

    Each depends only on its name, shape and seed: two processes on one device draw the same.
    """
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
        tensors[name] = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return tensors


def checksums(tensors: dict[str, Tensor]) -> dict[str, float]:
    """One number per tensor, by which two processes find out whether they hold the same values."""
    return {name: x.sum(dtype=torch.float64).item() for name, x in tensors.items()}


def first_output(result: Any) -> Tensor:
    """`o` of an operation that returns `o` or `(o, state)`."""
    return result[0] if isinstance(result, tuple) else result


def beginning(o: Tensor, shape: list[int]) -> Tensor:
    """The part of an output `[B, T, ...]` that a reference of this shape is for: first tokens of the last batch row."""
    return o[(slice(-shape[0], None), *map(slice, shape[1:]))]


def make_call(function: Callable[..., Any], tensors: dict[str, Tensor], mode: str, seed: int = 0) -> Call:
    """The call that a mode times: `fwd` without autograd, `fwdbwd` with the gradient of every tensor.

    Gradients are returned, not accumulated. The incoming gradient is drawn before anything is timed. The backward runs
    in the calling thread: waking the autograd engine's own thread takes 20 to 300 us, more than a small op, and a
    training step does it once, not once an op.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return first_output(function(**tensors))

    o = forward()
    size = o.numel() * o.element_size()
    if mode == "fwd":
        return Call(forward, size)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    do = noise({"do": list(o.shape)}, o.dtype, o.device.type, seed)["do"]
    del o

    def forward_backward() -> tuple[Tensor | None, ...]:
        output = first_output(function(**leaves))
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(output, tuple(leaves.values()), do, allow_unused=True)

    return Call(forward_backward, size + sum(x.numel() * x.element_size() for x in tensors.values()))


def measure(call: Callable[[], Any], device: str, budget: Budget) -> dict[str, Any]:
    """Median milliseconds, number of runs, and peak memory in MiB beyond what was allocated before (None on a CPU).

    On a GPU the median is that of the quietest round, because small rows take the host's time, which other programs
    disturb. A `Call` also has its working memory measured: the peak without outputs and gradients.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device == "cpu":
            times, peak = _cpu_times(call, budget), None
        else:
            times, peak = _gpu_times(call, budget)
    finally:
        if collecting:
            gc.enable()
    size = call.result_bytes if isinstance(call, Call) else None
    work = None if peak is None or size is None else max(peak - size / MIB, 0.0)
    return {"ms": statistics.median(times), "runs": len(times), "peak_mb": peak, "work_mb": work}


def per_call(
    call: Callable[[], Any],
    device: str,
    seconds: float,
    loops: int = LOOPS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds per call, of wall time unless another clock is given: those of the quickest of several loops of calls.
    Each loop waits at its end until the GPU has finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    wait()
    start = clock()
    for _ in range(10):
        call()
    wait()
    calls = max(10, int(seconds / loops / ((clock() - start) / 10)))
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(loops):
            start = clock()
            for _ in range(calls):
                call()
            wait()
            times.append((clock() - start) / calls)
    finally:
        if collecting:
            gc.enable()
    return min(times)


def _cpu_times(call: Callable[[], Any], budget: Budget) -> list[float]:
    first = _seconds(call)  # it fills caches and starts threads, and does not count
    least = 3 if first < 30 * budget.seconds else 1
    times: list[float] = []
    end = time.perf_counter() + budget.seconds
    while len(times) < least or (len(times) < budget.runs and time.perf_counter() < end):
        times.append(_seconds(call) * 1e3)
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_times(call: Callable[[], Any], budget: Budget) -> tuple[list[float], float]:
    call()  # compiles and loads the kernels, and fills the allocator's cache
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    estimate, end = 0.0, time.perf_counter() + WARM_SECONDS
    while estimate == 0.0 or time.perf_counter() < end:
        estimate = sum(event_times(call, flush, 5)) / 5e3
    runs = max(LEAST, min(budget.runs, int(budget.seconds / max(estimate, 1e-6))))
    rounds = min(ROUNDS, runs // LEAST)
    return min((event_times(call, flush, runs // rounds) for _ in range(rounds)), key=statistics.median), peak


def event_times(call: Callable[[], Any], flush: Tensor, runs: int) -> list[float]:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(runs)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(runs)]
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, where bytes read and bytes written both count.

    The memory floor divides by it.
    """
    source = torch.ones(BANDWIDTH_BYTES[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    median = measure(lambda: target.copy_(source), device, Budget(0.1, 30))["ms"]
    return 2 * source.numel() / (median * 1e-3)


def floor_bytes(tensors: dict[str, Tensor], output: Tensor, mode: str) -> int:
    """The fewest bytes that the call can move: every input is read once, every output is written once.

    Forward reads the tensors and writes `o`. Backward reads the tensors and `do`, and writes every tensor's gradient.
    """
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    o = output.numel() * output.element_size()
    return size + o if mode == "fwd" else (size + o) + (size + o + size)
