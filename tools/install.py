"""Make a virtual environment and install this project into it, for the Makefile. Needs only the standard library.

The environment gets one of these builds of PyTorch:

- if the Python that runs this has a PyTorch that sees a GPU, the environment uses that one;
- if there is a GPU but no such PyTorch, pip chooses;
- if there is no GPU, the CPU build at the version in constraints.txt; if pip finds none, pip chooses.
"""

from __future__ import annotations  # so that an older Python gets as far as the message about its version

import argparse
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
SEES_GPU = "import torch; assert torch.cuda.is_available()"
QUIET = 15.0  # after so many seconds without a line, one says that pip is still running


def succeeds(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def maker(folder: Path) -> Path:
    """The file of an environment that says which Python made it."""
    return folder / "made-by.txt"


def this_python() -> str:
    return f"{sys.executable}\n{sys.version}\n"


def made_by(folder: Path) -> str:
    """Whether this Python made the environment ("this"), another one did ("another"), or there is none yet ("none")."""
    if not folder.exists():
        return "none"
    file = maker(folder)
    return "this" if file.exists() and file.read_text() == this_python() else "another"


def make_environment(folder: Path, share: bool, by_this: bool = False) -> str:
    """The environment's Python. The environment is made if there is none or, with `by_this`, if another Python made it.

    With `share` the environment sees the packages of this Python.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    is_good = python.exists() and succeeds(str(python), "-m", "pip", "--version")
    if not is_good or (by_this and made_by(folder) == "another"):
        flags = ["--system-site-packages"] if share else []
        if subprocess.run([sys.executable, "-m", "venv", "--clear", *flags, str(folder)], check=False).returncode:
            sys.exit(f"{sys.executable} -m venv failed; Debian and Ubuntu need: apt-get install python3-venv")
        maker(folder).write_text(this_python())
    if share and sys.prefix != sys.base_prefix:
        # this Python belongs to an environment, whose packages a new environment does not see by itself
        site = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                              capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
        (Path(site) / "parent_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


def constraints(**versions: str | None) -> tuple[str, str]:
    """The text of constraints.txt, with the given versions of packages in place of its own, and its PyTorch version."""
    text = (ROOT / "constraints.txt").read_text()
    for package, version in versions.items():
        if version:
            text = re.sub(rf"^{package}==.*$", f"{package}=={version}", text, flags=re.MULTILINE)
    found = re.search(r"^torch==(\S+)$", text, flags=re.MULTILINE)
    if found is None:
        sys.exit("constraints.txt names no torch==VERSION")
    return text, found[1]


FILE = re.compile(
    r"(Downloading|Using cached|Processing) (?:\S*/)?([^/\s]+?-[^-/\s]+)(?:-\S+)?\.(?:whl|tar\.gz|zip)( \(.*\))?$"
)


def news(line: str) -> str | None:
    """The line to print about a line of pip's output, or None."""
    line = line.strip()
    if found := FILE.match(line):
        how = "" if found[1] == "Downloading" else ", which is here already"
        return f"  {unquote(found[2])}{found[3] or ''}{how}"
    if line.startswith("Installing collected packages: "):
        return f"  unpacking {line.count(',') + 1} packages"
    return None


def pip_install(python: str, *arguments: str) -> list[str]:
    """Run `pip install` and print a line for each package, or one that says that pip is still running.

    Returns pip's whole output. Raises CalledProcessError if pip fails.
    """
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    lines: queue.Queue[str] = queue.Queue()
    said: list[str] = []
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        while not said or said[-1]:
            try:
                said.append(lines.get(timeout=QUIET))
            except queue.Empty:
                print(f"  still at it after {time.perf_counter() - start:.0f} s", flush=True)
                continue
            if text := news(said[-1]):
                print(text, flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(said))
    return said


def install(python: str, extras: str, free: bool, **versions: str | None) -> None:
    """pip install the project with `extras`; `free`: without constraints, but for the `versions` asked for."""
    project = ["--editable", f"{ROOT}[{extras}]"]
    if free:
        pip_install(python, *project, *(f"{package}=={version}" for package, version in versions.items() if version))
        return
    text, torch = constraints(**versions)
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "constraints.txt"
        pinned.write_text(text)
        if has_cpu_build(python, str(pinned), torch):
            pip_install(python, "--constraint", str(pinned), *project)
            return
    print(
        f"pip found no torch=={torch}+cpu (PyTorch's own index has it): installing what it finds, which may be large",
        flush=True,
    )
    pip_install(python, *project)


def has_cpu_build(python: str, pinned: str, torch: str) -> bool:
    """Install PyTorch's CPU build at the pinned version. Returns whether pip found it."""
    try:
        pip_install(python, "--constraint", pinned, f"torch=={torch}+cpu")
    except subprocess.CalledProcessError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="?", default="", help="extras of pyproject.toml, with commas between")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--triton", help="another version of Triton than the one in constraints.txt")
    parser.add_argument("--transformers", help="another version of transformers than the one in constraints.txt")
    parser.add_argument(
        "--this-python", action="store_true", help="make the environment anew if another Python made it"
    )
    parser.add_argument(
        "--made-by", action="store_true", help="only print who made it: this Python, another, or none yet"
    )
    args = parser.parse_args()
    if args.made_by:
        print(made_by(ROOT / args.venv))
        return 0
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(
            f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 uses another one"
        )
    start = time.perf_counter()
    share = succeeds(sys.executable, "-c", SEES_GPU)
    print(f"installing [{args.extras}] into {args.venv}; the first time this takes a minute or more", flush=True)
    python = make_environment(ROOT / args.venv, share, args.this_python)
    try:
        free = share or shutil.which("nvidia-smi") is not None
        install(python, args.extras, free, triton=args.triton, transformers=args.transformers)
    except subprocess.CalledProcessError as error:
        print(f"{error.output}\npip failed with exit code {error.returncode}", file=sys.stderr)
        return error.returncode
    print(f"installed in {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
