"""The process that checks our ops and times them: `python -m benchmarks._ours`.

A row is timed only after it was found right. The naive recurrence computes the first tokens of the row's own inputs in
float64; output and gradients of the timed function on these tokens must be within the error budget of `fla.testing`.
Then the output of the whole inputs must begin with the same values, and it and all gradients must be finite.
"""

import platform
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _timing as timing
from benchmarks._plan import work
from benchmarks._shapes import sizes
from benchmarks._targets import Target, find, first_tokens
from benchmarks._worker import one_line, serve
from fla.backends import family, resolve
from fla.testing import assert_within_budget


def info(request: dict[str, Any]) -> dict[str, Any]:
    """The machine, the versions, and the copy bandwidth from which memory floors are computed."""
    device = request["device"]
    try:
        import triton
    except ImportError:
        version = None
    else:
        version = triton.__version__
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "status": "ok",
        "gpu": gpu,
        "machine": gpu if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": version,
        "bandwidth": timing.copy_bandwidth(device),
    }


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Check and time one op at one shape. The status is `ok`, `unsupported` (a declared limit) or `failed`."""
    target = find(request["op"], request["form"], request["backend"])
    reply: dict[str, Any] = {"status": "ok", "why": "", "name": target.name, "settings": target.settings, "rows": {}}
    try:
        _run(target, request, reply)
    except AssertionError as error:
        reply |= {"status": "failed", "why": f"wrong result: {error}", "rows": {}}
    except (ValueError, NotImplementedError) as error:
        reply |= {"status": "unsupported", "why": " ".join(str(error).split())[:200]}
    except Exception as error:
        traceback.print_exc()
        status = "failed" if target.family else "unsupported"
        reply |= {"status": status, "why": one_line(error), "fatal": True}
    if request["device"] == "cuda":
        torch.cuda.empty_cache()  # the peer is next, and needs the memory
    return reply


def _run(target: Target, request: dict[str, Any], reply: dict[str, Any]) -> None:
    """Fill the reply step by step: what the first steps wrote stays if a later one raises."""
    clock = _Clock(request["device"], reply.setdefault("seconds", {}))
    shapes = sizes(target.shapes, request["dims"])
    tensors, replaced = _inputs(target, shapes, getattr(torch, request["dtype"]), request)
    backend = _backend(target, tensors, request["backend"])
    reply |= {"shapes": shapes, "backend": backend or "torch"}
    clock.lap("inputs")
    reference: dict[str, Tensor] = {}
    if target.checked or request["peer"]:
        reference = _reference(target, tensors, request)
    if request["peer"]:
        reply |= _handed_to_peer(tensors, replaced, reference["o"], Path(request["scratch"]))
    clock.lap("reference")
    output = _check(target, tensors, reference, backend, request) if target.checked else None
    clock.lap("check")
    for mode in request["modes"]:
        call = timing.make_call(target.call, tensors, mode, request["seed"])
        row = timing.measure(call, request["device"], timing.Budget(*request["budget"]))
        if target.linear and output is not None:
            row["floor_s"] = timing.floor_bytes(tensors, output, mode) / request["bandwidth"]
        reply["rows"][mode] = row
        clock.lap(mode)


class _Clock:
    """Writes into `laps` how many seconds each step of a row took."""

    def __init__(self, device: str, laps: dict[str, float]) -> None:
        self.device, self.laps, self.last = device, laps, time.perf_counter()

    def lap(self, name: str) -> None:
        _wait(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def checked(request: dict[str, Any]) -> tuple[Target, dict[str, Tensor], str]:
    """A target, inputs on which its results were found right, and its backend.

    Raises AssertionError for a wrong result.
    """
    target, tensors = prepared(request)
    backend = _backend(target, tensors, request["backend"])
    _check(target, tensors, _reference(target, tensors, request), backend, request)
    return target, tensors, backend or "torch"


def prepared(request: dict[str, Any]) -> tuple[Target, dict[str, Tensor]]:
    """A target, and legal inputs for it at the shape of the request."""
    target = find(request["op"], request["form"], request["backend"])
    return target, _inputs(target, sizes(target.shapes, request["dims"]), getattr(torch, request["dtype"]), request)[0]


def _inputs(target: Target, shapes: dict[str, list[int]], dtype: torch.dtype, request: dict[str, Any]):
    """Legal inputs, and those among them that are not the seeded noise itself (the gates)."""
    noise = timing.noise(shapes, dtype, request["device"], request["seed"])
    legal = target.inputs(dict(noise))
    tensors = {name: legal[name].to(dtype).contiguous() for name in shapes}
    return tensors, {name: x for name, x in tensors.items() if x is not noise[name]}


def _backend(target: Target, tensors: dict[str, Tensor], backend: str | None) -> str | None:
    if target.family is None:
        return None
    try:
        return resolve(target.family, next(iter(tensors.values())), backend)
    except ValueError:
        return backend  # the call will raise the same error, with its reason


def _reference(target: Target, tensors: dict[str, Tensor], request: dict[str, Any]) -> dict[str, Tensor]:
    """The output of the first tokens by the naive recurrence in float64, and if a backward is timed, their
    gradients."""
    first = first_tokens(target.shapes, tensors)
    with_gradients = target.checked and "fwdbwd" in request["modes"]
    return _results(target.reference, first, torch.float64, with_gradients, request["seed"])


def _handed_to_peer(tensors: dict[str, Tensor], replaced: dict[str, Tensor], reference: Tensor, scratch: Path):
    """What the peer's process needs so that it has the same inputs and can compare its output with the reference."""
    torch.save(replaced, scratch / "replaced.pt")
    torch.save(reference, scratch / "reference.pt")
    return {
        "replaced": str(scratch / "replaced.pt") if replaced else None,
        "reference": str(scratch / "reference.pt"),
        "checksums": timing.checksums(tensors),
    }


def _check(
    target: Target,
    tensors: dict[str, Tensor],
    reference: dict[str, Tensor],
    backend: str | None,
    request: dict[str, Any],
) -> Tensor:
    """Return the output of the whole inputs. Raises AssertionError if any result of the row is wrong."""
    first = first_tokens(target.shapes, tensors)
    with_gradients = "fwdbwd" in request["modes"]
    dtype = next(iter(first.values())).dtype
    wide = torch.promote_types(dtype, torch.float32)
    naive = _results(target.reference, first, wide, with_gradients, request["seed"])
    actual = _results(target.call, first, dtype, with_gradients, request["seed"])
    for name, value in actual.items():
        gate = name.removeprefix("d") in target.gates
        assert_within_budget(name, value, reference[name], naive[name].to(dtype), backend=backend or "torch", gate=gate)
    with torch.no_grad():
        output = timing.first_output(target.call(**tensors))
    start = timing.beginning(output, list(reference["o"].shape))
    assert_within_budget("o at full size", start, reference["o"], naive["o"].to(dtype), backend=backend or "torch")
    _assert_finite("o at full size", output)
    if with_gradients:
        gradients = timing.make_call(target.call, tensors, "fwdbwd", request["seed"])()
        for name, gradient in zip(tensors, gradients, strict=True):
            _assert_finite(f"d{name} at full size", gradient)
    return output


def _results(function, tensors: dict[str, Tensor], dtype: torch.dtype, with_gradients: bool, seed: int):
    """`o`, computed in `dtype`; `with_gradients` also the gradient of every tensor, for an incoming gradient from the
    seed."""
    leaves = {name: x.to(dtype).detach().clone().requires_grad_(with_gradients) for name, x in tensors.items()}
    o = timing.first_output(function(**leaves))
    results = {"o": o.detach()}
    if with_gradients:
        given = next(iter(tensors.values())).dtype  # the same values in every precision
        do = timing.noise({"do": list(o.shape)}, given, o.device.type, seed)["do"].to(o.dtype)
        gradients = torch.autograd.grad(o, tuple(leaves.values()), do)
        results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return results


def _assert_finite(name: str, x: Tensor | None) -> None:
    if x is None:
        raise AssertionError(f"{name} is missing")
    if not torch.isfinite(x).all():
        raise AssertionError(f"{name} has NaN or infinite values")


def warm(request: dict[str, Any]) -> dict[str, Any]:
    """Run every mode once at every set of sizes, the smallest first, so that all kernels are compiled."""
    start = time.perf_counter()
    for dims in sorted(request["all_dims"], key=work):
        target, tensors = prepared(request | {"dims": dims})
        for mode in request["modes"]:
            timing.make_call(target.call, tensors, mode, request["seed"])()
        _wait(request["device"])
        del tensors
        if request["device"] == "cuda":
            torch.cuda.empty_cache()
    return {"status": "ok", "seconds": time.perf_counter() - start}


def first_call(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first forward and backward in this process. Imports, inputs and the CUDA context do not count."""
    target, tensors = prepared(request)
    backend = _backend(target, tensors, request["backend"])
    if target.family and backend:
        family(target.family, backend)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    _wait(request["device"])
    start = time.perf_counter()
    try:
        o = timing.first_output(target.call(**leaves))
        o.backward(torch.ones_like(o))
    except (ValueError, NotImplementedError) as error:
        return {"status": "unsupported", "why": " ".join(str(error).split())[:200]}
    _wait(request["device"])
    return {"status": "ok", "seconds": time.perf_counter() - start}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    serve({"info": info, "run": run, "warm": warm, "first_call": first_call})
