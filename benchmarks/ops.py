"""Time the ops: `python -m benchmarks.ops`, one command for CPU and GPU.

Every row (an op at a shape) is checked on its own inputs, then timed. With `--peer FOLDER` another linear-attention
library, the peer, is timed right after it on the same inputs with the same code; FOLDER is where it was installed. Rows
are printed and appended to `<out>/<gpu>.jsonl` as they end, and a table of all comes last.

`--against naive` times the ops and their naive loops and nothing else, and says how many times as fast the ops are.
Two options run no benchmark: `--base BEFORE --against NOW` compares records, and `--report` writes
`docs/benchmarks.md` and its plots from records.

Exit code 1: a row was wrong or broke, no row was timed, or with `--base` an op takes over a tenth longer than in the
records there. Exit code 2: bad arguments.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import _compare, _records, _tuning
from benchmarks._plan import NAIVE_ELEMENTS, Job, jobs
from benchmarks._progress import say
from benchmarks._run import Run
from benchmarks._shapes import SHAPES, expand
from benchmarks._sides import Settings
from benchmarks._targets import SOFTMAX
from fla.backends import BACKENDS
from fla.ops._spec import REGISTRY

DTYPES = ("bfloat16", "float16", "float32", "float64")
MODES = ("fwd", "fwdbwd")
NAIVE = "naive"
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description="Check and time the ops, beside softmax attention and another library, the peer.",
    )
    p.add_argument("--op", nargs="+", help=f"among {', '.join(REGISTRY)}; default all")
    p.add_argument("--form", nargs="+", default=["chunk"], help="forms of an op; default chunk")
    p.add_argument(
        "--shapes",
        nargs="+",
        help=f"sets ({', '.join(SHAPES)}) or shapes like 'B1 T512 H4 D64'; default peer on a GPU, else cpu",
    )
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default bfloat16 on a GPU, float32 otherwise")
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--backend", choices=BACKENDS, help="default: Triton for GPU tensors, PyTorch otherwise")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default cuda if there is a GPU")
    p.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time softmax attention and naive loops too",
    )
    p.add_argument("--peer", type=Path, help="folder in which the peer is installed; it runs in a process of its own")
    p.add_argument(
        "--peer-jobs", type=int, help="processes that compile and tune at once; default one per core, at most 12"
    )
    p.add_argument(
        "--peer-warm-limit", type=float, default=300.0, metavar="SECONDS", help="for compiling and tuning; default 300"
    )
    p.add_argument("--peer-cache", type=Path, metavar="FOLDER_OR_TGZ", help="what an earlier tuning of the peer found")
    p.add_argument("--save-peer-cache", type=Path, metavar="FILE", help="write what the peer's tuning found to a tgz")
    p.add_argument(
        "--first-call",
        action=argparse.BooleanOptionalAction,
        help="time the first call with an empty compile cache; default on a GPU without --quick",
    )
    p.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="stop after so long, with the table"
    )
    p.add_argument("--quick", action="store_true", help="a first look: at most 10 runs and about 0.05 s a row")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--commit", help="commit that the records name; default git's, or unknown")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the records; default benchmarks/results")
    p.add_argument(
        "--base", type=Path, metavar="RESULTS", help="compare with the last records of a .jsonl file or a folder"
    )
    p.add_argument(
        "--against",
        metavar="naive|RESULTS",
        help=f"{NAIVE}: time only the ops and their naive loops. RESULTS: compare records with --base, run nothing",
    )
    p.add_argument("--report", action="store_true", help="write docs/benchmarks.md from the records, and run nothing")
    p.add_argument("--docs", type=Path, default=DOCS, help="folder of the report; default docs")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = parser()
    a = p.parse_args(arguments)
    try:
        if a.against not in (None, NAIVE) and a.base is None:
            raise ValueError(f"--against needs --base, the records to compare with, or is {NAIVE}")
        if (a.peer_cache or a.save_peer_cache) and a.peer is None:
            raise ValueError("--peer-cache and --save-peer-cache need --peer")
        if a.report:
            return _report(a)
        base = _records.read_all(a.base) if a.base is not None else None  # before the run appends to it
        if base is not None and a.against not in (None, NAIVE):
            return _compare.guard(base, _records.read_all(Path(a.against)))
        settings, plan = _prepare(a)
    except ValueError as error:
        p.error(str(error))
    run = Run(settings, plan)
    code = run.run()
    for r, naive in run.beside_naive if a.against == NAIVE else ():
        what = f"{r['op']} {r['shape']} {r['dtype']} {r['mode']}"
        say(f"{what}: {r['ms']:.4g} ms, the naive loop {naive:.4g} ms: {naive / r['ms']:.3g} times as fast")
    guarded = 0 if base is None else _compare.guard(base, run.rows)
    return code or guarded


def _report(a: argparse.Namespace) -> int:
    from benchmarks import _report  # needs matplotlib

    for path in _report.write(_records.read_all(a.out), a.docs, a.commit):
        print(f"wrote {path.name}")
    return 0


def _prepare(a: argparse.Namespace) -> tuple[Settings, list[Job]]:
    """The settings and the jobs of a run. Raises ValueError for arguments that make no run."""
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU")
    if a.peer is not None and not (a.peer / "fla").is_dir():
        raise ValueError(f"--peer must be a folder that holds the package fla, got {a.peer}")
    shapes = expand(a.shapes or ["peer" if gpu else "cpu"])
    ops = _ops(a.op, a.form)
    beside_naive = a.against == NAIVE
    baselines = [name for name in SOFTMAX if (name == "sdpa") != gpu] if a.baselines and not beside_naive else []
    naive_up_to = float("inf") if beside_naive else NAIVE_ELEMENTS if a.baselines and not gpu else 0
    plan = jobs(ops, baselines, shapes, a.dtype or ["bfloat16" if gpu else "float32"], naive_up_to)
    if a.peer_cache is not None:
        written, kept = _tuning.unpack(a.peer_cache, _tuning.triton_cache())
        print(f"peer: {written} tuning results from {a.peer_cache.name}, {kept} more were there already")
    settings = Settings(
        device=device,
        modes=tuple(mode for mode in MODES if mode in a.mode),
        backend=a.backend,
        seed=a.seed,
        budget=(0.05, 10) if a.quick else (0.3, 500),
        quick=a.quick,
        out=a.out,
        commit=a.commit,
        time_limit=a.time_limit,
        first_call=(gpu and not a.quick) if a.first_call is None else a.first_call,
        peer=None if a.peer is None else a.peer.resolve(),
        peer_jobs=a.peer_jobs,
        peer_warm_limit=a.peer_warm_limit,
        peer_tuned=a.peer_cache is not None,
        save_peer_cache=a.save_peer_cache,
    )
    return settings, plan


def _ops(names: list[str] | None, forms: list[str]) -> dict[str, list[str]]:
    """Op -> its forms to time. A form that an op lacks is left out, or a ValueError if the op was named."""
    unknown = [name for name in names or [] if name not in REGISTRY]
    if unknown:
        raise ValueError(f"--op must be among {', '.join(REGISTRY)}, got {', '.join(unknown)}")
    chosen = {}
    for name in names or REGISTRY:
        known = REGISTRY[name].forms
        missing = [form for form in forms if form not in known]
        if missing and names:
            raise ValueError(f"--form of {name} must be among {', '.join(known)}, got {', '.join(missing)}")
        chosen[name] = [form for form in forms if form in known]
    if not any(chosen.values()):
        raise ValueError(f"--form names none of any op's forms, got {', '.join(forms)}")
    return {name: found for name, found in chosen.items() if found}


if __name__ == "__main__":
    sys.exit(main())
