"""examples/recall.py: its data, a run of seconds with record, table and picture, and bad input."""

import importlib
import json
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield importlib.import_module("recall")
    finally:
        sys.path.remove(str(ROOT / "examples"))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_recall_asks_for_the_values_of_written_keys(program):
    task = program.Recall(tokens=40, pairs=5, vocab_size=32)
    ids, labels = task.batch(50, generator())
    assert ids.shape == labels.shape == (50, 40)
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        written = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(written) == 5 and all(0 < key < 16 <= value < 32 for key, value in written.items())
        assert asked[:10] == [-100] * 10
        answers = {row[i]: label for i, label in enumerate(asked) if label != -100}
        assert answers == written
        assert all(token == 0 for token, label in zip(row[10:], asked[10:], strict=True) if label == -100)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("test", [True, False])
def test_parity_asks_for_the_parity_of_the_bits_so_far(program, every, test):
    ids, labels = program.Parity(3, 9, 15, every=every).batch(50, generator(), test)
    lengths = set()
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        places = [i for i, label in enumerate(asked) if label != -100]
        for i in places:
            assert asked[i] == 1 + sum(token - 1 for token in row[: i + 1]) % 2
        lengths.add(places[-1] + 1)
        assert places == (list(range(9 if test else 0, places[-1] + 1)) if every else places[-1:])
    assert lengths <= (set(range(10, 16)) if test else set(range(3, 10))) and max(lengths) == (15 if test else 9)


def test_a_run_leaves_record_table_and_picture(program, tmp_path, capsys):
    models = ["delta_net", "linear_attn+feature_map=relu"]
    size = ["--hidden-sizes", "8", "16", "--steps", "2", "--batch-size", "2", "--tokens", "12", "--pairs", "2"]
    assert program.main(["--models", *models, *size, "--device", "cpu", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "recall.json").read_text())
    assert [(run["model"], run["hidden_size"]) for run in record["runs"]] == [(m, d) for m in models for d in (8, 16)]
    # two layers of two heads; DeltaNet also keeps four inputs of its three convolutions
    assert [run["state"] for run in record["runs"]] == [2 * (32 + 96), 2 * (128 + 192), 2 * 32, 2 * 128]
    assert (tmp_path / "recall.txt").read_text() in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "recall.png").std() > 0.05


def test_parity_draws_its_curve(program, tmp_path):
    size = ["--hidden-sizes", "8", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    assert program.main(["--task", "parity", *size, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "parity.json").read_text())
    assert [run["model"] for run in record["runs"]] == ["delta_net+allow_neg_eigval", "delta_net"]
    assert matplotlib.image.imread(tmp_path / "parity.png").std() > 0.05


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--models", "lstm"], "--models must be among"),
        (["--models", "gla+expandk=2"], "the config of gla has no expandk"),
        (["--models", "gla+expand_k=0"], "--models gla+expand_k=0: expand_k"),
        (["--pairs", "30"], "--pairs must be 1 to 21 (of 64 tokens), got 30"),
        (["--device", "meta"], "--device meta: must be cpu, or cuda where there is a GPU"),
        (["--out", "README.md"], "README.md"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line_and_exit_code_2(program, flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("")
    assert (
        program.main([*flags, "--steps", "1"] if "--device" in flags else [*flags, "--steps", "1", "--device", "cpu"])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("recall.py: ") and error.count("\n") == 1 and says in error
