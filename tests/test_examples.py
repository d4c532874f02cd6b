"""The demo's story at a size of seconds: train, save, reload, generate, draw; interrupt and resume; bad input."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from transformers import AutoModelForCausalLM

import fla.models  # noqa: F401  the Auto classes learn our model types

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_and_generate.py"
SIZE = ["--hidden-size", "32", "--layers", "1", "--heads", "2", "--seq-len", "64", "--batch-size", "4", "--lr", "0.01"]
STEPS = 24


def arguments(text: Path, out: Path, *flags: str) -> list[str]:
    return ["--text", str(text), "--out", str(out), *SIZE, "--steps", str(STEPS), *flags]


def command(text: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments(text, out, *flags)]


def call(arguments: list[str], **keywords) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False, **keywords
    )


@pytest.fixture(scope="module")
def program():
    """The script as a module, for what needs no process of its own."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Twenty small files that a model can learn something about quickly."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j % 10}\n" for j in range(20)]
        (folder / f"file_{i:02}.py").write_text("\n".join(lines))
    (folder / "picture.bin").write_bytes(bytes(1000))
    (folder / ".hidden").write_text("hidden " * 1000)
    return folder


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> tuple[Path, str]:
    """The results folder and the output of a run from beginning to end."""
    out = tmp_path_factory.mktemp("whole")
    result = call(command(text, out, "--prompt", "def ", "--new-bytes", "20"))
    assert result.returncode == 0, result.stderr
    return out, result.stdout + result.stderr


def losses(out: Path) -> list[float]:
    return json.loads((out / "metrics.json").read_text())["loss"]


def test_it_learns_and_records(whole):
    metrics = json.loads((whole[0] / "metrics.json").read_text())
    assert len(metrics["loss"]) == len(metrics["seconds"]) == STEPS
    assert metrics["loss"][0] == pytest.approx(math.log(256), rel=0.05)  # it knows nothing at first
    assert metrics["loss"][-1] < metrics["loss"][0] - 1
    assert metrics["validation_bits_per_byte"][-1][0] == STEPS
    assert metrics["bits_per_byte"]["gla"] < metrics["bits_per_byte"]["uniform guess"] == 8
    assert metrics["tokens_per_second"] > 0
    assert metrics["backend"] == "torch" or torch.cuda.is_available()


def test_the_checkpoint_is_the_model_that_was_measured(whole):
    model, information = AutoModelForCausalLM.from_pretrained(whole[0] / "checkpoint", output_loading_info=True)
    assert type(model).__name__ == "GLAForCausalLM"
    assert not information["missing_keys"] and not information["unexpected_keys"]
    assert model.config.use_short_conv
    metrics = json.loads((whole[0] / "metrics.json").read_text())
    assert sum(w.numel() for w in model.parameters()) == metrics["parameters"]


def test_the_output_shows_table_and_text(whole):
    out, output = whole
    for name in ("uniform guess", "byte frequencies", "gzip -9", "xz -9e", "gla"):
        assert re.search(rf"^  {re.escape(name)} +\d+\.\d\d$", output, re.MULTILINE), name
    assert "gzip and xz still win" in output  # as they do over a model of a second's training
    assert "tokens/s" in output and "left]" in output  # the progress bar
    assert "writes after 'def ':" in output
    assert (out / "report.txt").read_text() in output


def test_the_picture_is_a_picture(whole):
    pixels = matplotlib.image.imread(whole[0] / "loss.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels.std() > 0.05  # something is drawn


def test_ctrl_c_keeps_a_checkpoint_and_resume_continues_the_same_curve(program, whole, text, tmp_path, capsys):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["TQDM_MININTERVAL"] = "0"  # show every step: a bar ten times a second passes over those wanted here
    flags = ["--prompt", "def ", "--new-bytes", "20"]
    process = subprocess.Popen(
        command(text, tmp_path, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    seen = ""
    while not re.search(r"\b[2-9]/24 steps", seen):
        character = process.stderr.read(1)
        assert character, seen + process.stdout.read()
        seen += character
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    stopped = int(re.search(r"stopped after step (\d+) of 24", output)[1])
    assert 2 <= stopped < STEPS
    assert f"--resume --out {tmp_path}" in output
    assert not (tmp_path / "metrics.json").exists()

    resumed = call([sys.executable, str(SCRIPT), "--resume", "--out", str(tmp_path), *flags])
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path) == losses(whole[0])  # bit for bit
    assert (tmp_path / "report.txt").read_text().split("\n", 1)[1] == (whole[0] / "report.txt").read_text().split(
        "\n", 1
    )[1]

    assert program.main(["--resume", "--out", str(tmp_path), "--lr", "0.1"]) == 2
    assert "leave out --lr" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["retnet", "linear_attn", "transformer"])
def test_every_model_trains_and_writes(program, model, text, tmp_path, capsys):
    assert program.main(arguments(text, tmp_path, "--model", model, "--new-bytes", "5")) == 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 1
    assert re.search(rf"^  {model} +\d\.\d\d$", capsys.readouterr().out, re.MULTILINE)


def test_bfloat16_keeps_float32_copies(program, text, tmp_path):
    assert program.main(arguments(text, tmp_path, "--dtype", "bfloat16", "--new-bytes", "5")) == 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 1
    state = torch.load(tmp_path / "checkpoint" / "trainer.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert {master.dtype for master in state["masters"]} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    for weight, master in zip(model.parameters(), state["masters"], strict=True):
        assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--text", "no/such/file.txt"], "cannot read --text no/such/file.txt: No such file or directory"),
        (["--text", "LICENSE", "--seq-len", "4096"], "too few for --seq-len 4096"),
        (["--hidden-size", "30", "--heads", "4"], "30"),
        (["--resume", "--out", "no/such/run"], "nothing to resume: there is no no/such/run"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "toaster"], "--device toaster: "),
        (["--backend", "triton", "--device", "cpu"], "--backend triton: backend='triton' needs GPU tensors"),
        (["--steps", "0"], "argument --steps: "),
        (["--model", "lstm"], "argument --model: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line_and_exit_code_2(program, flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    try:
        code = program.main([*flags, *out])
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    message = capsys.readouterr().err.splitlines()
    assert code == 2
    assert says in message[-1]
    assert len(message) == 1 or message[0].startswith("usage:")


def test_an_unreadable_text_ends_the_command_with_exit_code_2(tmp_path):
    result = call([sys.executable, str(SCRIPT), "--text", str(tmp_path / "missing"), "--out", str(tmp_path / "out")])
    assert result.returncode == 2
    assert (
        result.stderr
        == f"train_and_generate.py: cannot read --text {tmp_path / 'missing'}: No such file or directory\n"
    )
    assert not (tmp_path / "out").exists()


def test_resuming_on_another_text_is_refused(program, whole, text, tmp_path, capsys):
    shutil.copytree(whole[0] / "checkpoint", tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint" / "trainer.pt", weights_only=True)
    state["text"] = "another"
    torch.save(state, tmp_path / "checkpoint" / "trainer.pt")
    assert program.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "text has changed" in capsys.readouterr().err


def test_held_out_text_is_every_tenth_file_or_the_last_tenth(program):
    texts = [bytes([65 + i]) * 100 for i in range(20)]
    training, held_out = program.split(texts, 10)
    assert set(held_out) == {65 + 9, 65 + 19}
    assert set(training) | set(held_out) == set(range(65, 85))
    assert not set(training) & set(held_out)
    assert (len(held_out) - 1) % 10 == 0  # whole windows
    training, held_out = program.split([b"a" * 900, b"b" * 100], 10)
    assert set(training) == {97} and set(held_out) == {98}


def test_without_text_the_standard_library_is_read(program):
    texts = program.read_files([])
    assert len(texts) > 200
    assert any(b"class JSONDecoder" in text for text in texts)
