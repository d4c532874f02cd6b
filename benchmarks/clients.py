"""Ops beside the functions that programs run without us: `python -m benchmarks.clients`.

transformers has a PyTorch function for every op that its models ask for. It is timed in turn with ours on the same
inputs in one process, in the calls of its models: q and k are normalised in the op. Both are first compared with the
float64 recurrence on the first tokens. `ms` and `peer_ms` are the quietest rounds; `ratio` above 1: ours is faster.
Records go to `benchmarks/results/clients`. Exit code 1: a row failed.
"""

import argparse
import importlib
import inspect
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
from fla.backends import resolve
from fla.ops._spec import REGISTRY
from fla.testing import assert_within_budget
from fla.testing.budget import relative_rms

MODES = ("fwd", "fwdbwd")
ROUNDS = 5
CHECKED = 130  # tokens: two chunks and a rest
SAME = 0.02  # relative error up to which transformers' function computes the same as the op
CLIENTS = {  # op -> the folder of transformers' models and the name of its function there
    "gated_delta_rule": ("qwen3_next", "torch_chunk_gated_delta_rule"),
    "kda": ("kimi_linear", "chunk_kimi_delta_attention"),
}
SHAPES = {  # heads of both models on a GPU, a few of them on a CPU
    "gated_delta_rule": {"cuda": "B1 T4096 H32 D128", "cpu": "B1 T4096 H4 D128"},
    "kda": {"cuda": "B1 T4096 H32 D128", "cpu": "B1 T4096 H1 D128"},
}
GIVEN = ("q", "k", "v", "g", "beta")


def transformers_version() -> str:
    return importlib.import_module("transformers").__version__


def theirs(op: str) -> Callable[..., Any]:
    """The function of transformers' own for an op."""
    folder, name = CLIENTS[op]
    return inspect.unwrap(getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name))


def both(op: str, backend: str | None) -> dict[str, Callable[..., Any]]:
    ours, other = REGISTRY[op].forms["chunk"], theirs(op)

    def call_ours(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> Any:
        return ours(q, k, v, **rest, use_qk_l2norm_in_kernel=True, backend=backend)

    def call_theirs(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> Any:
        return other(q, k, v, **rest, use_qk_l2norm_in_kernel=True)

    return {"ours": call_ours, "theirs": call_theirs}


def check(op: str, calls: dict[str, Callable[..., Any]], tensors: dict[str, Tensor], backend: str) -> None:
    """Compare outputs and gradients of the first tokens with the recurrence: ours within the budget, theirs to see that
    they compute the same. Raises AssertionError."""
    part, reference = {name: x[:, :CHECKED] for name, x in tensors.items()}, REGISTRY[op].reference
    sides = {"exact": torch.float64, "naive": torch.float32, "ours": None, "theirs": None}
    found = {}
    for side, dtype in sides.items():
        leaves = {key: x.to(dtype or x.dtype).detach().requires_grad_() for key, x in part.items()}
        options = {"use_qk_l2norm_in_kernel": True}
        o = timing.first_output(reference(**leaves, **options) if dtype else calls[side](**leaves))
        do = timing.noise({"do": list(o.shape)}, torch.float32, o.device.type, 0)["do"]
        gradients = torch.autograd.grad(o, tuple(leaves.values()), do.to(o.dtype))
        found[side] = {"o": o.detach()} | {f"d{key}": x for key, x in zip(leaves, gradients, strict=True)}
    for name, exact in found["exact"].items():
        ours, other, gate = found["ours"][name], found["theirs"][name], name == "dg"
        naive = found["naive"][name].to(ours.dtype)
        assert_within_budget(name, ours, exact, naive, dtype=part["q"].dtype, backend=backend, gate=gate)
        if not relative_rms(other, exact) < SAME:
            raise AssertionError(f"{name} of transformers is something else: {relative_rms(other, exact):.3g}")


def time_op(op: str, a: argparse.Namespace, recorder: Recorder) -> bool:
    """Check and time one op. Returns whether it failed."""
    spec, dtype = REGISTRY[op], getattr(torch, a.dtype)
    dims, mode = parse(a.shape or SHAPES[op][a.device]), a.mode[0]
    common = {"op": spec.forms["chunk"].__name__, "shape": show(dims), "dtype": a.dtype}
    try:
        K = dims.pop("D", None)
        dims = dims if K is None else dims | {"K": K, "V": K}
        shapes = {name: spec.shapes[name] for name in GIVEN}
        noise = timing.noise(sizes(shapes, dims | {"HV": dims["H"]}), dtype, a.device, a.seed)
        legal = spec.inputs({**dict.fromkeys(spec.shapes, noise["g"]), **noise})
        tensors = {name: legal[name].to(torch.float32 if name == "g" else dtype) for name in GIVEN}
        backend = resolve(spec.family, tensors["q"], a.backend)
        calls = both(op, a.backend)
        check(op, calls, tensors, backend)
        for mode in a.mode:
            made = {name: timing.make_call(call, tensors, mode, a.seed) for name, call in calls.items()}
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
            for _ in range(ROUNDS):
                for name, call in made.items():
                    found[name].append(timing.measure(call, a.device, timing.Budget(a.seconds / ROUNDS)))
            best = {name: min(rows, key=lambda row: row["ms"]) for name, rows in found.items()}
            ms, peer_ms = best["ours"]["ms"], best["theirs"]["ms"]
            recorder.add(
                **common,
                mode=mode,
                ms=ms,
                peak_mb=best["ours"]["peak_mb"],
                peer=f"transformers {transformers_version()}",
                peer_ms=peer_ms,
                ratio=peer_ms / ms,
                note=f"{backend} backend beside {CLIENTS[op][0]}'s own; {torch.get_num_threads()} threads",
            )
    except Exception as error:
        note, failed = _local.why_not(error)
        recorder.add(**common, mode=mode, note=note)
        return failed
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.clients", description="Time ops beside transformers' own functions."
    )
    _local.op_arguments(p)
    p.set_defaults(out=_local.RESULTS / "clients")
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--shape", help="default: heads of Qwen3-Next and Kimi Linear, T4096")
    p.add_argument("--seconds", type=float, default=1.0, help="about how long each side of a row is timed; default 1")
    a = p.parse_args(arguments)
    try:
        _local.settle(a)
        wrong = [name for name in a.op or () if name not in CLIENTS]
        if wrong:
            raise ValueError(f"--op must be among {', '.join(CLIENTS)}, got {', '.join(wrong)}")
        if a.shape is not None:
            parse(a.shape)
    except ValueError as error:
        p.error(str(error))
    recorder = Recorder(a.device, a.out, a.commit)
    failures = sum([time_op(op, a, recorder) for op in progress(a.op or list(CLIENTS), "ops")])
    say("")
    for r in recorder.rows:
        times = "-" if r["ms"] is None else f"{r['ms']:.4g} ms, theirs {r['peer_ms']:.4g} ms, {r['ratio']:.3g}x"
        say(f"  {r['op']:<24}{r['shape']:<22}{r['mode']:<8}{times}  {r['note']}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
