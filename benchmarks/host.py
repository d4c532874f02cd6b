"""Host overhead: `python -m benchmarks.host` times what a call of an op costs the host, in a loop on tiny inputs.

Mode `host_fwd` is a forward without autograd; `host_fwdbwd` is a forward and the gradients of every input.

On a GPU the wall time of a call counts, and the results of every op are checked first. On a CPU, where even a tiny
input takes longer to compute than its call, the backend computes nothing and processor time counts; `--no-idle` or
`--backend` have it compute, and count wall time. The time of `import fla` comes last.

`--against CHECKOUT` also times the library of another checkout. Each of the two has a process of its own, they take
turns round by round, and the quietest round of each counts.

Rows are printed in us and recorded in ms. Exit code 1: a row failed.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import _local
from benchmarks._host_side import HANDLERS
from benchmarks._local import Recorder
from benchmarks._progress import progress, say
from benchmarks._run import git_commit
from benchmarks._shapes import parse, show
from benchmarks._targets import find
from benchmarks._worker import ROOT, Worker
from fla.ops._spec import REGISTRY

MODES = ("fwd", "fwdbwd")
SHAPE = "B1 T64 H1 D64"
ROUNDS = 15
IMPORTS = 3  # fresh processes for the time of `import fla`
PATIENCE = 300.0  # seconds for one answer of a checkout's process
IMPORT = """
import time, torch
start = time.process_time()
import fla
middle = time.process_time()
import fla.ops
print(middle - start, time.process_time() - start)
"""
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def sides(against: Path | None) -> Iterator[dict[str, Ask]]:
    """Name of a side -> the function that answers its requests: in this process, or in a process for each checkout."""
    if against is None:
        try:
            yield {"now": lambda request: HANDLERS[request["do"]](request)}
        finally:
            HANDLERS["release"]({})
        return
    script = str(Path(__file__).with_name("_checkout.py"))
    with contextlib.ExitStack() as stack:
        asked: dict[str, Ask] = {}
        for name, folder in (("before", against), ("now", ROOT)):
            worker = Worker([sys.executable, script, str(folder)], str(folder))
            stack.callback(worker.close)
            asked[name] = lambda request, worker=worker: worker.ask(request, PATIENCE)  # type: ignore[misc]
        yield asked


def time_op(op: str, asked: dict[str, Ask], a: argparse.Namespace, recorder: Recorder) -> tuple[dict[str, Any], bool]:
    """Time one op on every side.

    Returns mode -> side -> microseconds of the quietest round, and whether the op failed.
    """
    target = find(op, a.form)
    dims = target.fit(parse(a.shape))
    common = {"op": target.name, "shape": show(dims), "dtype": a.dtype}
    request = {"op": op, "form": a.form, "backend": a.backend, "dims": dims, "device": a.device, "dtype": a.dtype}
    request |= {"seed": a.seed, "modes": a.mode, "idle": a.idle}
    ready = {name: ask(request | {"do": "prepare"}) for name, ask in asked.items()}
    here = ready["now"]
    if here["status"] != "ok":
        recorder.add(**common, mode=f"host_{a.mode[0]}", note=here["why"])
        return {}, here["status"] == "failed"
    for name, state in ready.items():
        if state["status"] != "ok":
            say(f"{target.name}: {name} is not timed: {state['why']}")
    times: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in asked} for mode in a.mode}
    for number in range(ROUNDS):
        for mode in a.mode:
            for name in list(asked) if number % 2 else reversed(asked):  # neither side is always first
                if ready[name]["status"] == "ok":
                    more = {"do": "round", "mode": mode, "seconds": a.seconds / ROUNDS}
                    times[mode][name].append(asked[name](request | more)["us"])
    found = {mode: {name: min(us) for name, us in of_mode.items() if us} for mode, of_mode in times.items()}
    for mode, least in found.items():
        settings = "".join(f"; {name}={value}" for name, value in here["settings"].items())
        where = "" if a.device == "cuda" else f"; {recorder.info['machine']}"
        before = f"; {least['before']:.1f} us at {a.before}" if "before" in least else ""
        clock = "processor" if a.idle else "wall"
        note = f"{here['backend']} backend; {clock} time per call in a loop{settings}{where}{before}"
        recorder.add(**common, mode=f"host_{mode}", ms=least["now"] / 1e3, note=note)
    return found, False


def table(found: dict[str, dict[str, Any]], modes: list[str], names: list[str]) -> str:
    """Microseconds per call: a line for each op, and for each mode a column for each side and one for their ratio."""
    columns = [(mode, name) for mode in modes for name in (*names, *(["now/before"] if len(names) > 1 else []))]
    lines = [" " * 32 + "".join(f"{f'{mode} {name}' if len(names) > 1 else mode:>20}" for mode, name in columns)]
    for op, of_op in found.items():
        cells = []
        for mode, name in columns:
            us = of_op.get(mode, {})
            if name in names:
                cells.append(f"{us[name]:.1f}" if name in us else "-")
            else:
                cells.append(f"{us['now'] / us['before']:.2f}" if len(us) > 1 else "-")
        lines.append(f"  {op:<30}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def import_times(folders: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """Side -> milliseconds of processor time of `import fla`, and of `import fla.ops` from its start.

    torch is imported before, and the least of several measurements counts.
    """
    spent: dict[str, list[list[float]]] = {name: [] for name in folders}
    for _ in range(IMPORTS):
        for name, folder in folders.items():
            done = subprocess.run(
                [sys.executable, "-c", IMPORT], cwd=folder, capture_output=True, text=True, check=True
            )
            spent[name].append([float(x) * 1e3 for x in done.stdout.split()])
    return {name: (min(x[0] for x in runs), min(x[1] for x in runs)) for name, runs in spent.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.host", description="Host overhead of the ops.")
    _local.op_arguments(p)
    p.add_argument("--form", default="chunk", help="form of the ops; default chunk")
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--shape", default=SHAPE, help=f"default {SHAPE!r}")
    p.add_argument("--seconds", type=float, default=0.5, help="about how long a row is timed; default 0.5")
    p.add_argument(
        "--idle",
        action=argparse.BooleanOptionalAction,
        help="use a backend that computes nothing; default on a CPU unless --backend is given",
    )
    p.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="time the library of this folder too, in turn with this one"
    )
    p.add_argument("--imports", action=argparse.BooleanOptionalAction, default=True, help="time `import fla` too")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = parser()
    a = p.parse_args(arguments)
    try:
        _local.settle(a)
        ops = _local.with_form(a.op, a.form)
        for op in ops:
            find(op, a.form).fit(parse(a.shape))
        if a.idle and (a.device, a.backend) not in (("cpu", None), ("cpu", "torch")):
            raise ValueError("--idle needs --device cpu: it stands in for the torch backend")
        if a.against is not None and not (a.against / "fla").is_dir():
            raise ValueError(f"--against must be a checkout, a folder that holds the package fla, got {a.against}")
    except ValueError as error:
        p.error(str(error))
    a.idle = a.device == "cpu" and a.backend is None if a.idle is None else a.idle
    a.against = None if a.against is None else a.against.resolve()
    a.before = None if a.against is None else git_commit(a.against)
    recorder = Recorder(a.device, a.out, a.commit)
    found: dict[str, dict[str, Any]] = {}
    failures = 0
    with sides(a.against) as asked:
        for op in progress(ops, "ops"):
            found[REGISTRY[op].forms[a.form].__name__], failed = time_op(op, asked, a, recorder)
            failures += failed
        names = list(asked)
    turns = f"; before is {a.before}, now {recorder.commit}, timed in turn" if a.against is not None else ""
    say(f"\nus per call{' on a backend that computes nothing' if a.idle else ''}, quietest of {ROUNDS} rounds{turns}")
    say(table(found, a.mode, names))
    if a.imports:
        folders = {"before": a.against, "now": ROOT}
        for name, times in import_times({x: folder for x, folder in folders.items() if folder is not None}).items():
            say(
                f"  import fla, {name}: {times[0]:.0f} ms of processor time after torch, {times[1]:.0f} ms with fla.ops"
            )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
