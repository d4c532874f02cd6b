"""The demo's story at a size of seconds: train, save, reload, generate, draw; interrupt and resume; bad input."""

import argparse
import contextlib
import importlib
import io
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


@pytest.fixture(scope="module")
def program():
    """The script as a module, for what needs no process of its own."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def threads_of(program):
    """What `_threads.py` does in so many steps, where a step of n threads takes `seconds(step, n)`: n at every step."""

    def counts(most: int, steps: int, seconds, **options) -> list[int]:
        used: list[int] = []
        threads = program.Threads(most, use=lambda count: None, **options)
        for step in range(steps):
            used.append(threads.count)
            threads.seen(seconds(step, threads.count))
        return used

    return counts


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


def run_here(program, arguments: list[str]) -> str:
    """The whole program in this process; what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert program.main(arguments) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(program, text, tmp_path_factory) -> tuple[Path, str]:
    """The results folder and the output of a run from beginning to end."""
    out = tmp_path_factory.mktemp("whole")
    return out, run_here(program, arguments(text, out, "--prompt", "def ", "--new-bytes", "20"))


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
        [sys.executable, str(SCRIPT), *arguments(text, tmp_path, *flags)],
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

    run_here(program, ["--resume", "--out", str(tmp_path), *flags])
    assert losses(tmp_path) == losses(whole[0])  # bit for bit
    assert (tmp_path / "report.txt").read_text().split("\n", 1)[1] == (whole[0] / "report.txt").read_text().split(
        "\n", 1
    )[1]

    assert program.main(["--resume", "--out", str(tmp_path), "--lr", "0.1"]) == 2
    assert "leave out --lr" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["retnet", "linear_attn", "transformer", "delta_net", "gated_deltanet", "kda"])
def test_every_model_trains_and_writes(program, model, text, tmp_path, capsys):
    assert program.main(arguments(text, tmp_path, "--model", model, "--new-bytes", "5")) == 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 1
    assert re.search(rf"^  {model} +\d\.\d\d$", capsys.readouterr().out, re.MULTILINE)


def test_bfloat16_keeps_float32_copies(program, text, tmp_path):
    assert program.main(arguments(text, tmp_path, "--dtype", "bfloat16", "--new-bytes", "5")) == 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 1
    state = torch.load(tmp_path / "checkpoint" / "trainer.pt", weights_only=True, map_location="cpu")
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
        (["--lr", "nan"], "argument --lr: must be a number between 1e-30 and 1e30, got nan"),
        (["--lr", "0"], "argument --lr: must be a number"),
        (["--lr", "-0.1"], "argument --lr: must be a number"),
        (["--lr", "fast"], "argument --lr: must be a number between 1e-30 and 1e30, got fast"),
        (["--seq-len", "1.5"], "argument --seq-len: must be an integer of at least 1, got 1.5"),
        (["--seed", "9" * 30], "argument --seed: must be an integer between"),
        (["--out", "README.md"], "--out README.md must be a folder for the results: File exists"),
        (["--out", "README.md/run"], "--out README.md/run must be a folder for the results: Not a directory"),
        (["--resume", "--out", "README.md"], "nothing to resume: there is no README.md/checkpoint/trainer.pt"),
        (["--text", "binaries/1.bin"], "--text binaries/1.bin is no text: it holds zero bytes"),
        (["--text", "binaries"], "--text binaries: there is no text in it, only empty files and files with zero bytes"),
        (["--text", "empty.txt"], "--text empty.txt: there is no text in it"),
        (["--device", "meta"], "--device meta: must be cpu or cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line_and_exit_code_2(program, flags, says, tmp_path, monkeypatch, capsys):
    files = {"binaries/1.bin": bytes(9), "binaries/2.bin": b"a" + bytes(9), "empty.txt": b""}
    files |= {name: (ROOT / name).read_bytes() for name in ("README.md", "LICENSE")}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
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
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_a_run_that_diverges_says_so(program, whole, text, tmp_path, capsys):
    """It says so in one line, and leaves the checkpoint of an earlier run alone."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint" / "trainer.pt").read_bytes()
    assert program.main([*arguments(text, tmp_path), "--lr", "1e30"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"train_and_generate.py: training diverged: the (validation )?loss is (nan|inf) after \d+ steps; "
        "try a smaller --lr",
        last,
    )
    assert (tmp_path / "checkpoint" / "trainer.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoint/model.bin", "loss.png", "metrics.json", "checkpoint/trainer.pt"])
def test_nothing_is_overwritten_that_another_program_made(program, name, text, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert program.main(arguments(text, tmp_path)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"--out {tmp_path} already has {name.split('/')[0]}, not of a run of this program" in message
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_what_cannot_be_resumed_is_named(program, whole, text, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint" / "config.json").unlink()
    assert program.main(["--resume", "--out", str(tmp_path)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"cannot load {tmp_path / 'checkpoint'}: " in message
    for content, says in ((b"x", "cannot read "), (None, "is no state of a run of this program")):
        file = tmp_path / "checkpoint" / "trainer.pt"
        file.write_bytes(content) if content else torch.save({"args": {}}, file)
        assert program.main(["--resume", "--out", str(tmp_path)]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert says in message and str(file) in message


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), OSError("disk full")])
def test_a_machine_that_is_too_small_is_named(program, error, text, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(program, "build_model", fail)
    assert program.main(arguments(text, tmp_path)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("train_and_generate.py: ")
    assert ("out of memory, take smaller sizes: " in message) == (not isinstance(error, OSError))


def test_help_says_what_numbers_count(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--seq-len N bytes of a training sequence (default: 256)" in text
    assert "--new-bytes N bytes to generate (default: 400)" in text


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


def idle(step: int, count: int) -> float:
    return 1 / count


def busy(step: int, count: int) -> float:
    """Every thread but one waits for its turn."""
    return 1.5 if count == 1 else 30.0 * count


def test_on_idle_cores_all_threads_are_used(threads_of):
    for most in (1, 2, 3, 8):
        used = threads_of(most, 100, idle)
        assert used[20:] == [most] * 80 and used[0] == 1


def test_more_threads_than_help_are_not_used(threads_of):
    """On a machine of many cores a small model gets few threads."""
    used = threads_of(64, 400, lambda step, count: 1 / min(count, 8) + 0.01 * count)
    assert used.count(8) > 360 and max(used) == 16


def test_on_busy_cores_one_thread_is_used(threads_of):
    used = threads_of(8, 1000, busy)
    assert used.count(1) > 990 and max(used) == 2
    assert sum(busy(0, count) for count in used) < 1.25 * 1000 * busy(0, 1)


def test_threads_follow_what_happens_to_the_cores(threads_of):
    """Idle, busy, idle: fewer threads at once, more after a while; one slow step is no reason."""

    def seconds(step: int, count: int) -> float:
        return (busy if 200 <= step < 400 else idle)(step, count) * (50 if step in (100, 150) else 1)

    used = threads_of(2, 1000, seconds)
    assert used[20:200] == [2] * 180
    assert used[205:400].count(2) < 8
    assert used[800:] == [2] * 200


def test_a_number_of_threads_that_is_given_stays(threads_of, program, monkeypatch):
    assert threads_of(6, 200, busy, least=6) == [6] * 200
    used = []
    monkeypatch.setattr(program, "Threads", lambda most, least: used.append((most, least)))
    monkeypatch.setattr(program.torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for given, device in ((None, "cpu"), (3, "cpu"), (None, "cuda")):
        program.choose_threads(argparse.Namespace(threads=given, device=device))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    program.choose_threads(argparse.Namespace(threads=None, device="cpu"))
    assert used == [(4, 1), (3, 3), (4, 4), (4, 4)]
