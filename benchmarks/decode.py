"""Decoding: `python -m benchmarks.decode` times one token through `fused_recurrent_*`, from a state to the next.

- Mode `decode`: one call with a cold L2 cache. Its memory floor is the time to read and write the state once at copy
  bandwidth, so `1 / floor_x` says at which share of the copy bandwidth the state moves.
- Mode `decode_graph`: time per call in a CUDA graph of many calls, each of which gets the state of the one before.
  Without a GPU it is a plain loop of calls, mode `decode_loop`.

Output and state are compared with the float64 recurrence before anything is timed. Exit code 1: a row failed.
"""

import argparse
import inspect
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import _local
from benchmarks import _timing as timing
from benchmarks._local import Recorder
from benchmarks._progress import progress, say
from benchmarks._shapes import parse, show, sizes
from benchmarks._targets import find
from fla.backends import resolve
from fla.ops._spec import REGISTRY
from fla.testing import assert_within_budget

FORM = "fused_recurrent"
WIDE = {"cuda": "B64 T1 H32 D128", "cpu": "B2 T1 H4 D16"}
SINGLE = {"cuda": "B1 T1 H16 D128", "cpu": "B1 T1 H2 D16"}
GRAPH_CALLS = 100
State = Tensor | tuple[Tensor, ...]  # a tuple where an op has a state of several parts
Step = Callable[[State], tuple[Tensor, State]]


def make_step(op: str, dims: dict[str, int], a: argparse.Namespace) -> tuple[Step, State, str]:
    """`step(state) -> (o, next state)` on inputs from the seed, a first state, and the backend.

    Raises AssertionError if the output or the state of a step is wrong.
    """
    spec, target = REGISTRY[op], find(op, FORM, a.backend)
    dtype = getattr(torch, a.dtype)
    noise = timing.noise(sizes(target.shapes, dims), dtype, a.device, a.seed)
    legal = target.inputs(dict(noise))
    tensors = {name: legal[name].to(dtype).contiguous() for name in target.shapes}
    shapes = sizes(target.states, dims | {"N": dims["B"]})
    first = tuple(timing.noise(shapes, torch.float32, a.device, a.seed).values())
    taken = inspect.signature(spec.reference).parameters
    settings = {name: value for name, value in target.settings.items() if name in taken}

    def step(state: State) -> tuple[Tensor, State]:
        return target.call(**tensors, initial_state=state, output_final_state=True)

    def naive(wide: torch.dtype) -> tuple[Tensor, State]:
        given = {name: x.to(wide) for name, x in tensors.items()}
        state = whole(tuple(part.to(wide) for part in first))
        return spec.reference(**given, **settings, initial_state=state, output_final_state=True)

    with torch.no_grad():
        (o, after), reference, usual = step(whole(first)), naive(torch.float64), naive(torch.float32)
    backend = resolve(spec.family, o, a.backend)
    assert_within_budget("o", o, reference[0], usual[0].to(dtype), backend=backend)
    for number, found in enumerate(zip(parts(after), parts(reference[1]), parts(usual[1]), strict=True), 1):
        name = "final state" if len(first) == 1 else f"final state, part {number}"
        assert_within_budget(name, found[0], found[1], found[2].float(), dtype=dtype, backend=backend)
    return step, whole(first), backend


def parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def whole(state: tuple[Tensor, ...]) -> State:
    """A state as an op takes it: a tensor, or a tuple of its parts."""
    return state[0] if len(state) == 1 else state


def wide_row(op: str, a: argparse.Namespace, recorder: Recorder) -> None:
    """Time one call on many states."""
    dims = find(op, FORM).fit(parse(a.wide))
    step, state, backend = make_step(op, dims, a)

    def call() -> Any:
        with torch.no_grad():
            return step(state)

    row = timing.measure(call, a.device, timing.Budget(a.seconds))
    moved = 2 * sum(part.numel() * part.element_size() for part in parts(state))
    share = moved / (row["ms"] * 1e-3) / recorder.info["bandwidth"]
    note = f"{backend} backend; {share:.0%} of copy bandwidth on state traffic"
    add(op, dims, "decode", a, recorder, ms=row["ms"], floor_x=1 / share, peak_mb=row["peak_mb"], note=note)


def single_row(op: str, a: argparse.Namespace, recorder: Recorder) -> None:
    """Time many calls one after the other on few states."""
    dims = find(op, FORM).fit(parse(a.single))
    step, state, backend = make_step(op, dims, a)
    with torch.no_grad():
        if a.device == "cuda":
            mode, ms = "decode_graph", graph_ms(step, state)
            note = f"{backend} backend; a CUDA graph of {GRAPH_CALLS} calls"
        else:
            mode, ms = "decode_loop", timing.per_call(lambda: step(state), a.device, a.seconds) * 1e3
            note = f"{backend} backend; {recorder.info['machine']}"
    add(op, dims, mode, a, recorder, ms=ms, note=note)


def graph_ms(step: Step, state: State) -> float:
    """Milliseconds per call in a CUDA graph. Each call gets the state of the one before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles the kernels, and fills the caches of this stream
            step(state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = state
        for _ in range(GRAPH_CALLS):
            _, x = step(x)
    graph.replay()
    torch.cuda.synchronize()
    flush = torch.empty(timing.FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return statistics.median(timing.event_times(graph.replay, flush, 20)) / GRAPH_CALLS


def add(op: str, dims: dict[str, int], mode: str, a: argparse.Namespace, recorder: Recorder, **fields: Any) -> None:
    name = REGISTRY[op].forms[FORM].__name__
    recorder.add(op=name, shape=show(dims), dtype=a.dtype, mode=mode, **fields)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Time decoding, one token per call.")
    _local.op_arguments(p)
    p.add_argument("--wide", metavar="SHAPE", help=f"shape with many states; default {WIDE['cuda']!r} on a GPU")
    p.add_argument("--single", metavar="SHAPE", help=f"shape with few states; default {SINGLE['cuda']!r} on a GPU")
    p.add_argument("--seconds", type=float, default=0.3, help="about how long a row is timed; default 0.3")
    a = p.parse_args(arguments)
    try:
        _local.settle(a)
        ops = _local.with_form(a.op, FORM)
        a.wide, a.single = a.wide or WIDE[a.device], a.single or SINGLE[a.device]
        for shape in (a.wide, a.single):
            for op in ops:
                find(op, FORM).fit(parse(shape))
    except ValueError as error:
        p.error(str(error))
    recorder, failures = Recorder(a.device, a.out, a.commit), 0
    for op in progress(ops, "ops"):
        for row, shape in ((wide_row, a.wide), (single_row, a.single)):
            try:
                row(op, a, recorder)
            except Exception as error:
                note, failed = _local.why_not(error)
                failures += failed
                add(
                    op,
                    find(op, FORM).fit(parse(shape)),
                    "decode" if row is wide_row else "decode_graph",
                    a,
                    recorder,
                    note=note,
                )
    say("\nus per call, and how fast the state is read and written: share of copy bandwidth")
    for r in recorder.rows:
        time = "-" if r["ms"] is None else f"{r['ms'] * 1e3:.1f}"
        share = "" if not r["floor_x"] else f"{1 / r['floor_x']:.0%}"
        say(f"  {r['op']:<30}{r['shape']:<20}{r['mode']:<14}{time:>9}{share:>6}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
