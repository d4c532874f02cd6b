"""The peer's process: `python benchmarks/_peer.py --path FOLDER`.

The peer is another linear-attention library, which our ops are timed beside; FOLDER is where it was installed. Its
package is called `fla` as well. So this file must be run as a file, never with -m: then this folder is on the path, and
the repository with our own `fla` is not. Only functions that the peer publishes are called. The request says which
function and with which arguments, as `benchmarks/families` declares.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _timing as timing
import torch
from _worker import serve
from torch import Tensor

MODES = ("fwd", "fwdbwd")


def meet(path: Path) -> dict[str, Any]:
    """Name and version of the installed peer, and whether its guard against this version of Triton was lifted."""
    import fla

    if path not in Path(fla.__file__ or "").resolve().parents:
        raise RuntimeError(f"`fla` was imported from {fla.__file__}, not from the peer's folder")
    found: dict[str, str] = {d.name: d.version for d in importlib.metadata.distributions(path=[str(path)]) if d.name}
    known = [name for name in ("flash-linear-attention", "fla-core") if name in found] + sorted(found)
    name, version = (known[0], found[known[0]]) if known else ("fla", getattr(fla, "__version__", "unknown"))
    # The peer hands its work to these packages if they are installed: a row must name them.
    used = "".join(f" with {x}" for x in ("tilelang", "flash_qla", "flash_kda") if importlib.util.find_spec(x))
    return {"status": "ok", "peer": f"{name} {version}{used}", "guard_lifted": _lift_guard()}


def _lift_guard() -> bool:
    """Lift the peer's refusal of gated backward passes on some versions of Triton, for timing only.

    Returns whether it refused them.
    """
    try:
        common = importlib.import_module("fla.ops.common.chunk_o")
    except ImportError:
        return False
    if getattr(common, "TRITON_ABOVE_3_7_1", True):
        return False
    vars(common)["TRITON_ABOVE_3_7_1"] = True
    return True


def _function(request: dict[str, Any]) -> Callable[..., Any]:
    module = importlib.import_module(request["module"])
    function = getattr(module, request["function"], None)
    if function is None:
        raise AttributeError(f"the peer has no {request['module']}.{request['function']}")
    names = request["arguments"]
    return lambda **tensors: function(**{names.get(n, n): x for n, x in tensors.items()}, **request["settings"])


def _inputs(request: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    device = request["device"]
    tensors = timing.noise(shapes, getattr(torch, request["dtype"]), device, request["seed"])
    if request.get("replaced"):
        tensors.update(torch.load(request["replaced"], map_location=device))
    return tensors


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Time the peer's function on the inputs of ours, and compare its first tokens with the reference."""
    tensors = _inputs(request, request["shapes"])
    if timing.checksums(tensors) != request["checksums"]:
        raise RuntimeError("the peer's process drew other inputs than ours")
    function, rows, why = _function(request), {}, ""
    for mode in request["modes"]:
        try:
            call = timing.make_call(function, tensors, mode, request["seed"])
            rows[mode] = timing.measure(call, request["device"], timing.Budget(*request["budget"]))
        except Exception as error:
            why = f"{mode} raised {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    reply = {"status": "ok", "rows": rows, "why": why}
    if "fwd" in rows or "fwdbwd" in rows:
        reference = torch.load(request["reference"], map_location=request["device"])
        with torch.no_grad():
            o = timing.first_output(function(**tensors))
        part = timing.beginning(o, list(reference.shape)).double()
        reply["error"] = ((part - reference).norm() / reference.norm()).item()
    _free()
    return reply


def warm(request: dict[str, Any]) -> dict[str, Any]:
    """Run forward and backward once at every set of shapes.

    The peer tunes itself then, and keeps the result on disk.
    """
    function, start = _function(request), time.perf_counter()
    for shapes in sorted(request["all_shapes"], key=lambda x: sum(math.prod(size) for size in x.values())):
        # The gates are negative noise here: tuning depends on sizes, not on values.
        tensors = {name: -x.abs() if name in request["gates"] else x for name, x in _inputs(request, shapes).items()}
        for mode in MODES:
            try:
                timing.make_call(function, tensors, mode, request["seed"])()
            except torch.OutOfMemoryError:
                raise  # another process took the memory: this warm-up must be run again
            except Exception:
                traceback.print_exc()  # a mode that the peer refuses gets its note when it is timed
        if request["device"] == "cuda":
            torch.cuda.synchronize()
        _free()
    return {"status": "ok", "seconds": time.perf_counter() - start}


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", type=Path, required=True)
    met: dict[str, Any] = {}
    folder = parser.parse_args().path.resolve()
    serve({"info": lambda request: met, "run": run, "warm": warm}, setup=lambda: met.update(meet(folder)))
