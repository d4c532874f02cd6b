"""What the benchmarks beside `benchmarks.ops` share. They run in one process, and write the same records as it does."""

import argparse
import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import _records as records
from benchmarks._ours import info
from benchmarks._progress import say
from benchmarks._run import git_commit
from benchmarks._targets import SOFTMAX
from fla.backends import BACKENDS
from fla.ops._spec import REGISTRY

RESULTS = Path(__file__).parent / "results"
DTYPES = ("bfloat16", "float16", "float32")


class Recorder:
    """Prints records, and appends them to the file of this machine in the folder `out` (None: only prints them)."""

    def __init__(self, device: str, out: Path | None, commit: str | None = None) -> None:
        self.info = info({"device": device})
        self.path = None if out is None else out / f"{records.slug(self.info['gpu'])}.jsonl"
        self.commit = commit or git_commit()
        self.rows: list[dict[str, Any]] = []

    def add(self, **fields: Any) -> dict[str, Any]:
        """Make a record of `fields`, the date and the machine; append and print it."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        stamp = {name: self.info[name] for name in ("gpu", "torch", "triton")}
        made = records.record(date=now, commit=self.commit, **stamp, **fields)
        if self.path is not None:
            records.append(self.path, made)
        self.rows.append(made)
        say(records.line(made))
        return made


def op_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of a benchmark of ops."""
    p.add_argument("--op", nargs="+", help=f"among {', '.join(REGISTRY)}; default all that have the form")
    p.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on a GPU, float32 otherwise")
    p.add_argument("--backend", choices=BACKENDS, help="default: Triton for GPU tensors, PyTorch otherwise")
    common_arguments(p)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the records; default benchmarks/results")


def common_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of every benchmark."""
    p.add_argument("--device", choices=("cuda", "cpu"), help="default cuda if there is a GPU")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--commit", help="commit that the records name; default git's, or unknown")


def settle(a: argparse.Namespace) -> None:
    """Fill in device and dtype where none is given. Raises ValueError for `cuda` without a GPU."""
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU")
    a.dtype = a.dtype or ("bfloat16" if a.device == "cuda" else "float32")


def with_form(names: list[str] | None, form: str) -> list[str]:
    """The ops to time: those named, or all that have the form. Raises ValueError for any other."""
    known = [name for name, spec in REGISTRY.items() if form in spec.forms and name not in SOFTMAX]
    wrong = [name for name in names or [] if name not in known]
    if wrong:
        raise ValueError(f"--op must be among {', '.join(known)} (they have the form {form}), got {', '.join(wrong)}")
    return names or known


def why_not(error: Exception) -> tuple[str, bool]:
    """The note of a row that raised `error`, and whether that is a failure.

    A ValueError or a NotImplementedError is no failure: it says what an op declares not to do.
    """
    failed = not isinstance(error, (ValueError, NotImplementedError))
    text = " ".join(str(error).split())[:200]
    return (f"FAILED: {type(error).__name__}: {text}" if failed else f"not run: {text}"), failed
