"""The installer's decisions that can be checked without installing, and what CI runs."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constraints_name_the_versions_and_another_triton_on_request(installer):
    text, torch = installer.constraints(None)
    assert text == (ROOT / "constraints.txt").read_text()
    assert f"torch=={torch}\n" in text
    other, _ = installer.constraints("3.9.0")
    assert "triton==3.9.0\n" in other
    changed = set(text.splitlines()) ^ set(other.splitlines())
    assert len(changed) == 2 and all(line.startswith("triton==") for line in changed)


@pytest.mark.parametrize(
    ("cpu_build", "gpu", "calls"),
    [(True, False, ["torch", "pinned"]), (False, False, ["torch", "free"]), (True, True, ["free"])],
    ids=["CPU build", "no CPU build on the index", "GPU"],
)
def test_which_pytorch_is_installed(installer, monkeypatch, cpu_build, gpu, calls):
    made = []

    def run(command, **keywords):
        made.append("pinned" if "--constraint" in command else "free")
        assert "--editable" in command and command[-1].endswith("[demo]")

    def succeeds(*command):
        assert command[-1].startswith("torch==") and command[-1].endswith("+cpu")
        made.append("torch")
        return cpu_build

    monkeypatch.setattr(installer.subprocess, "run", run)
    monkeypatch.setattr(installer, "succeeds", succeeds)
    installer.install("python", "demo", gpu, None)
    assert made == calls


def test_an_environment_is_made_once(installer, tmp_path):
    python = installer.make_environment(tmp_path / "venv", share=False)
    assert installer.succeeds(python, "-c", "import pip")
    assert not installer.succeeds(python, "-c", "import torch")
    (tmp_path / "venv" / "kept").touch()
    assert installer.make_environment(tmp_path / "venv", share=False) == python
    assert (tmp_path / "venv" / "kept").exists()


def test_a_shared_environment_sees_the_packages_of_this_python(installer, tmp_path):
    python = installer.make_environment(tmp_path / "venv", share=True)
    finds = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    assert installer.succeeds(python, "-c", finds)


def test_ci_runs_the_two_commands_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test"]
    assert lines[1] == "set -euo pipefail"


def test_make_test_runs_both_processes():
    listed = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line for line in listed.splitlines() if "pytest" in line]
    assert any("TRITON_INTERPRET=1" in c and "tests/triton_interpreter" in c for c in commands)
    assert any("-u TRITON_INTERPRET" in c and "--ignore=tests/triton_interpreter" in c for c in commands)
