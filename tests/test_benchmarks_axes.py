"""The benchmarks of ops whose axes are others: no heads, grouped value heads, states of several parts."""

import importlib
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _ours, _plan, _records, _run, _shapes, _targets, _timing, _warming, decode, families, ops, packed
from benchmarks._idle import idle
from benchmarks._peers import Peer
from benchmarks._run import Run
from benchmarks._sides import Sides
from fla.ops._spec import REGISTRY, OpSpec
from tests.test_benchmarks import settings


def naive_scan(x, g, initial_state=None, output_final_state=False):
    """h_t = exp(g_t) h_{t-1} + x_t"""
    h = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        h = g[:, t].exp() * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1), h if output_final_state else None


def naive_grouped(q, k, v, weight, initial_state=None, output_final_state=False):
    """S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t, o_t = weight (q_t^T S_t + q_t . z_t); grouped value heads."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    S, z = initial_state or (q.new_zeros(*v[:, 0].shape[:2], q.shape[-1], v.shape[-1]), torch.zeros_like(q[:, 0]))
    outputs = []
    for t in range(q.shape[1]):
        S, z = S + k[:, t, :, :, None] * v[:, t, :, None, :], z + k[:, t]
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], S) + (q[:, t] * z).sum(-1, keepdim=True)
        outputs.append(weight[:, None] * o)
    return torch.stack(outputs, 1), (S, z) if output_final_state else None


def form(name: str, naive):
    def function(*tensors, initial_state=None, output_final_state=False, cu_seqlens=None, backend=None):
        dtype = tensors[0].dtype
        bounds = [0, tensors[0].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        pieces = [
            naive(*(x[:, a:b] if x.dim() > 1 else x for x in tensors), initial_state, output_final_state)
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat([o for o, _ in pieces], 1).to(dtype), pieces[-1][1]

    parameters = {"scan": "x, g", "grouped": "q, k, v, weight"}[naive.__name__.removeprefix("naive_")]
    rest = "initial_state=None, output_final_state=False, cu_seqlens=None, *, backend=None"
    keywords = "initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens"
    made: dict[str, Any] = {"function": function}
    exec(f"def {name}({parameters}, {rest}): return function({parameters}, {keywords})", made)
    return made[name]


def spec(name: str, shapes: dict[str, str], naive, **fields) -> OpSpec:
    forms = {kind: form(f"{kind}_{name}", naive) for kind in ("chunk", "fused_recurrent")}
    return OpSpec(name=name, family=f"toy_{name}", shapes=shapes, reference=naive, forms=forms, **fields)


SCAN = spec(
    "scan", {"x": "B T D", "g": "B T D", "initial_state": "N D"}, naive_scan,
    inputs=lambda x: x | {"g": F.logsigmoid(x["g"]) / 4}, gates=("g",),
)  # fmt: skip
GROUPED = spec(
    "grouped",
    {"q": "B T H K", "k": "B T H K", "v": "B T HV V", "weight": "HV", "matrix": "N HV K V", "sum": "N HV K"},
    naive_grouped,
)
TINY = "B2 T9 H2 D4"
GROUPED_TINY = "B2 T9 H5 HV10 D4"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(_timing.BANDWIDTH_BYTES, "cpu", 2**20)
    for toy in (SCAN, GROUPED):
        monkeypatch.setitem(REGISTRY, toy.name, toy)


def fitted(op: str, text: str, form: str = "chunk") -> dict[str, int]:
    return _targets.find(op, form).fit(_shapes.parse(text))


def test_an_op_takes_its_axes_from_a_shape():
    assert fitted("gla", "B1 T2 H3 D4") == {"B": 1, "T": 2, "H": 3, "K": 4, "V": 4}
    assert fitted("gla", "B1 T2 H3 HV6 K4 V5 M7") == {"B": 1, "T": 2, "H": 3, "K": 4, "V": 5}
    assert fitted("scan", "B1 T2 H3 D4") == {"B": 1, "T": 2, "D": 12} == fitted("scan", "B1 T2 H3 K9 V4")
    assert fitted("scan", "B1 T2 D4") == {"B": 1, "T": 2, "D": 4}
    assert fitted("grouped", "B1 T2 H3 D4") == {"B": 1, "T": 2, "H": 3, "HV": 3, "K": 4, "V": 4}
    shown = {op: _shapes.show(fitted(op, "B1 T2 H3 HV6 K4 V5")) for op in ("gla", "scan", "grouped")}
    assert shown == {"gla": "B1 T2 H3 K4 V5", "scan": "B1 T2 D15", "grouped": "B1 T2 H3 HV6 K4 V5"}
    assert _shapes.show(fitted("grouped", TINY)) == TINY and _shapes.show(fitted("scan", TINY)) == "B2 T9 D8"
    assert _shapes.show(_shapes.parse("D4 M7 T2 B1 HV6 H3")) == "B1 T2 H3 HV6 D4 M7"
    with pytest.raises(ValueError, match="must give B, T, D of scan, got 'B1 T2' without D"):
        fitted("scan", "B1 T2")
    with pytest.raises(ValueError, match="must name an axis once"):
        _shapes.parse("B1 T2 T3")


def test_an_axis_of_an_op_s_own_has_the_size_that_the_op_declares():
    declared = _shapes.fit(_shapes.parse("B1 T2 H3 D4"), ["B", "T", "M"], {"M": 8, "T": 65}, "slots")
    assert declared == {"B": 1, "T": 2, "M": 8}
    assert _shapes.fit(_shapes.parse("B1 T2 M5"), ["B", "T", "M"], {"M": 8}, "slots")["M"] == 5
    few = _shapes.with_few({"B": 4, "T": 9, "H": 16, "HV": 32, "K": 8}, 1, 5, 4)
    assert few == {"B": 1, "T": 5, "H": 4, "HV": 8, "K": 8}
    assert _shapes.with_few({"B": 4, "T": 9, "D": 8}, 1, 5, 4) == {"B": 1, "T": 5, "D": 8}


def test_rows_of_ops_with_and_without_heads():
    both = {"gla": ["chunk"], "scan": ["chunk"]}
    plan = _plan.jobs(both, [], _shapes.expand(["B1 T8 H2 D4", "B1 T8 H4 D2", "B1 T8 D8 H1"]), ["float32"], 300)
    rows = [(job.op, job.form, job.shape) for job in plan]
    scan = [("scan", "naive", "B1 T8 D8"), ("scan", "chunk", "B1 T8 D8")]  # once: all three shapes have 8 channels
    gla = [[("gla", kind, shape) for kind in kinds] for shape, kinds in (
        ("B1 T8 H2 D4", ["naive", "chunk"]), ("B1 T8 H4 D2", ["naive", "chunk"]), ("B1 T8 H1 D8", ["chunk"])
    )]  # fmt: skip
    assert rows == [*gla[0], *scan, *gla[1], *gla[2]]  # the last has states of 512 elements in all
    assert plan[3].tuning_key == plan[3].compile_key == ("scan", "chunk", "float32", ("D", 8))


@pytest.mark.parametrize(("op", "shape"), [("scan", "B2 T40 D6"), ("grouped", GROUPED_TINY)])
def test_an_op_of_other_axes_is_checked_and_timed(tmp_path, monkeypatch, op, shape):
    job = _plan.jobs({op: ["chunk"]}, [], [_shapes.parse(shape)], ["float32"])[0]
    assert job.shape == shape
    sides = Sides(settings(tmp_path))
    request = sides.request(job, peer=True, scratch=str(tmp_path), bandwidth=1e9)
    reply = _ours.run(request)
    assert reply["status"] == "ok", reply["why"]
    sizes = {name: math.prod(size) for name, size in reply["shapes"].items()}
    assert set(sizes) == {name for name in REGISTRY[op].shapes if name not in ("initial_state", "matrix", "sum")}
    inputs, output = 4 * sum(sizes.values()), 4 * sizes["x" if op == "scan" else "v"]
    floors = {mode: row["floor_s"] * 1e9 for mode, row in reply["rows"].items()}
    assert floors["fwd"] == pytest.approx(inputs + output)
    assert floors["fwdbwd"] == pytest.approx(3 * inputs + 2 * output)
    described = _warming.describe(sides, [job])
    assert "function" not in described and described["all_dims"] == [job.sizes]
    assert _ours.warm(described)["status"] == "ok"

    right = _targets.find(op, "chunk")

    def late(**tensors):  # wrong in the last value of the last checked head and channel
        o, _ = right.call(**tensors)
        return o.index_fill(-1, torch.tensor([o.shape[-1] - 1]), 0.0)

    monkeypatch.setattr(_ours, "find", lambda *_: replace(right, call=late))
    assert _ours.run(request)["why"].startswith("wrong result: o")


def test_heads_that_belong_together_are_cut_together():
    shapes = {"q": "B T H K", "v": "B T HV V", "weight": "HV"}
    tensors = {name: torch.zeros(size) for name, size in (("q", (3, 9, 6, 2)), ("v", (3, 9, 12, 5)), ("weight", (12,)))}
    cut = {name: tuple(x.shape) for name, x in _targets.cut(shapes, tensors, slice(-1, None), slice(2, 5)).items()}
    assert cut == {"q": (1, 3, 4, 2), "v": (1, 3, 8, 5), "weight": (8,)}
    o = torch.arange(3 * 9 * 12 * 5).view(3, 9, 12, 5)
    assert torch.equal(_timing.beginning(o, [1, 3, 8, 5]), o[-1:, :3, :8])
    assert torch.equal(_timing.beginning(o[..., 0], [1, 3, 12]), o[-1:, :3, :, 0])


def test_decoding_and_packing_with_states_of_other_shapes(tmp_path):
    words = ["--device", "cpu", "--op", "scan", "grouped", "--seconds", "0.01"]
    assert decode.main([*words, "--out", str(tmp_path / "decode"), "--wide", "B2 T1 H2 HV4 D4"]) == 0
    assert packed.main([*words, "--out", str(tmp_path / "packed"), "--shape", "B1 T24 H2 D4", "--sequences", "4"]) == 0
    decoded = _records.read(tmp_path / "decode" / "cpu.jsonl")
    scan = [("fused_recurrent_scan", "B2 T1 D8"), ("fused_recurrent_scan", "B1 T1 D32")]
    grouped = [("fused_recurrent_grouped", "B2 T1 H2 HV4 D4"), ("fused_recurrent_grouped", "B1 T1 H2 D16")]
    assert [(r["op"], r["shape"]) for r in decoded] == [*scan, *grouped] and all(r["ms"] for r in decoded)
    rows = _records.read(tmp_path / "packed" / "cpu.jsonl")
    assert [r["shape"] for r in rows] == ["B1 T24 D8"] * 4 + ["B1 T24 H2 D4"] * 4 and all(r["ms"] for r in rows)


def test_an_op_without_a_peer_says_so(tmp_path, monkeypatch, capsys):
    def ask(self, request):
        names = {"gpu": "cpu", "machine": "", "torch": "2", "triton": None, "bandwidth": 1e9}
        assert not request.get("peer")
        return {"status": "ok", "why": "", "rows": {"fwd": {"ms": 1.0}}} | (names if request["do"] == "info" else {})

    monkeypatch.setattr(Run, "_ask_ours", ask)
    run = Run(
        settings(tmp_path, modes=("fwd",)), _plan.jobs({"scan": ["chunk"]}, [], [_shapes.parse(TINY)], ["float32"])
    )
    run.sides.peer_name = "toy 1"
    monkeypatch.setattr(Sides, "start_peer", lambda self: SimpleNamespace(close=lambda: None))
    assert run.run() == 0
    note = "peer: no function is declared for scan in PEERS of benchmarks/families/toy_scan.py"
    assert note in run.rows[0]["note"] and note in capsys.readouterr().out
    assert _warming.warm_up(run.sides, run.jobs) == {}
    assert families.goals("toy_scan") == () and families.peer("scan") is None
    assert families.peer("gla") == Peer("fla.ops.gla")


def test_what_the_peer_calls_otherwise():
    peer = Peer("fla.ops.hgrn", {"chunk_scan": "chunk_hgrn"}, {"g": "decay"}, {"normalize": None, "mode": 1})
    told = peer.call("chunk_scan", {"normalize": False, "g": 2})
    assert told["module"] == "fla.ops.hgrn" and told["function"] == "chunk_hgrn"
    assert told["settings"] == {"decay": 2, "mode": 1} and told["arguments"] == {"g": "decay"}
    assert peer.call("fused_recurrent_scan", {})["function"] == "fused_recurrent_scan"


def test_the_peer_s_process_maps_functions_and_arguments(tmp_path, monkeypatch):
    """As data of the request: nothing in that process knows an op."""
    (tmp_path / "toy_module.py").write_text("def other(decay, x, mode): return decay + mode * x\n")
    for folder in (tmp_path, Path(_run.__file__).parent):  # as where it runs as a file
        monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    try:
        process = importlib.import_module("_peer")
        request = {"module": "toy_module", "function": "other", "arguments": {"g": "decay"}, "settings": {"mode": 2}}
        assert process._function(request)(g=3, x=4) == 11
        with pytest.raises(AttributeError, match=r"the peer has no toy_module\.none"):
            process._function(request | {"function": "none"})
    finally:
        for name in ("_peer", "_timing", "_worker", "toy_module"):
            assert name not in before
            sys.modules.pop(name, None)


def test_beside_the_naive_loop(tmp_path, monkeypatch, capsys):
    """`--against naive`: the op and its naive loop on a CPU, without any other row."""
    handlers = {"info": _ours.info, "run": _ours.run}
    monkeypatch.setattr(Run, "_ask_ours", lambda self, request: handlers[request["do"]](request))
    words = ["--op", "gla", "scan", "--device", "cpu", "--against", "naive", "--quick", "--out", str(tmp_path)]
    assert ops.main([*words, "--shapes", "B1 T40 H2 D4", "--commit", "abc"]) == 0
    rows = {(r["op"], r["mode"]): r for r in _records.read(tmp_path / "cpu.jsonl")}
    names = ["naive_gla", "chunk_gla", "naive_scan", "chunk_scan"]
    assert list(rows) == [(name, mode) for name in names for mode in ("fwd", "fwdbwd")]
    said = capsys.readouterr().out
    for op, shape in (("gla", "B1 T40 H2 D4"), ("scan", "B1 T40 D8")):
        for mode in ("fwd", "fwdbwd"):
            ours, naive = rows[f"chunk_{op}", mode], rows[f"naive_{op}", mode]
            line = next(x for x in said.splitlines() if x.startswith(f"chunk_{op} {shape} float32 {mode}: "))
            assert f"{ours['ms']:.4g} ms, the naive loop {naive['ms']:.4g} ms: " in line
            assert float(line.split()[-4]) == pytest.approx(naive["ms"] / ours["ms"], rel=1e-2)
            assert ours["shape"] == shape and "x the speed of the naive loop" in ours["note"]


class Before(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    gv: Tensor | None
    initial_state: Tensor | None
    final: bool = False


class After(NamedTuple):
    problem: Any
    tensors: tuple = ()


def test_an_idle_backend_serves_both_shapes_of_a_backend(monkeypatch):
    x = torch.zeros(1, 4, 2, 3)
    common = {"state_shape": (1, 2, 3, 3), "state_dtype": torch.float32}
    problem = SimpleNamespace(q=x, k=x, v=x, g=None, gk=x, gv=None, initial_state=None, **common)
    before = SimpleNamespace(forward=lambda problem, output_final_state: 1, backward=lambda *_: 2)
    monkeypatch.setitem(sys.modules, "fla.backends.torch.toy_before", before)
    monkeypatch.setitem(sys.modules, "fla.backends.toy_before", SimpleNamespace(Gradients=Before))
    with idle("toy_before"):
        o, state = before.forward(problem, True)
        assert o.shape == x.shape and state.shape == (1, 2, 3, 3) and before.forward(problem, False)[1] is None
        found = before.backward(problem, o, None, True)
        assert found.final and found.gk.shape == x.shape and found.g is None
    assert before.forward(problem, True) == 1 and before.backward() == 2

    problem = SimpleNamespace(first="x", x=x[..., 0], output_shape=(1, 4, 5), output_dtype=torch.float64, **common)
    now = SimpleNamespace(forward=lambda problem, output_final_state, keep: 1, backward=lambda *_: 2)
    monkeypatch.setitem(sys.modules, "fla.backends.torch.toy_now", now)
    monkeypatch.setitem(sys.modules, "fla.backends._recurrence", SimpleNamespace(Saved=After))
    with idle("toy_now"):
        o, state, saved = now.forward(problem, False, True)
        assert (tuple(o.shape), o.dtype, state, saved.problem) == ((1, 4, 5), torch.float64, None, problem)
        assert now.forward(problem, True, False)[2] is None
        found = now.backward(problem, (), o, None, ("x",))
        assert list(found) == ["x"] and found["x"].shape == (1, 4, 2)
    assert now.forward(problem, True, True) == 1
