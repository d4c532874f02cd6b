"""Host overhead and decoding on tiny CPU inputs: the rows they write, and that a wrong result gets no number."""

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import _records, _report, _timing, decode, host, packed
from benchmarks._goals import Goal
from fla.ops._spec import REGISTRY

OPS = ["gla", "linear_attn"]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setitem(_timing.BANDWIDTH_BYTES, "cpu", 2**20)


def rows(tmp_path):
    return {(r["op"], r["mode"]): r for r in _records.read(tmp_path / "cpu.jsonl")}


HOST = ["--device", "cpu", "--commit", "abc", "--seconds", "0.01", "--shape", "B1 T8 H1 D4", "--no-imports"]


@pytest.mark.parametrize(("words", "backend"), [([], "idle"), (["--backend", "torch"], "torch")])
def test_host_writes_a_row_per_op_and_mode(tmp_path, monkeypatch, capsys, words, backend):
    monkeypatch.setattr(host, "ROUNDS", 2)
    assert host.main([*HOST, "--out", str(tmp_path), "--op", *OPS, *words]) == 0
    found = rows(tmp_path)
    modes = ("host_fwd", "host_fwdbwd")
    assert list(found) == [(f"chunk_{op}", mode) for op in OPS for mode in modes]
    assert all(r["ms"] > 0 and r["commit"] == "abc" and r["shape"] == "B1 T8 H1 D4" for r in found.values())
    assert all(f"{backend} backend" in r["note"] and "in a loop" in r["note"] for r in found.values())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  chunk_gla"))
    assert [float(cell) for cell in line.split()[1:]] == pytest.approx(
        [found["chunk_gla", mode]["ms"] * 1e3 for mode in modes], rel=0.02
    )
    q = torch.ones(1, 8, 1, 4)
    assert REGISTRY["gla"].forms["chunk"](q, q, q, -q)[0].isfinite().all()  # the backend computes again


def test_host_beside_another_checkout(tmp_path, monkeypatch, capsys):
    """Both are asked in turn, each in its process; the quietest round of each counts."""
    asked: list[tuple[str, str]] = []
    times = {"before": itertools.cycle([9.0, 8.0, 7.0]), "now": itertools.cycle([6.0, 5.0, 4.0])}

    class Side:
        def __init__(self, command, cwd):
            assert command[1].endswith("_checkout.py") and command[2] == cwd
            self.name = "before" if Path(cwd) == tmp_path else "now"

        def ask(self, request, timeout):
            asked.append((self.name, request["do"]))
            if request["do"] == "prepare":
                known = request["op"] == "gla" or self.name == "now"
                return {"status": "ok" if known else "unsupported", "why": "", "backend": "idle", "settings": {}}
            return {"status": "ok", "us": next(times[self.name])}

        def close(self):
            asked.append((self.name, "close"))

    (tmp_path / "fla").mkdir()
    monkeypatch.setattr(host, "Worker", Side)
    words = [*HOST, "--out", str(tmp_path), "--mode", "fwd", "--op", *OPS, "--against", str(tmp_path)]
    assert host.main(words) == 0
    rounds = [name for name, do in asked if do == "round"]
    assert rounds[:4] == ["now", "before", "before", "now"] and rounds.count("before") == host.ROUNDS
    assert asked[-2:] == [("now", "close"), ("before", "close")]
    found = rows(tmp_path)
    assert (
        found["chunk_gla", "host_fwd"]["ms"] == 0.004 and "7.0 us at unknown" in found["chunk_gla", "host_fwd"]["note"]
    )
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["chunk_gla", "7.0", "4.0", "0.57"] in said and ["chunk_linear_attn", "-", "4.0", "-"] in said


def test_a_checkout_s_library_is_timed_with_these_benchmarks(tmp_path):
    for package in ("fla", "benchmarks"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("WHERE = 'there'")
    (tmp_path / "empty").mkdir()
    code = f"""
import sys
sys.path.insert(0, {str(Path(host.__file__).parent)!r})
from pathlib import Path
from _checkout import take
take(Path({str(tmp_path)!r}))
import benchmarks, fla
print(fla.WHERE, hasattr(benchmarks, "WHERE"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["there", "False"]
    wrong = code.replace(str(tmp_path), str(tmp_path / "empty"))
    done = subprocess.run([sys.executable, "-c", wrong], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and ("not from" in done.stderr or "No module named 'fla'" in done.stderr)


def test_time_of_imports(monkeypatch):
    printed = iter(["0.2 0.5", "0.1 0.4", "0.3 0.6", "0.1 0.3", "0.2 0.5", "0.1 0.7"])
    folders = {"before": Path("there"), "now": Path("here")}
    where = []

    def run(command, cwd, **options):
        where.append(cwd)
        return subprocess.CompletedProcess(command, 0, next(printed))

    monkeypatch.setattr(host.subprocess, "run", run)
    found = host.import_times(folders)
    assert found == {"before": pytest.approx((200.0, 500.0)), "now": pytest.approx((100.0, 300.0))}
    assert where == [*folders.values()] * host.IMPORTS


def test_decode_writes_both_rows(tmp_path, capsys):
    words = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01"]
    assert decode.main([*words, "--op", *OPS]) == 0
    found = rows(tmp_path)
    assert list(found) == [(f"fused_recurrent_{op}", mode) for op in OPS for mode in ("decode", "decode_loop")]
    wide = found["fused_recurrent_gla", "decode"]
    assert wide["shape"] == "B2 T1 H4 D16" and wide["floor_x"] > 0
    assert f"{1 / wide['floor_x']:.0%} of copy bandwidth" in wide["note"]
    assert found["fused_recurrent_gla", "decode_loop"]["floor_x"] is None
    page, _ = _report.build(list(found.values()))
    assert f"| fused_recurrent_gla | B2 T1 H4 D16 | float32 | decode | {wide['ms'] * 1e3:.4g} |" in page
    assert "share of copy bandwidth" in capsys.readouterr().out


def test_wrong_decoding_gets_no_number(tmp_path, monkeypatch):
    right = decode.find

    def wrong(which):
        def find(*arguments):
            target = right(*arguments)

            def call(**tensors):
                o, state = target.call(**tensors)
                return (o * 1.01, state) if which == "o" else (o, state * 1.01)

            return replace(target, call=call)

        return find

    for which in ("o", "final state"):
        monkeypatch.setattr(decode, "find", wrong(which))
        out = tmp_path / which
        assert decode.main(["--device", "cpu", "--op", "gla", "--out", str(out), "--seconds", "0.01"]) == 1
        assert all(r["ms"] is None and f"FAILED: AssertionError: {which}" in r["note"] for r in rows(out).values())


def test_wrong_op_gets_no_host_time(tmp_path, monkeypatch):
    spec = REGISTRY["gla"]
    monkeypatch.setitem(
        REGISTRY, "gla", replace(spec, reference=lambda *a, **k: (spec.reference(*a, **k)[0] * 2, None))
    )
    monkeypatch.setattr(_timing, "per_call", lambda *_: pytest.fail("timed"))
    assert host.main([*HOST, "--no-idle", "--op", "gla", "--out", str(tmp_path)]) == 1
    assert [r["ms"] for r in rows(tmp_path).values()] == [None]


def test_packed_sequences_beside_one(tmp_path):
    words = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", "--shape", "B1 T64 H2 D8"]
    assert packed.main([*words, "--op", *OPS, "--sequences", "9"]) == 0
    found = rows(tmp_path)
    modes = ("whole_fwd", "packed_fwd", "whole_fwdbwd", "packed_fwdbwd")
    assert list(found) == [(f"chunk_{op}", mode) for op in OPS for mode in modes]
    times = [found["chunk_gla", mode]["ms"] for mode in modes]
    said = re.search(r"9 sequences take (\S+)x the time of one", found["chunk_gla", "packed_fwdbwd"]["note"])
    assert float(said[1]) == pytest.approx(times[3] / times[2], rel=1e-2)
    goal = Goal("packing", "chunk_gla", "B1 T64 H2 D8", "packed_fwdbwd", "packed_x", 1.3)
    records = {(r["op"], r["shape"], r["mode"]): r for r in found.values()}
    assert goal.value(records) == times[3] / times[2] and set(goal.keys) <= set(records)
    page, _ = _report.build(list(found.values()))
    assert "| chunk_gla | B1 T64 H2 D8 | float32 | packed_fwdbwd |" in page


def test_skewed_lengths():
    bounds = packed.skewed_bounds(65536, 1000, 0)
    lengths = bounds.diff()
    assert len(lengths) == 1000 and bounds[0] == 0 and bounds[-1] == 65536 and lengths.min() >= 1
    assert lengths.max() > 20 * lengths.median()
    assert packed.skewed_bounds(5, 5, 0).tolist() == list(range(6))


def test_packing_that_leaks_gets_no_number(tmp_path, monkeypatch):
    right = packed.find

    def leaking(*arguments):
        target = right(*arguments)
        return replace(target, call=lambda cu_seqlens=None, **tensors: target.call(**tensors))

    monkeypatch.setattr(packed, "find", leaking)
    words = ["--device", "cpu", "--out", str(tmp_path), "--shape", "B1 T64 H2 D8", "--sequences", "9", "--op", "gla"]
    assert packed.main(words) == 1
    (row,) = rows(tmp_path).values()
    assert row["ms"] is None and "FAILED: AssertionError: " in row["note"]


@pytest.mark.parametrize(
    ("words", "message"), [(["--shape", "B2 T8 H1 D4"], "must have B1"), (["--sequences", "9999"], "from 1 to the 512")]
)
def test_bad_packing(words, message, capsys):
    with pytest.raises(SystemExit):
        packed.main(["--device", "cpu", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--against", "nowhere"], "must be a checkout"), (["--idle", "--backend", "triton"], "--idle")],
)
def test_bad_checkouts(words, message, capsys):
    with pytest.raises(SystemExit):
        host.main(["--device", "cpu", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [host.main, decode.main, packed.main])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "glaa"], "--op must be among"),
        (["--device", "cuda"], "needs a CUDA GPU"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_arguments(command, words, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
