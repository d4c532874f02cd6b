"""The report: made from records alone, one commit a table, honest gaps, and current."""

from pathlib import Path

import pytest

from benchmarks import _goals, _records, _report, _shapes, families, ops
from benchmarks._goals import Goal
from fla.ops._spec import REGISTRY
from tests.test_benchmarks_axes import SCAN

GOALS = families.goals("decay")
ROOT = Path(__file__).parents[1]


def row(op="chunk_gla", shape="B4 T4096 H64 D128", mode="fwd", ms=1.0, day=1, **changes):
    usual = {"date": f"2026-01-0{day}T00:00:00Z", "gpu": "NVIDIA H200", "dtype": "bfloat16", "commit": f"c{day}"}
    usual |= {"torch": "2", "triton": "3", "note": "triton backend" if op not in _report.SOFTMAX else ""}
    return _records.record(**usual | {"op": op, "shape": shape, "mode": mode, "ms": ms} | changes)


def with_peer(ours=1.0, peer=4.0, **changes):
    return row(ms=ours, peer="toy 1", peer_ms=peer, ratio=peer / ours, floor_x=2.5, **changes)


def test_page_is_current():
    page, pictures = _report.build(_records.read_all(ROOT / "benchmarks" / "results"))
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page, "run python -m benchmarks.ops --report"
    assert sorted(path.name for path in (ROOT / "docs").glob("benchmarks-*.png")) == sorted(pictures)


def test_report_of_no_records_at_all_is_all_gaps(tmp_path):
    page, pictures = _report.build([])
    assert "## " not in page and not pictures
    page, pictures = _report.build([row(note="--quick; triton backend"), row(commit="c1-dirty"), row(ms=None)])
    assert not pictures and "not met:" in page and " | met |" not in page and "**not met**" not in page
    assert page.count(" | no record |") >= len(GOALS)


def test_every_table_is_of_the_newest_commit_that_has_it():
    records = [
        with_peer(day=1),
        with_peer(ours=2.0, day=2),
        row("chunk_retention", day=1),
        with_peer(ours=9.0, day=3, commit="c3-dirty"),
        with_peer(ours=8.0, day=4, note="torch backend"),
        with_peer(ours=7.0, day=5, note="triton backend; --quick"),
        row(mode="host_fwd", shape="B1 T64 H1 D64", ms=0.025, day=1),
    ]
    page, _ = _report.build(records)
    assert "| chunk_gla | B4 T4096 H64 D128 | bfloat16 | fwd | 2 | 2.5 | 4 | 2 |" in page
    assert "Commit `c2`, 2026-01-02, torch 2, triton 3; peer: toy 1." in page
    assert "| chunk_retention | B4 T4096 H64 D128 | bfloat16" not in page  # another commit's
    assert "| chunk_gla | B1 T64 H1 D64 | host_fwd | ≤ 30 us |  | 25 us | met |" in page  # a table of its own, of c1
    assert "c3" not in page and "c4" not in page and "c5" not in page
    page, _ = _report.build(records, commit="c1")
    assert "| chunk_gla | B4 T4096 H64 D128 | bfloat16 | fwd | 1 | 2.5 | 4 | 4 |" in page
    assert "| chunk_retention | B4 T4096 H64 D128 | bfloat16" in page and "c2" not in page


def test_verdicts():
    key = ("chunk_gla", "B4 T4096 H64 D128", "fwd")
    ratio, floor = (
        next(g for g in GOALS if (g.op, g.shape, g.mode, g.quantity) == (*key, q)) for q in ("ratio", "floor_x")
    )
    assert (ratio.must, ratio.aim, floor.must) == (3.6, 5, 2.6)
    assert ratio.verdict({key: with_peer(peer=3.59)}) == "not met"
    assert ratio.verdict({key: with_peer(peer=3.6)}) == "met"
    assert ratio.verdict({key: with_peer(peer=5.0)}) == "met, and the aim"
    assert ratio.verdict({key: row()}) == ratio.verdict({}) == "no record"
    assert floor.verdict({key: with_peer()}) == "met"
    assert floor.verdict({key: row(floor_x=2.61)}) == "not met"
    work = Goal("memory", *key, "work_x", 0.4)
    assert work.value({key: row(work_mb=0.0, peer_work_mb=100.0)}) == 0.0
    assert work.verdict({key: row(work_mb=41.0, peer_work_mb=100.0)}) == "not met"
    assert work.verdict({key: row(work_mb=41.0)}) == "no record"
    softmax = Goal("softmax", *key, "softmax_x", 15)
    beside = (_goals.SOFTMAX, *key[1:])
    assert softmax.verdict({key: row(), beside: row(_goals.SOFTMAX, ms=15.0)}) == "met"
    assert softmax.verdict({key: row()}) == "no record"
    assert Goal("decode", *key, "bandwidth", 0.8).value({key: row(floor_x=1.25)}) == pytest.approx(0.8)
    assert Goal("host", *key, "us", 30).value({key: row(ms=0.031)}) == pytest.approx(31)
    table = "\n".join(_report.goal_table([ratio, floor], {key: with_peer(peer=3.0)}))
    assert "met: 1, not met: 1, no record: 0; of 2." in table and "| ≥ 3.6x | ≥ 5x | 3x | **not met** |" in table


@pytest.mark.parametrize("family", _report.family_names())
def test_goals_are_of_ops_that_there_are(family):
    goals = families.goals(family)
    forms = [f.__name__ for spec in REGISTRY.values() if spec.family == family for f in spec.forms.values()]
    assert len(set(goals)) == len(goals) and {goal.op for goal in goals} <= set(forms)
    assert {goal.group for goal in goals} <= set(_goals.GROUPS)
    for goal in goals:
        assert _shapes.show(_shapes.parse(goal.shape)) == goal.shape
        better = goal.aim is None or (goal.aim > goal.must) == (goal.quantity in _goals.LARGER_IS_BETTER)
        assert better, goal


def test_goals_name_what_is_measured():
    assert {goal.group for goal in GOALS} == set(_goals.GROUPS)
    assert {goal.quantity for goal in GOALS} == set(_goals.UNITS)
    speed = [goal for goal in GOALS if goal.group == "speed"]
    assert list(dict.fromkeys(goal.shape for goal in speed)) != [] and len(speed) == 66
    assert {goal.shape for goal in speed} == set(_shapes.SHAPES["targets"])
    with_goals, others = _report.op_names("decay")[:4], _report.op_names("decay")[4:]
    assert with_goals == ["chunk_linear_attn", "chunk_retention", "chunk_simple_gla", "chunk_gla"]
    assert "chunk_rwkv6" in others and not {goal.op for goal in GOALS} & set(others)


def test_a_family_without_goals_is_reported_without_targets(monkeypatch):
    """And apart from the others, in tables of its own commit."""
    monkeypatch.setitem(REGISTRY, "scan", SCAN)
    records = [
        with_peer(day=1),
        row("sdpa_cudnn", mode="fwdbwd", day=3),
        row("retnet", "B8 T2048", mode="train", day=3),
    ]
    records += [row("chunk_scan", f"B8 T{t} D4096", day=2) for t in (128, 256)]
    page, pictures = _report.build(records)
    parts = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(parts) == [f"NVIDIA H200{of}" for of in (": family `decay`", ": family `toy_scan`", ": models")]
    decay, scan, models = parts.values()
    assert decay.count("### Targets") == 1 and "### Targets" not in scan and "c3" not in decay + scan
    assert "| chunk_gla | B4 T4096 H64 D128 | bfloat16 | fwd | 1 | 2.5 | 4 | 4 |" in decay and "c2" not in decay
    assert "| T | chunk_scan |" in scan and "| 256 | 1 |" in scan and "gla" not in scan
    assert "| retnet |" in models and "retnet" not in decay + scan
    assert {name.rsplit("-", 1)[0] for name in pictures} == {"benchmarks-h200-decay", "benchmarks-h200-toy_scan"}


def test_command_writes_page_and_pictures(tmp_path, monkeypatch, capsys):
    results, docs = tmp_path / "results", tmp_path / "docs"
    for op in ("chunk_gla", "chunk_retention"):
        for shape in ("B8 T128 H32 D128", "B8 T1024 H32 D128", "B4 T4096 H64 D128"):
            _records.append(results / "h200.jsonl", with_peer(op=op, shape=shape))
    _records.append(results / "h200.jsonl", row("sdpa_cudnn", "B8 T1024 H32 D128", mode="fwdbwd", ms=3.0))
    _records.append(results / "h200.jsonl", row("retnet", "B8 T2048", mode="train", ms=100.0, peak_mb=1000.0))
    (docs).mkdir()
    (docs / "benchmarks-a100-time.png").write_bytes(b"of an earlier report")
    monkeypatch.setattr(ops, "Run", lambda *_: pytest.fail("--report must run nothing"))
    assert ops.main(["--report", "--out", str(results), "--docs", str(docs)]) == 0
    said = capsys.readouterr().out
    names = [f"benchmarks-h200-{what}.png" for what in ("floor", "ratio", "time")]
    assert sorted(path.name for path in docs.glob("*.png")) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10000 for path in docs.glob("*.png"))
    page = (docs / "benchmarks.md").read_text()
    assert all(f"]({name})" in page and f"wrote {name}" in said for name in names)
    assert "| 128 | no record | 1 (4) | no record | 1 (4) | no record | no record |" in page
    assert "| retnet | B8 T2048 | bfloat16 | train | 100 | 163,840 | 1,000 |" in page


def test_a_lone_mode_or_a_line_without_peer_is_drawn(tmp_path):
    records = [row(shape="B8 T128 H32 D128"), row("sdpa_flash", "B8 T128 H32 D128")]
    page, pictures = _report.build(records)
    assert list(pictures) == ["benchmarks-h200-time.png"]
    assert "Peer's time over ours: no record." in page
    pictures["benchmarks-h200-time.png"](tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000
