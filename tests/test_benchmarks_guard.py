"""The regression guard, records of earlier days, working memory, and the file of the peer's tuning results."""

import io
import json
import tarfile

import pytest
import torch

from benchmarks import _compare, _ours, _records, _timing, _tuning, ops
from tests.test_benchmarks import TINY


def row(op="chunk_gla", ms=1.0, mode="fwd", **changes):
    usual = {"gpu": "NVIDIA H200", "shape": TINY, "dtype": "bfloat16", "commit": "c1", "note": "triton backend"}
    return _records.record(**usual | {"op": op, "ms": ms, "mode": mode} | changes)


def write(path, *rows):
    for fields in rows:
        _records.append(path, fields)
    return path


def test_guard_compares_last_records(tmp_path, capsys):
    base = write(tmp_path / "a" / "h200.jsonl", row(ms=5.0), row(ms=1.0), row(mode="fwdbwd", ms=2.0), row("sdpa"))
    now = write(tmp_path / "b" / "h200.jsonl", row(ms=1.09, commit="c2"), row(mode="fwdbwd", ms=1.0), row("new"))
    words = ["--base", str(base), "--against"]
    assert ops.main([*words, str(now)]) == 0
    said = capsys.readouterr().out
    assert "+9.0%" in said and "slower" in said and "-50.0%" in said and "faster" in said and "c2" in said
    assert "no row lost more than 10%" in said and "1 rows are not in --base" in said
    write(now, row(ms=1.11))
    assert ops.main([*words, str(now.parent)]) == 1  # a folder, and only the last record counts
    assert "LOST more than 10%: 1 rows" in capsys.readouterr().out
    write(now, row(ms=None), row(ms=1.02))
    assert ops.main([*words, str(now)]) == 0
    assert "1 of 2 rows changed by less than 3%" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"gpu": "NVIDIA H100"}, {"shape": "B1 T1 H1 D1"}, {"note": "torch backend"}])
def test_other_rows_are_not_compared(tmp_path, capsys, change):
    base = write(tmp_path / "a.jsonl", row())
    now = write(tmp_path / "b.jsonl", row(ms=9.0, **change))
    assert ops.main(["--base", str(base), "--against", str(now)]) == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_base_is_read_before_the_run_appends_to_it(tmp_path, monkeypatch, capsys):
    class Run:
        rows = (row(gpu="cpu", ms=2.0),)

        def __init__(self, settings, plan):
            self.out = settings.out

        def run(self):
            write(self.out / "cpu.jsonl", *self.rows)
            return 0

    monkeypatch.setattr(ops, "Run", Run)
    words = ["--device", "cpu", "--out", str(tmp_path), "--base", str(tmp_path)]
    write(tmp_path / "cpu.jsonl", row(gpu="cpu", ms=1.0))
    assert ops.main(words) == 1
    assert "+100.0%" in capsys.readouterr().out
    assert ops.main(words) == 0  # now beside the 2.0 of the first run


def test_records_of_before_lack_the_later_fields(tmp_path):
    path = tmp_path / "h200.jsonl"
    old = {name: value for name, value in row().items() if name not in _records.LATER}
    path.write_text(json.dumps(old) + "\n")
    assert _records.read_all(path) == [row()] and row()["work_mb"] is None
    assert _compare.changes([row()], _records.read(path))[0].longer == 0
    for empty in (tmp_path / "nothing", tmp_path / "x.jsonl"):
        with pytest.raises(ValueError, match=r"records must be a \.jsonl file or a folder"):
            _records.read_all(empty)


def test_working_memory_is_the_peak_without_results(monkeypatch):
    x = _timing.noise({"q": [1, 4, 2, 8], "g": [1, 4, 2, 8]}, torch.float32, "cpu", 0)
    size = x["q"].numel() * 4
    assert _timing.make_call(lambda q, g: q * g, x, "fwd").result_bytes == size
    call = _timing.make_call(lambda q, g: q * g, x, "fwdbwd")
    assert call.result_bytes == 3 * size
    peak = call.result_bytes / _timing.MIB + 7
    monkeypatch.setattr(_timing, "_gpu_times", lambda call, budget: ([1.0], peak))
    found = _timing.measure(call, "cuda", _timing.Budget())
    assert found["work_mb"] == pytest.approx(7) and found["peak_mb"] == peak
    assert _timing.measure(lambda: None, "cuda", _timing.Budget())["work_mb"] is None


def test_our_kernels_are_warmed():
    request = {"op": "gla", "form": "chunk", "backend": None, "device": "cpu", "dtype": "float32", "seed": 0}
    dims = {"B": 1, "T": 40, "H": 2, "K": 4, "V": 6}
    reply = _ours.warm(request | {"modes": ("fwd", "fwdbwd"), "all_dims": [dims, dims | {"T": 5}]})
    assert reply["status"] == "ok" and reply["seconds"] > 0


def test_tuning_results_travel(tmp_path, monkeypatch, capsys):
    cache, other = tmp_path / "cache", tmp_path / "other"
    for name in ("AA/one.autotune.json", "BB/two.autotune.json", "BB/two.cubin"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)
    file = tmp_path / "tuned.tgz"
    assert _tuning.save(file, cache) == 2
    assert _tuning.unpack(file, other) == (2, 0)
    assert sorted(p.relative_to(other).as_posix() for p in other.glob("*/*")) == [
        "AA/one.autotune.json",
        "BB/two.autotune.json",
    ]
    (other / "AA/one.autotune.json").write_text("mine")
    assert _tuning.unpack(cache, other) == (0, 2) and (other / "AA/one.autotune.json").read_text() == "mine"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "third"))
    (tmp_path / "peer" / "fla").mkdir(parents=True)
    monkeypatch.setattr(ops, "Run", lambda settings, plan: pytest.fail(f"tuned {settings.peer_tuned}"))
    with pytest.raises(pytest.fail.Exception, match="tuned True"):
        ops.main(["--device", "cpu", "--peer", str(tmp_path / "peer"), "--peer-cache", str(file)])
    assert "2 tuning results from tuned.tgz" in capsys.readouterr().out
    assert (tmp_path / "third" / "BB" / "two.autotune.json").is_file()


def test_tuning_results_stay_in_the_cache(tmp_path):
    file = tmp_path / "bad.tgz"
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("../out.autotune.json")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="paths inside Triton's cache folder, got"):
        _tuning.unpack(file, tmp_path / "cache")
    assert not (tmp_path / "out.autotune.json").exists()
    file.write_text("no archive")
    for source, message in ((file, "a folder or a tar file"), (tmp_path / "cache", "a folder or a tar file")):
        with pytest.raises(ValueError, match=message):
            _tuning.unpack(source, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold \*\.autotune\.json files, got none"):
        _tuning.unpack(tmp_path / "empty", tmp_path / "new")
