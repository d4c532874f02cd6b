"""The benchmark command on tiny CPU shapes, with a toy peer; the records; and that a wrong result gets no number."""

import json
import os
import sys
import tarfile
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from benchmarks import _ours, _plan, _records, _run, _shapes, _targets, _timing, _warming, ops
from benchmarks._run import Run
from benchmarks._sides import Settings, Sides
from benchmarks._worker import Worker, WorkerError, WorkerTimeout
from fla.ops._spec import REGISTRY
from tests.test_architecture import imports

TINY = "B2 T96 H2 D16"
PEER = """
print("chatter on stdout at import")
import torch
from fla.ops.common import chunk_o


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    if q.requires_grad and not chunk_o.TRITON_ABOVE_3_7_1:
        raise RuntimeError("refused on this Triton")
    state, outputs = 0.0, []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, :, None].exp() + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, state))
    return torch.stack(outputs, 1), None


def chunk_linear_attn(q, k, v, normalize=True):
    assert normalize is False, "the settings of the row must arrive"
    if q.requires_grad:
        raise NotImplementedError("no gradient here")
    return (torch.einsum("bihk,bjhk->bhij", q, k).tril() @ v.transpose(1, 2)).transpose(1, 2), None
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> Path:
    """A package called `fla` with one right op, and one that is wrong (no scale) and has no gradient."""
    folder = tmp_path_factory.mktemp("peer")
    for name, text in {
        "fla/__init__.py": "",
        "fla/ops/__init__.py": "",
        "fla/ops/common/__init__.py": "",
        "fla/ops/common/chunk_o.py": "TRITON_ABOVE_3_7_1 = False",
        "fla/ops/gla.py": PEER,
        "fla/ops/linear_attn.py": PEER,
        "toy_peer-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-peer\nVersion: 9.9\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Shared:
    """A worker that several runs ask: to start a process takes longer than all that it is asked here."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.ask, self.starts = worker, worker.ask, 0

    def started(self) -> "Shared":
        self.starts += 1
        return self

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def processes(peer, tmp_path_factory, one_thread):
    """A process of ours and one of the peer's, which start side by side."""
    folder = tmp_path_factory.mktemp("processes")
    sides = Sides(settings(folder, peer=peer), str(folder))
    ours, theirs = Shared(sides.start_ours()), Shared(sides.start_peer())
    yield ours, theirs
    ours.worker.close()
    theirs.worker.close()


@pytest.fixture
def both(processes, monkeypatch):
    ours, theirs = processes
    monkeypatch.setattr(Sides, "start_ours", lambda self, env=None: ours.started())
    monkeypatch.setattr(Sides, "start_peer", lambda self: theirs.started())
    ours.starts = theirs.starts = 0
    return processes


def settings(tmp_path, **changes) -> Settings:
    usual = Settings(
        device="cpu", modes=("fwd", "fwdbwd"), backend=None, seed=0, budget=(0.01, 3), quick=True, out=tmp_path / "out",
        commit="abc", time_limit=float("inf"), first_call=False, peer=None, peer_jobs=1, peer_warm_limit=60.0,
    )  # fmt: skip
    return replace(usual, **changes)


def test_command_writes_a_record_for_every_row(tmp_path, peer, both, capsys):
    out = tmp_path / "out"
    words = ["--op", "gla", "linear_attn", "--shapes", TINY, "--quick", "--commit", "abc", "--first-call"]
    assert ops.main([*words, "--device", "cpu", "--peer", str(peer), "--out", str(out)]) == 0
    rows = {(r["op"], r["mode"]): r for r in _records.read(out / "cpu.jsonl")}
    names = ["naive_gla", "chunk_gla", "naive_linear_attn", "chunk_linear_attn", "sdpa"]
    assert list(rows) == [(name, mode) for name in names for mode in ("fwd", "fwdbwd")]
    printed = capsys.readouterr().out
    for (name, mode), row in rows.items():
        assert tuple(row) == _records.FIELDS
        assert row["ms"] > 0 and row["shape"] == TINY and row["dtype"] == "float32" and row["commit"] == "abc"
        assert (row["gpu"], row["torch"], row["peak_mb"]) == ("cpu", torch.__version__, None)
        assert any(line.startswith(name) and f" {mode} " in line for line in printed.splitlines())
    assert printed.count("  seconds: inputs ") == len(names) and printed.count(", peer ") == 2
    ours = rows["chunk_gla", "fwdbwd"]
    assert ours["floor_x"] > 0 and ours["first_call_s"] > 0
    assert ours["peer"] == "toy-peer 9.9" and ours["ratio"] == pytest.approx(ours["peer_ms"] / ours["ms"], rel=1e-2)
    assert "x the speed of the naive loop" in ours["note"] and "torch backend" in ours["note"]
    assert "differs" not in ours["note"] and "peer's Triton guard lifted" in ours["note"]
    linear = rows["chunk_linear_attn", "fwd"], rows["chunk_linear_attn", "fwdbwd"]
    assert all("normalize=False" in row["note"] for row in linear)
    assert linear[0]["peer_ms"] > 0 and "peer's output differs from the reference" in linear[0]["note"]
    assert linear[1]["peer_ms"] is None and linear[1]["peer"] is None and "no gradient here" in linear[1]["note"]
    assert [side.starts for side in both] == [
        3,
        2,
    ]  # the first calls are in processes of their own, and meeting the peer
    assert rows["naive_gla", "fwd"]["peer_ms"] is None and rows["sdpa", "fwd"]["floor_x"] is None


def test_peer_is_warmed_for_every_head_size(tmp_path, peer, both, monkeypatch, capsys):
    shapes = _shapes.expand([TINY, "B1 T40 H2 D16", "B1 T40 H1 D16"])
    plan = _plan.jobs({"gla": ["chunk"]}, [], shapes, ["float32"])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "A").mkdir(parents=True)
    (tmp_path / "cache" / "A" / "kernel.autotune.json").write_text("{}")
    sides = Sides(settings(tmp_path, peer=peer, save_peer_cache=tmp_path / "tuned.tgz", peer_jobs=1), str(tmp_path))
    assert sides.meet_peer() == ""
    warm = _warming.warm_up(sides, plan)
    assert sides.peer_name == "toy-peer 9.9" and sides.guard_lifted
    assert sorted(dict(key[3:])["H"] for key in warm) == [1, 2]
    assert all(seconds > 0 for seconds in warm.values())
    with tarfile.open(tmp_path / "tuned.tgz") as archive:
        assert archive.getnames() == ["A/kernel.autotune.json"]
    assert "1 tuning results saved in tuned.tgz" in capsys.readouterr().out


def test_warming_alone_after_running_out_of_memory(tmp_path, monkeypatch):
    asked = []

    class Full:
        def ask(self, request, timeout):
            asked.append((request["op"], len(request["all_dims"])))
            out = request["op"] == "gla" and asked.count(asked[-1]) == 1
            return {"status": "failed", "why": "OutOfMemoryError: no"} if out else {"status": "ok", "seconds": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(Sides, "start_peer", lambda self: Full())
    ops_ = {"gla": ["chunk"], "retention": ["chunk"]}
    sides = Sides(settings(tmp_path))
    sides.peer_name = "full 1.0"
    warm = _warming.warm_up(sides, _plan.jobs(ops_, [], _shapes.expand([TINY, "B1 T4 H2 D16"]), ["float32"]))
    assert sorted(key[0] for key in warm) == ["gla", "retention"]
    assert sorted(asked) == [("gla", 2), ("gla", 2), ("retention", 2)]


def test_wrong_op_gets_no_number(monkeypatch, tmp_path):
    right = _targets.find("gla", "chunk")
    job = _plan.jobs({"gla": ["chunk"]}, [], [_shapes.parse("B2 T20 H2 D4")], ["float32"])[0]
    request = Sides(settings(tmp_path)).request(job, peer=False, scratch=str(tmp_path), bandwidth=1e9)
    assert set(_ours.run(request)["rows"]) == {"fwd", "fwdbwd"}

    def detached(q, k, v, g):  # right values, wrong gradient
        return right.call(q=q, k=k.detach() + 0 * k, v=v, g=g)

    def late(q, k, v, g):  # right on the checked beginning, wrong in the last row of the full size
        o, _ = right.call(q=q, k=k, v=v, g=g)
        return torch.cat((o[:-1], o[-1:] * 1.01)) if len(o) > 1 else o

    for call, where in ((detached, "dk"), (late, "o at full size"), (lambda **x: right.call(**x)[0] * 2, "o:")):
        changed = replace(right, call=call)
        monkeypatch.setattr(_ours, "find", lambda *_, changed=changed: changed)
        reply = _ours.run(request)
        assert reply["status"] == "failed" and not reply["rows"] and reply["why"].startswith(f"wrong result: {where}")


def test_failures_reach_the_record_and_the_exit_code(monkeypatch, tmp_path, capsys):
    replies = {"gla": ("failed", "wrong result: o"), "retention": ("unsupported", "K too large; use backend='torch'")}

    def ask(self, request):
        if request["do"] == "info":
            names = {"gpu": "NVIDIA H200", "machine": "", "torch": "2", "triton": "3"}
            return {"status": "ok", "bandwidth": 4e12, **names}
        status, why = replies[request["op"]]
        return {"status": status, "why": why, "rows": {}}

    monkeypatch.setattr(Run, "_ask_ours", ask)
    plan = _plan.jobs({"gla": ["chunk"], "retention": ["chunk"]}, [], [_shapes.parse(TINY)], ["bfloat16"])
    assert Run(settings(tmp_path, modes=("fwd",), device="cuda"), plan).run() == 1
    failed, unsupported = _records.read(tmp_path / "out" / "h200.jsonl")
    assert failed["ms"] is None and "FAILED: wrong result" in failed["note"]
    assert unsupported["ms"] is None and "not run: K too large" in unsupported["note"]
    assert "FAILED: 1" in capsys.readouterr().out
    assert _records.latest([failed, unsupported]) == []


def test_time_limit_stops_cleanly(tmp_path, capsys):
    assert ops.main(["--shapes", TINY, "--device", "cpu", "--time-limit", "0", "--out", str(tmp_path)]) == 1
    assert "--time-limit reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "glaa"], "--op must be among"),
        (["--op", "gla", "--form", "parallel"], "--form of gla must be among"),
        (["--form", "chunky"], "--form names none"),
        (["--op", "gla", "--shapes", "B1 T2"], "--shapes must give B, T, H, K, V of"),
        (["--shapes", "B1 T0 H1 D4"], "--shapes takes targets, peer, seed"),
        (["--shapes", "B1 B2 T1 H1 D4"], "--shapes must name an axis once"),
        (["--peer", "nowhere"], "--peer must be a folder"),
        (["--against", "x"], "--against needs --base"),
        (["--base", "nowhere"], "records must be a .jsonl file or a folder"),
        (["--save-peer-cache", "x.tgz"], "need --peer"),
    ],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        ops.main(["--device", "cpu", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_records(tmp_path):
    path = tmp_path / "a" / "h200.jsonl"
    made = [
        _records.record(gpu="NVIDIA H200", op="chunk_gla", shape=TINY, dtype="bfloat16", mode="fwd", ms=ms)
        for ms in (1.23456, 2.0, None)
    ]
    for fields in made:
        _records.append(path, fields)
    assert _records.read(path) == made and made[0]["ms"] == 1.235 and made[0]["peer"] is None
    assert _records.read(path, ms=2.0) == [made[1]] == _records.latest(made)
    peered = made[0] | {"peer_ms": 2.0, "commit": "a"}
    assert _records.latest([peered, made[1] | {"commit": "a"}]) == [peered]  # the later one knows less
    assert _records.latest([peered, made[1] | {"commit": "b"}]) == [made[1] | {"commit": "b"}]
    assert "chunk_gla" in _records.table(made) and "2" in _records.line(made[1])
    assert _records.slug("NVIDIA H200") == "h200" and _records.slug("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"a record has the fields .* got speed"):
        _records.record(speed=1)
    with path.open("a") as file:
        file.write(json.dumps({"op": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"h200\.jsonl line 4 must have exactly the fields"):
        _records.read(path)


def test_plan_puts_what_was_asked_for_first():
    shapes = _shapes.expand(["peer", "B1 T8192 H96 D128"])
    assert [_shapes.show(s) for s in shapes] == _shapes.SHAPES["peer"]
    ops_ = {"gla": ["chunk"], "retention": ["chunk"]}
    plan = _plan.jobs(ops_, ["sdpa_flash"], shapes, ["bfloat16"], _plan.NAIVE_ELEMENTS)
    assert [job.op for job in plan[:4]] == ["gla", "retention", "gla", "retention"]
    assert not any(job.form == "naive" for job in plan)  # the loop would take minutes there
    assert [job.shape for job in plan] == [text for text in _shapes.SHAPES["peer"] for _ in "12"] + _shapes.SHAPES[
        "peer"
    ]
    assert {job.op for job in plan[-6:]} == {"sdpa_flash"}
    softmax = _plan.jobs({}, ["sdpa_flash"], _shapes.expand(["targets", "seed"]), ["bfloat16"])
    assert softmax[0].shape == "B8 T16384 H32 D128" and softmax[8].shape == "B4 T4096 H64 D128"  # the report's first


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_every_form_of_every_op_is_a_target(op):
    for form in REGISTRY[op].forms:
        target = _targets.find(op, form)
        shapes = _shapes.sizes(target.shapes, target.fit(_shapes.parse("B1 T5 H2 K4 V6")))
        tensors = target.inputs(_timing.noise(shapes, torch.float32, "cpu", 0))
        tensors = {name: tensors[name] for name in shapes}
        o = _timing.first_output(target.call(**tensors))
        assert o.shape[:2] == (1, 5)
        torch.testing.assert_close(o, target.reference(**tensors), rtol=1e-4, atol=1e-5)


def test_softmax_is_held_to_its_formula():
    target = _targets.find("sdpa", "")
    x = _timing.noise({name: [2, 9, 3, 4] for name in "qkv"}, torch.float64, "cpu", 0)
    torch.testing.assert_close(target.call(**x), target.reference(**x))


def test_timing():
    x = _timing.noise({"q": [1, 4, 2, 8], "g": [1, 4, 2, 8]}, torch.float32, "cpu", 7)
    again = _timing.noise({"g": [1, 4, 2, 8]}, torch.float32, "cpu", 7)
    assert torch.equal(x["g"], again["g"]) and not torch.equal(x["g"], x["q"])
    size = x["q"].numel() * 4
    assert _timing.floor_bytes({**x, "k": x["q"], "v": x["q"]}, x["q"], "fwd") == 5 * size
    assert _timing.floor_bytes({**x, "k": x["q"], "v": x["q"]}, x["q"], "fwdbwd") == 14 * size
    dq, dg = _timing.make_call(lambda q, g: (q * g, None), x, "fwdbwd")()
    torch.testing.assert_close(dq * x["q"], dg * x["g"])
    assert not _timing.make_call(lambda q, g: q * g, x, "fwd")().requires_grad
    runs = []
    row = _timing.measure(lambda: runs.append(1), "cpu", _timing.Budget(10.0, 7))
    assert len(runs) == 8 and row["runs"] == 7 and row["peak_mb"] is None


def test_no_module_of_the_benchmarks_is_imported_in_a_circle():
    """Nor for its types alone."""
    folder = Path(_run.__file__).parent
    graph = {}
    for path in folder.rglob("*.py"):
        names = [*path.relative_to(folder.parent).with_suffix("").parts]
        module = ".".join(names[:-1] if names[-1] == "__init__" else names)
        graph[module] = imports(path) - {"benchmarks", module}
    assert len(graph) > 20
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_workers_that_hang_or_die(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {os.path.dirname(_run.__file__)!r})\n"
        "from _worker import serve\n"
        "def hang(request): time.sleep(60)\n"
        "def die(request): sys.stderr.write('last words\\n'); sys.stderr.flush(); os._exit(3)\n"
        "def echo(request): print('noise'); return request\n"
        "handlers = {'hang': hang, 'die': die, 'echo': echo, 'broken': lambda request: 1 / 0}\n"
        "serve(handlers, setup=lambda: print('before'))\n"
    )
    worker = Worker([sys.executable, str(script)], str(tmp_path))
    assert worker.ask({"do": "echo", "x": 1}, 30) == {"do": "echo", "x": 1}
    assert worker.ask({"do": "broken"}, 30) == {"status": "failed", "why": "ZeroDivisionError: division by zero"}
    with pytest.raises(WorkerTimeout, match="no answer within 0 s"):
        worker.ask({"do": "hang"}, 0.1)
    assert worker.process.poll() is not None
    worker = Worker([sys.executable, str(script)], str(tmp_path))
    with pytest.raises(WorkerError, match="code 3: last words"):
        worker.ask({"do": "die"}, 30)
    worker.close()
