"""`python -m benchmarks.clients` on tiny inputs: its rows, and that a wrong result gets no number."""

import pytest
import torch

from benchmarks import _records, clients

WORDS = ["--device", "cpu", "--commit", "abc", "--seconds", "0.01", "--shape", "B1 T70 H2 D8"]
pytestmark = pytest.mark.touches("gated_delta_rule", "kda")


@pytest.fixture(autouse=True)
def _one_round(monkeypatch):
    monkeypatch.setattr(clients, "ROUNDS", 1)


def test_a_row_per_op_and_mode(tmp_path, capsys):
    assert clients.main([*WORDS, "--out", str(tmp_path)]) == 0
    found = _records.read(tmp_path / "cpu.jsonl")
    ops = ("chunk_gated_delta_rule", "chunk_kda")
    assert [(r["op"], r["mode"]) for r in found] == [(op, mode) for op in ops for mode in clients.MODES]
    for r in found:
        assert r["shape"] == "B1 T70 H2 D8" and r["commit"] == "abc" and r["peer"].startswith("transformers ")
        assert r["ms"] > 0 and r["ratio"] == pytest.approx(r["peer_ms"] / r["ms"], rel=1e-2)
        assert r["note"].startswith("torch backend beside ")
    assert "chunk_kda" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["ours", "theirs"])
def test_a_wrong_result_gets_no_number(tmp_path, monkeypatch, wrong):
    right = clients.both

    def leaking(op, backend):
        calls = right(op, backend)
        call = calls[wrong]
        return calls | {wrong: lambda q, **rest: (call(q=q.flip(1), **rest)[0], None)}

    monkeypatch.setattr(clients, "both", leaking)
    assert clients.main([*WORDS, "--out", str(tmp_path), "--op", "gated_delta_rule"]) == 1
    (row,) = _records.read(tmp_path / "cpu.jsonl")
    assert row["ms"] is None and row["note"].startswith("FAILED: AssertionError")


def test_bad_arguments(capsys):
    for words, said in ((["--op", "gla"], "--op must be among"), (["--shape", "T4 T5"], "--shapes must name")):
        with pytest.raises(SystemExit):
            clients.main([*words, "--device", "cpu"])
        assert said in capsys.readouterr().err
    assert torch.is_grad_enabled()
