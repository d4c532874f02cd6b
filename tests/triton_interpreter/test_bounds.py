"""No kernel touches memory outside of its tensors: `guarded.py` in a process of its own, which a stray access ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def guarded(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.triton_interpreter.guarded", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words, count",
    (((), 8), pytest.param(("everything",), 30, marks=pytest.mark.exhaustive)),
    ids=("some", "everything"),
)
def test_joined_packs_stay_inside(words, count):
    done = guarded(*words)
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr[-1000:]}"
    assert len(done.stdout.splitlines()) > count


def test_a_stray_access_ends_the_process():
    assert guarded("stray").returncode == -signal.SIGSEGV
