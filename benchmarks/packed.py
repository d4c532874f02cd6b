"""Packed sequences: `python -m benchmarks.packed` times many sequences of skewed lengths in one row, and one long one.

Modes `packed_fwd` and `packed_fwdbwd` time the pack; `whole_fwd` and `whole_fwdbwd` time the same tokens as one
sequence. Output and gradients of some of the sequences are compared with the float64 recurrence before anything is
timed. Exit code 1: a row failed.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import _local
from benchmarks import _timing as timing
from benchmarks._local import Recorder
from benchmarks._progress import progress, say
from benchmarks._shapes import parse, show, sizes
from benchmarks._targets import Target, cut, find
from fla.backends import resolve
from fla.ops._spec import REGISTRY
from fla.testing import assert_within_budget

MODES = ("fwd", "fwdbwd")
SHAPE = {"cuda": "B1 T65536 H16 D128", "cpu": "B1 T512 H2 D16"}
SEQUENCES = {"cuda": 1000, "cpu": 20}
LONGEST_CHECKED = 256


def skewed_bounds(tokens: int, sequences: int, seed: int) -> Tensor:
    """`cu_seqlens` of lengths that differ by orders of magnitude (log-normal), each at least 1.

    Raises ValueError for more sequences than tokens.
    """
    if not 1 <= sequences <= tokens:
        raise ValueError(f"--sequences must be from 1 to the {tokens} tokens of a row, got {sequences}")
    weights = torch.randn(sequences, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()
    lengths = 1 + ((tokens - sequences) * weights / weights.sum()).floor().long()
    lengths[lengths.argmax()] += tokens - lengths.sum()
    return torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()


def check(target: Target, tensors: dict[str, Tensor], bounds: Tensor, backend: str, a: argparse.Namespace) -> None:
    """Compare three short sequences (the first, the middle and the last one) with the reference.

    Raises AssertionError.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    o = timing.first_output(target.call(**leaves, cu_seqlens=bounds))
    do = timing.noise({"do": list(o.shape)}, o.dtype, a.device, a.seed)["do"]
    gradients = torch.autograd.grad(o, tuple(leaves.values()), do)
    found = {"o": o.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    pairs = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    short = [pair for pair in pairs if pair[1] - pair[0] <= LONGEST_CHECKED]
    for start, end in {short[0], short[len(short) // 2], short[-1]} if short else set():
        reference, usual = (
            _alone(target, tensors, do, slice(start, end), dtype) for dtype in (torch.float64, torch.float32)
        )
        for name, expected in reference.items():
            value, naive = found[name], usual[name].to(found[name].dtype)
            part = value[:, start:end][tuple(map(slice, expected.shape))]
            gate, where = name.removeprefix("d") in target.gates, f"{name} of tokens {start} to {end}"
            assert_within_budget(where, part, expected, naive, backend=backend, gate=gate)


def _alone(target: Target, tensors: dict[str, Tensor], do: Tensor, tokens: slice, dtype: torch.dtype):
    """The reference's output for these tokens, and its gradients for the inputs that have an axis T."""
    part = cut(target.shapes, tensors, slice(None), tokens)
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in part.items()}
    o = target.reference(**leaves)
    do = do[:, tokens][tuple(map(slice, o.shape))]
    wanted = {name: x for name, x in leaves.items() if "T" in target.shapes[name].split()}
    gradients = torch.autograd.grad(o, tuple(wanted.values()), do.to(o.dtype))
    return {"o": o.detach()} | {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}


def time_op(op: str, a: argparse.Namespace, recorder: Recorder) -> bool:
    """Check and time one op. Returns whether it failed."""
    dims, dtype = find(op, "chunk").fit(parse(a.shape)), getattr(torch, a.dtype)
    common = {"op": REGISTRY[op].forms["chunk"].__name__, "shape": show(dims), "dtype": a.dtype}
    mode = f"packed_{a.mode[0]}"
    try:
        target = find(op, "chunk", a.backend)
        noise = timing.noise(sizes(target.shapes, dims), dtype, a.device, a.seed)
        legal = target.inputs(dict(noise))
        tensors = {name: legal[name].to(dtype).contiguous() for name in target.shapes}
        backend = resolve(REGISTRY[op].family, next(iter(tensors.values())), a.backend)
        bounds = skewed_bounds(dims["T"], a.sequences, a.seed).to(a.device)
        check(target, tensors, bounds, backend, a)
        for base in a.mode:
            mode = f"whole_{base}"
            one = _time(target, tensors, {}, base, a)
            recorder.add(**common, mode=mode, ms=one["ms"], peak_mb=one["peak_mb"], note=f"{backend} backend")
            mode = f"packed_{base}"
            many = _time(target, tensors, {"cu_seqlens": bounds}, base, a)
            note = f"{backend} backend; {a.sequences} sequences take {many['ms'] / one['ms']:.3g}x the time of one"
            recorder.add(**common, mode=mode, ms=many["ms"], peak_mb=many["peak_mb"], note=note)
    except Exception as error:
        note, failed = _local.why_not(error)
        recorder.add(**common, mode=mode, note=note)
        return failed
    return False


def _time(target: Target, tensors: dict[str, Tensor], packing: dict[str, Tensor], mode: str, a: Any) -> dict[str, Any]:
    def function(**leaves: Tensor) -> Any:
        return target.call(**leaves, **packing)

    return timing.measure(timing.make_call(function, tensors, mode, a.seed), a.device, timing.Budget(a.seconds))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.packed", description="Time packed sequences, and one long sequence."
    )
    _local.op_arguments(p)
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--shape", help=f"with B1; default {SHAPE['cuda']!r} on a GPU")
    p.add_argument("--sequences", type=int, help=f"default {SEQUENCES['cuda']} on a GPU")
    p.add_argument("--seconds", type=float, default=0.3, help="about how long a row is timed; default 0.3")
    a = p.parse_args(arguments)
    try:
        _local.settle(a)
        ops = _local.with_form(a.op, "chunk")
        a.shape, a.sequences = a.shape or SHAPE[a.device], a.sequences or SEQUENCES[a.device]
        dims = parse(a.shape)
        for op in ops:
            find(op, "chunk").fit(dims)
        if dims["B"] != 1:
            raise ValueError(f"--shape must have B1 (sequences are packed into one row), got {a.shape}")
        skewed_bounds(dims["T"], a.sequences, a.seed)
    except ValueError as error:
        p.error(str(error))
    recorder = Recorder(a.device, a.out, a.commit)
    failures = sum([time_op(op, a, recorder) for op in progress(ops, "ops")])
    say("")
    for r in recorder.rows:
        time = "-" if r["ms"] is None else f"{r['ms']:.4g} ms"
        say(f"  {r['op']:<24}{r['shape']:<22}{r['mode']:<16}{time:>12}  {r['note']}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
