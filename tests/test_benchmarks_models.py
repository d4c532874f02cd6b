"""The benchmarks of whole models with tiny configs on a CPU: what they print, write and refuse."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import _models, _records, _report, _timing, generation, training
from fla.models import GLAConfig, RetNetConfig

TINY = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_heads", "2", "--vocab_size", "256", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setitem(_timing.BANDWIDTH_BYTES, "cpu", 2**20)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Attention that is linear in the length of its input. " * 20)
    return path


@pytest.mark.parametrize("model", ["gla", "retnet", "linear_attn", "transformer"])
def test_training_throughput(model, tmp_path, capsys):
    words = ["--name", model, *TINY, "--batch_size", "2", "--seq-len", "24", "--steps", "3", "--warmup_steps", "1"]
    assert training.main([*words, "--out", str(tmp_path), "--commit", "abc"]) == 0
    said = capsys.readouterr().out
    for part in ("48 (2 rows)", "initial memory", "max memory", "1 warm-up steps", "tokens/s", "32, 2 layers, 2 heads"):
        assert part in said
    (row,) = _records.read(tmp_path / "cpu.jsonl")
    assert (row["op"], row["shape"], row["mode"], row["commit"]) == (model, "B2 T24", "train", "abc")
    assert row["ms"] > 0 and "AdamW" in row["note"] and "M parameters" in row["note"]


def test_training_on_packed_text_in_bfloat16(tmp_path, text):
    words = [*TINY, "--batch_size", "3", "--seq_len", "20", "--steps", "1", "--warmup_steps", "0", "--varlen"]
    words += ["--context_len", "7", "--data", str(text), "--dtype", "bfloat16", "--backend", "torch"]
    assert training.main([*words, "--out", str(tmp_path)]) == 0
    (row,) = _records.read(tmp_path / "cpu.jsonl")
    assert row["shape"] == "B1 T60" and row["dtype"] == "bfloat16"
    assert row["note"].endswith("torch backend; AdamW; packed; autocast")
    page, _ = _report.build([row])
    assert f"| retnet | B1 T60 | bfloat16 | train | {row['ms']:.4g} | {60 / row['ms'] * 1e3:,.0f} |" in page


def test_packing_and_targets():
    generator = torch.Generator().manual_seed(0)
    bounds = _bounds(training.packing(100, 5, None, generator))
    assert len(bounds) == 6 and bounds[0] == 0 and bounds[-1] == 100 and bounds == sorted(set(bounds))
    short = _bounds(training.packing(100, 5, 8, generator))
    assert max(b - a for a, b in pairwise(short)) == 8 and short[-1] == 100
    a = training.parser().parse_args(["--varlen", "--batch_size", "3", "--seq_len", "10"])
    a.device = "cpu"
    first, second = training.batches(_models.Codec("gla", 256), a, 2)
    assert not torch.equal(first["input_ids"], second["input_ids"])
    hidden = (first["labels"] == -100)[0].nonzero()[:, 0].tolist()
    assert hidden == _bounds(first["cu_seqlens"])[:-1]


def _bounds(x: torch.Tensor) -> list[int]:
    return x.tolist()


def test_a_loss_that_is_no_number_gets_no_number(tmp_path, monkeypatch):
    build = _models.build_model

    def broken(*arguments):
        model = build(*arguments)
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        return model

    monkeypatch.setattr(_models, "build_model", broken)
    words = [*TINY, "--batch_size", "1", "--seq_len", "8", "--steps", "1", "--warmup_steps", "0"]
    with pytest.raises(RuntimeError, match="the loss became nan"):
        training.main([*words, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_generation_after_a_prompt(tmp_path, capsys):
    words = ["--path", "gla", *TINY, "--maxlen", "5", "--repetition_penalty", "2.", "--prompt=Hello everyone, I'm here"]
    assert generation.main([*words, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("Hello everyone, I'm here") == 2 and "\nGenerated:\nHello everyone, I'm here" in said
    assert "Prompt length: 24, generation length: 5\nTotal prompt processing + decoding time: " in said
    (row,) = _records.read(tmp_path / "cpu.jsonl")
    assert (row["op"], row["shape"], row["mode"]) == ("gla", "B1 T24", "generate") and row["ms"] > 0
    assert "5 tokens in" in row["note"]


def test_generation_of_a_saved_model(tmp_path, text, capsys):
    torch.manual_seed(0)
    config = RetNetConfig(hidden_size=32, num_hidden_layers=1, num_heads=2, vocab_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "saved")
    words = ["--path", str(tmp_path / "saved"), "--device", "cpu", "--maxlen", "3", "--length", "10"]
    assert generation.main([*words, "--data", str(text), "--no-cache", "--batch_size", "2"]) == 0
    said = capsys.readouterr().out
    assert "Prompt length: 10, generation length: 3" in said and "retnet: " in said
    window = said.split("Prompt:\n")[1].split("\n\nGenerated:")[0]
    assert len(window) == 10 and window in text.read_text()
    assert generation.main(words) == 0
    assert "Generated:" not in capsys.readouterr().out  # random tokens are no text
    assert generation.main([*words, "--output-generation"]) == 0
    assert "Generated:" in capsys.readouterr().out


def test_generation_with_a_tokenizer(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "power", "goes", "with", "permanence"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    config = GLAConfig(hidden_size=32, num_hidden_layers=1, num_heads=2, vocab_size=5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert generation.main(["--path", str(tmp_path), "--device", "cpu", "--maxlen", "2", "--prompt", "power goes"]) == 0
    said = capsys.readouterr().out
    assert "Prompt length: 2, generation length: 2" in said
    assert set(said.split("Generated:\n")[1].split("\n")[0].split()) <= set(words)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (training.main, ["--name", "nowhere/at-all"], "--name must be a model type"),
        (training.main, ["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (training.main, ["--context_len", "8"], "--context_len needs --varlen"),
        (training.main, ["--data", "nowhere.txt"], "--data must be a text file"),
        (training.main, ["--name", "linear_attn", "--head_dim", "8"], "--head_dim is no size of linear_attn"),
        (generation.main, ["--path", "nowhere/at-all"], "--path must be a model type"),
        (generation.main, ["--maxlen", "0"], "--maxlen must be at least 1"),
        (generation.main, ["--vocab_size", "100", "--prompt", "x"], "--vocab_size must be at least 256 for text"),
        (generation.main, ["--prompt", ""], "--prompt must hold at least one token"),
        (generation.main, ["--data", __file__, "--length", "1000000"], "--data must hold at least 1000000 tokens"),
    ],
)
def test_bad_arguments(command, words, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        command(["--device", "cpu", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("generation", "path data length maxlen no-cache temperature topp repetition_penalty compile prompt"),
        ("training_throughput", "name batch_size seq_len context_len varlen warmup_steps steps compile"),
    ],
)
def test_commands_of_the_seed(name, options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"benchmarks.benchmark_{name}", run_name="__main__")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"python -m benchmarks.benchmark_{name}" in said
    assert all(f"--{option}" in said for option in options.split())
