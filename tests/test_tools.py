"""The installer's decisions that can be checked without installing, and what CI runs."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constraints_name_the_versions_and_others_on_request(installer):
    text, torch = installer.constraints(triton=None, transformers=None)
    assert text == (ROOT / "constraints.txt").read_text()
    assert f"torch=={torch}\n" in text
    for package in ("triton", "transformers"):
        other, _ = installer.constraints(**{package: "9.9.0"})
        assert f"{package}==9.9.0\n" in other
        changed = set(text.splitlines()) ^ set(other.splitlines())
        assert len(changed) == 2 and all(line.startswith(f"{package}==") for line in changed)


def make(*arguments):
    """What `make` would run, without running it."""
    done = subprocess.run(["make", "-n", "-B", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_versions_get_an_environment_of_their_own():
    ran = make("test", "TRANSFORMERS=5.24.0")
    assert "--venv .venv-transformers-5.24.0" in ran and "--transformers 5.24.0" in ran
    assert ".venv-transformers-5.24.0/bin/python tools/suite.py" in ran
    assert "--venv .venv-triton-3.9.0-transformers-5.24.0 " in make("test", "TRITON=3.9.0", "TRANSFORMERS=5.24.0")
    assert "--venv .venv " in make("test") and "transformers" not in make("test")


@pytest.mark.parametrize(
    ("cpu_build", "gpu", "calls"),
    [(True, False, ["torch", "pinned"]), (False, False, ["torch", "free"]), (True, True, ["free"])],
    ids=["CPU build", "no CPU build on the index", "GPU"],
)
def test_which_pytorch_is_installed(installer, monkeypatch, cpu_build, gpu, calls):
    made = []

    def pip_install(python, *arguments):
        if arguments[-1].startswith("torch==") and arguments[-1].endswith("+cpu"):
            made.append("torch")
            if not cpu_build:
                raise subprocess.CalledProcessError(1, "pip")
            return
        made.append("pinned" if "--constraint" in arguments else "free")
        assert "--editable" in arguments and arguments[-1].endswith("[demo]")

    monkeypatch.setattr(installer, "pip_install", pip_install)
    installer.install("python", "demo", gpu, triton=None)
    assert made == calls


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Downloading https://x.org/torch-2.9.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (184.1 MB)",
         "  torch-2.9.0+cpu (184.1 MB)"),
        ("Using cached tqdm-4.67.1-py3-none-any.whl (78 kB)\n", "  tqdm-4.67.1 (78 kB), which is here already"),
        ("Installing collected packages: mpmath, tqdm, torch", "  unpacking 3 packages"),
        ("  Downloading https://x.org/torch-2.9.0-cp311-cp311-linux_x86_64.whl.metadata (29 kB)", None),
        ("Collecting torch==2.9.0+cpu", None),
        ("Looking in indexes: https://x.org/simple", None),
    ],
    ids=lambda value: "" if value is None else value.strip()[:20],
)  # fmt: skip
def test_what_is_told_of_pip_s_output(installer, line, told):
    assert installer.news(line) == told


def fake_pip(folder: Path, code: str) -> str:
    """A Python that runs `code` in place of pip."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(0o755)
    return str(file)


def test_an_installation_tells_of_every_package_and_of_its_silence(installer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(installer, "QUIET", 0.01)
    code = (
        "import pathlib, time\n"
        "print('Downloading a-1-py3-none-any.whl (1 kB)', flush=True)\n"
        "while not pathlib.Path('told').exists(): time.sleep(0.01)\n"
        "print('Successfully installed a')"
    )
    said = []

    def tell(text, **_):
        said.append(text)
        if "still at it" in text:
            (tmp_path / "told").touch()

    monkeypatch.setattr(installer, "ROOT", tmp_path)
    monkeypatch.setattr("builtins.print", tell)
    assert installer.pip_install(fake_pip(tmp_path, code))[-2] == "Successfully installed a\n"
    assert "  a-1 (1 kB)" in said and any("still at it after 0 s" in line for line in said)


def test_a_failure_of_pip_is_shown_whole(installer, tmp_path):
    python = fake_pip(tmp_path, "print('ERROR: no space left')\nraise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        installer.pip_install(python)
    assert failed.value.returncode == 3 and "no space left" in failed.value.output


def test_an_environment_is_made_once(installer, tmp_path):
    python = installer.make_environment(tmp_path / "venv", share=False)
    assert installer.succeeds(python, "-c", "import pip")
    assert not installer.succeeds(python, "-c", "import torch")
    (tmp_path / "venv" / "kept").touch()
    assert installer.make_environment(tmp_path / "venv", share=False) == python
    assert (tmp_path / "venv" / "kept").exists()


@pytest.fixture
def without_pip(installer, monkeypatch):
    """Environments are made without pip, which takes most of the time, and pass for whole."""
    run, succeeds = subprocess.run, installer.succeeds
    quick = SimpleNamespace(**vars(subprocess))
    quick.run = lambda command, **keywords: run(
        [*command, "--without-pip"] if "venv" in command else command, **keywords
    )
    monkeypatch.setattr(installer, "subprocess", quick)
    monkeypatch.setattr(installer, "succeeds", lambda *command: command[1:3] == ("-m", "pip") or succeeds(*command))


def test_a_shared_environment_sees_the_packages_of_this_python(installer, without_pip, tmp_path):
    python = installer.make_environment(tmp_path / "venv", share=True)
    finds = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    assert installer.succeeds(python, "-c", finds)


def test_ci_runs_the_two_commands_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test"]
    assert lines[1] == "set -euo pipefail"


@pytest.fixture
def project(tmp_path) -> Path:
    """What make needs of the project, and an environment that this Python made and filled."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".installed", ".installed-demo"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def makes_environment(project: Path, *words: str) -> bool:
    """Whether `make test` begins with the installation."""
    done = subprocess.run(["make", "-n", "test", *words], cwd=project, capture_output=True, text=True, check=True)
    return "tools/install.py" in done.stdout


def test_another_python_makes_the_environment_anew(installer, project):
    """`PYTHON=` makes the environment anew if another Python made it. Without it the environment is kept as it is."""
    this = f"PYTHON={sys.executable}"
    assert not makes_environment(project)
    assert makes_environment(project, this)  # nobody knows which one made it
    installer.maker(project / ".venv").write_text(installer.this_python())
    assert not makes_environment(project, this)
    assert not makes_environment(project)
    other = project / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    assert makes_environment(project, f"PYTHON={other / 'bin' / 'python'}")
    shutil.rmtree(project / ".venv")
    assert makes_environment(project) and makes_environment(project, this)


def test_an_environment_of_another_python_is_cleared(installer, without_pip, tmp_path):
    folder = tmp_path / "venv"
    installer.make_environment(folder, share=False)
    assert installer.made_by(folder) == "this"
    (folder / "kept").touch()
    installer.make_environment(folder, share=False, by_this=True)
    installer.maker(folder).write_text("another")
    installer.make_environment(folder, share=False)
    assert (folder / "kept").exists() and installer.made_by(folder) == "another"
    installer.make_environment(folder, share=False, by_this=True)
    assert not (folder / "kept").exists() and installer.made_by(folder) == "this"
