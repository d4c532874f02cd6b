"""Run the test suite in several processes, for `make test`, `make test-all` and `make test-gpu`.

    python tools/suite.py               the CPU suite
    python tools/suite.py --ops gla     only its tests of an op, of the op's layers and of their models
    python tools/suite.py --all         with the tests marked `exhaustive`
    python tools/suite.py --gpu         the GPU suite

Triton decides at import whether it compiles or interprets kernels, so the CPU suite is two runs of pytest, the halves.
The second half runs even if the first one fails, and the exit code says whether both passed. A table at the end says
how many seconds the tests of every op, layer and model took.

No plugin of pytest is loaded but pytest-xdist: warnings are errors here, and some plugins warn. Arguments that are not
listed below go to pytest, so `-p NAME` loads another plugin.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = "tests/triton_interpreter"
NOTHING_COLLECTED = 5  # pytest's exit code
CPU_JOBS, GPU_JOBS = 8, 14  # most processes: each takes about a gigabyte, and on a GPU half a gigabyte more there
TABLE = (("op", "op"), ("layer", "layer"), ("model", "model"), ("family", "kernels of"), ("rest", "the rest"))
SMALL = 2.0  # seconds; rows of the rest that took less are added up in one row


@dataclass
class Half:
    """One run of pytest."""

    name: str
    arguments: list[str]
    environment: dict[str, str]


def cores() -> int:
    """The number of cores that this process may use, by its affinity and by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no such file, or no quota
        pass
    return count


def has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def in_processes(jobs: int) -> list[str]:
    """pytest's arguments for `jobs` processes."""
    if jobs < 2:
        return []
    if not has_xdist():
        print("pytest-xdist is not installed: the tests run one after the other", flush=True)
        return []
    return ["-p", "xdist.plugin", "-n", str(jobs), "--dist", "worksteal"]


def with_gpu_tests() -> list[str]:
    """The folder of the GPU suite, and the other test files that have tests for a GPU."""
    marker = "pytest.mark." + "gpu"
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if marker in path.read_text(encoding="utf-8")]
    folder = Path("tests/gpu")
    return [str(folder), *(str(f) for f in (path.relative_to(ROOT) for path in files) if folder not in f.parents)]


def halves(gpu: bool, everything: bool) -> list[Half]:
    """The runs of pytest that make up a suite."""
    some = "" if everything else " and not exhaustive"
    if gpu:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # fla may not be installed
        return [Half("GPU suite", ["-m", f"gpu{some}", *with_gpu_tests()], {"PYTHONPATH": path})]
    compiled = ["-m", f"not gpu{some}", f"--ignore={INTERPRETED}", "tests"]
    interpreted = ["-m", f"not gpu{some}", INTERPRETED]
    return [
        Half("suite with Triton compiling", compiled, {}),
        Half("suite with Triton interpreting", interpreted, {"TRITON_INTERPRET": "1"}),
    ]


def command(half: Half, jobs: int, ops: str, times: Path, rest: list[str]) -> list[str]:
    """The command line of a half."""
    chosen = [f"--ops={ops}"] if ops else []
    return [sys.executable, "-m", "pytest", *in_processes(jobs), f"--times={times}", *chosen, *rest, *half.arguments]


def environment(half: Half) -> dict[str, str]:
    """The environment variables of a half: those of this process, without another half's, and its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | half.environment


def joined(files: list[Path]) -> dict[tuple[str, str], tuple[float, float]]:
    """(kind, name) -> seconds and number of tests, added up over the files of the halves."""
    found: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for file in files:
        for kind, name, seconds, tests in json.loads(file.read_text()) if file.exists() else []:
            before = found[kind, name]
            found[kind, name] = (before[0] + seconds, before[1] + tests)
    return dict(found)


def table(found: dict[tuple[str, str], tuple[float, float]]) -> str:
    """Seconds and tests of every op, layer and model and of the rest, the longest first, and the sum of all."""
    lines = []
    for kind, title in TABLE:
        rows = sorted(
            ((seconds, tests, name) for (k, name), (seconds, tests) in found.items() if k == kind), reverse=True
        )
        small = [row for row in rows if row[0] < SMALL] if kind == "rest" else []
        if len(small) > 1:
            rows = [row for row in rows if row not in small]
            rows.append((sum(row[0] for row in small), sum(row[1] for row in small), f"{len(small)} others"))
        lines += [f"{title:<12}{name:<40}{seconds:9.1f} s{tests:8.0f} tests" for seconds, tests, name in rows]
    seconds, tests = (sum(column) for column in zip((0.0, 0.0), *found.values(), strict=True))
    return "\n".join([*lines, f"{'all':<52}{seconds:9.1f} s{tests:8.0f} tests"])


def check_ops(ops: str) -> str | None:
    """The error in `ops`, names of ops with commas between; None if there is none."""
    sys.path.insert(0, str(ROOT))
    from tests.touching import unknown_ops

    return unknown_ops(filter(None, ops.split(",")))


def check_gpu() -> str | None:
    """The reason why the GPU suite cannot run, or None."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    seen = subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    return None if seen else f"{sys.executable} has no PyTorch that sees a GPU; make test runs everything else"


def run(given: list[Half], jobs: int, ops: str, rest: list[str]) -> int:
    """Run the halves one after the other and print the table. Returns 0 if all passed, else 1."""
    failed, empty, start = [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(len(given))]
        for half, file in zip(given, files, strict=True):
            print(f"{half.name}:", flush=True)
            code = subprocess.run(command(half, jobs, ops, file, rest), cwd=ROOT, env=environment(half)).returncode
            if code == NOTHING_COLLECTED and (ops or rest):
                empty += 1
            elif code:
                failed.append(half.name)
        print(f"\nseconds that tests took, added up over {jobs} processes, and number of tests\n{table(joined(files))}")
    if empty == len(given):
        failed.append("no test was chosen")
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'passed'}, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gpu", action="store_true", help="run the GPU suite in place of the CPU suite")
    parser.add_argument("--all", action="store_true", help="run the tests marked `exhaustive` too")
    parser.add_argument(
        "--ops", default="", help="run only the tests of these ops, their layers and models (names with commas between)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="number of processes (default: one a core, at most 8; with --gpu two fewer than cores, at most 14)",
    )
    args, rest = parser.parse_known_args(argv)
    ops = args.ops.replace(" ", "")
    if wrong := (ops and check_ops(ops)) or (args.gpu and check_gpu()):
        print(wrong, file=sys.stderr)
        return 2
    jobs = args.jobs or (min(GPU_JOBS, max(1, cores() - 2)) if args.gpu else min(CPU_JOBS, cores()))
    try:
        return run(halves(args.gpu, args.all), jobs, ops, rest)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
