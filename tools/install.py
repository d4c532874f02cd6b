"""Make a virtual environment and install this project into it: what the Makefile runs, with the standard library only.

Which PyTorch goes in:

- where `python3` has one that sees a GPU, that one is used;
- where there is a GPU but no such PyTorch, pip resolves freely;
- where there is no GPU, the CPU build at the versions of constraints.txt; where pip finds none, it resolves freely.
"""

from __future__ import annotations  # so that an older Python gets as far as being told so

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEES_GPU = "import torch; assert torch.cuda.is_available()"


def succeeds(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def make_environment(folder: Path, share: bool) -> str:
    """The environment's Python; it is made if it is not there. With `share` it sees the packages of this Python."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (python.exists() and succeeds(str(python), "-m", "pip", "--version")):
        flags = ["--system-site-packages"] if share else []
        if subprocess.run([sys.executable, "-m", "venv", "--clear", *flags, str(folder)], check=False).returncode:
            sys.exit(f"{sys.executable} -m venv failed: on Debian and Ubuntu, apt-get install python3-venv")
    if (
        share and sys.prefix != sys.base_prefix
    ):  # from inside another environment, a new one sees only what lies below both
        site = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                              capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
        (Path(site) / "parent_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


def constraints(triton: str | None) -> tuple[str, str]:
    """The text of constraints.txt, with another Triton if one is named, and the version of PyTorch in it."""
    text = (ROOT / "constraints.txt").read_text()
    if triton:
        text = re.sub(r"^triton==.*$", f"triton=={triton}", text, flags=re.MULTILINE)
    found = re.search(r"^torch==(\S+)$", text, flags=re.MULTILINE)
    if found is None:
        sys.exit("constraints.txt names no torch==VERSION")
    return text, found[1]


def install(python: str, extras: str, free: bool, triton: str | None) -> None:
    """pip install the project with `extras`; `free`: without constraints."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    project = ["--editable", f"{ROOT}[{extras}]"]
    if free:
        subprocess.run([*pip, *project], cwd=ROOT, check=True)
        return
    text, torch = constraints(triton)
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "constraints.txt"
        pinned.write_text(text)
        if succeeds(*pip, "--constraint", str(pinned), f"torch=={torch}+cpu"):
            subprocess.run([*pip, "--constraint", str(pinned), *project], cwd=ROOT, check=True)
            return
    print(
        f"pip found no torch=={torch}+cpu (PyTorch's own index has it): taking what it finds, which may be large",
        flush=True,
    )
    subprocess.run([*pip, *project], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", help="extras of pyproject.toml, with commas between")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--triton", help="another version of Triton than the one in constraints.txt")
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(
            f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 takes another"
        )
    start = time.perf_counter()
    share = succeeds(sys.executable, "-c", SEES_GPU)
    print(f"installing [{args.extras}] into {args.venv}; the first time this takes a minute or more", flush=True)
    python = make_environment(ROOT / args.venv, share)
    try:
        install(python, args.extras, share or shutil.which("nvidia-smi") is not None, args.triton)
    except subprocess.CalledProcessError as error:
        print(f"pip failed with exit code {error.returncode}", file=sys.stderr)
        return error.returncode
    print(f"installed in {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
