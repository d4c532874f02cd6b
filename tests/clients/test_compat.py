"""`fla.compat.provide`: a package that is not installed, by functions of ours, for programs that look for it."""

import importlib
import importlib.util
import inspect
import itertools
import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import import_utils

import fla.compat
from fla.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tests.clients.providing import modeling, provided

PARAMETERS = {  # the installed package's, in order
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
}


@pytest.fixture
def package():
    with provided("causal_conv1d") as module:
        yield module


def test_it_looks_like_a_package(package):
    assert importlib.import_module("causal_conv1d") is package is fla.compat.provide("causal_conv1d")
    assert importlib.util.find_spec("causal_conv1d").name == "causal_conv1d"
    available, version = import_utils._is_package_available("causal_conv1d", return_version=True)
    assert available and import_utils.version.parse(version) >= import_utils.version.parse("1.4.0")
    with pytest.raises(ModuleNotFoundError, match=r"causal_conv1d\.nope"):
        importlib.import_module("causal_conv1d.nope")
    for name, parameters in PARAMETERS.items():
        found = inspect.signature(getattr(package, name)).parameters.values()
        named = [x.name for x in found if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert named == parameters.split()


@pytest.mark.parametrize("name", ["mamba_scan", "causal-conv1d", "causal_conv1d.nope", ""])
def test_other_names(name):
    with pytest.raises(ValueError, match="name must be one of 'causal_conv1d'"):
        fla.compat.provide(name)


def test_an_installed_package_stays(monkeypatch, tmp_path, caplog):
    (tmp_path / "causal_conv1d.py").write_text("installed = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    with caplog.at_level(logging.INFO, "fla"):
        found = fla.compat.provide("causal_conv1d")
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    assert found.installed and "causal_conv1d is installed" in caplog.text


def test_a_broken_package_says_so(monkeypatch, tmp_path):
    (tmp_path / "causal_conv1d.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    with pytest.raises(ImportError, match="undefined symbol"):
        fla.compat.provide("causal_conv1d")


def test_too_late(monkeypatch):
    """A model that was imported before keeps its own convolution."""
    with provided("causal_conv1d"):
        del sys.modules["causal_conv1d"]
        modeling("lfm2")
        with pytest.warns(UserWarning, match="too late for models .* already: lfm2$"):
            fla.compat.provide("causal_conv1d")


def test_packages_with_submodules(monkeypatch):
    """As mamba_ssm, whose functions lie in `mamba_ssm.ops.triton.ssd_combined` and its neighbours."""

    def scan(x):
        return x

    source = ModuleType("fla.compat.mamba_toy")
    source.VERSION, source.MODULES = "2.0.4", {"mamba_toy": (), "mamba_toy.ops": (), "mamba_toy.ops.scan": (scan,)}
    monkeypatch.setitem(sys.modules, source.__name__, source)
    monkeypatch.setattr("pkgutil.iter_modules", lambda path: [source_info(x) for x in ("causal_conv1d", "mamba_toy")])
    package = fla.compat.provide("mamba_toy")
    try:
        assert importlib.import_module("mamba_toy.ops.scan").scan is scan is package.ops.scan.scan
        assert package.__version__ == "2.0.4"
    finally:
        for name in source.MODULES:
            del sys.modules[name]


def source_info(name):
    return type("Info", (), {"name": name})


# ---- the functions


def by_definition(x, weight, bias, activation, before=None):
    """One row [D, T] after `before` [D, W - 1], in float64."""
    W = weight.shape[1]
    before = x.new_zeros(len(x), W - 1) if before is None else before
    row = F.pad(torch.cat((before, x), 1).double(), (0, 1))  # one more, since a convolution of no window raises
    y = F.conv1d(row[None], weight.double()[:, None], None if bias is None else bias.double(), groups=len(x))[0, :, :-1]
    return F.silu(y) if activation else y


def close(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype))


@pytest.mark.parametrize(
    "width, activation, with_bias, channels_last",
    [(2, None, False, True), (3, "silu", True, False), (4, "swish", False, True), (7, "silu", True, True)],
)
def test_rows_with_states(width, activation, with_bias, channels_last):
    x = torch.randn(2, 9, 5).transpose(1, 2) if channels_last else torch.randn(2, 5, 9)
    weight, bias = torch.randn(5, width), torch.randn(5) if with_bias else None
    before = torch.randn(2, 5, width - 1)
    y = causal_conv1d_fn(x, weight, bias, activation=activation)
    assert y.shape == x.shape
    for row in range(2):
        close(y[row], by_definition(x[row], weight, bias, activation))
    for T in (9, 1):  # longer and shorter than the state
        y, last = causal_conv1d_fn(x[..., :T], weight, bias, None, before, True, None, activation)
        close(last, torch.cat((before, x[..., :T]), 2)[..., T:])
        for row in range(2):
            close(y[row], by_definition(x[row, :, :T], weight, bias, activation, before[row]))
    out = torch.empty(2, 5, width - 1)
    again = causal_conv1d_fn(x, weight, bias, None, before, True, out, activation)[1]
    assert again is out and torch.equal(out, torch.cat((before, x), 2)[..., 9:])


@pytest.mark.parametrize("by", ["seq_idx", "cu_seq_lens_q", "both"])
def test_packed_rows(by):
    """Outputs and all gradients are those of the sequences alone."""
    lengths, ids = (3, 1, 6), [4, 4, 4, 0, 7, 7, 7, 7, 7, 7]
    x, weight, bias = torch.randn(1, 5, 10), torch.randn(5, 4), torch.randn(5)
    given = {"seq_idx": torch.tensor([ids], dtype=torch.int32), "cu_seq_lens_q": torch.tensor([0, 3, 4, 10])}
    given = given if by == "both" else {by: given[by]}
    leaves = [z.clone().requires_grad_() for z in (x, weight, bias)]
    y = causal_conv1d_fn(*leaves, activation="silu", **given)
    others = [z.clone().requires_grad_() for z in (x, weight, bias)]
    rows = [causal_conv1d_fn(part, *others[1:], activation="silu") for part in others[0].split(lengths, 2)]
    alone, do = torch.cat(rows, 2), torch.randn_like(y)
    close(y, alone)
    for a, b in zip(torch.autograd.grad(y, leaves, do), torch.autograd.grad(alone, others, do), strict=True):
        close(a, b)


def test_packed_rows_with_states():
    x, weight, bounds = torch.randn(1, 5, 10), torch.randn(5, 4), torch.tensor([0, 3, 3, 10])
    before = torch.randn(3, 5, 3)
    y, last = causal_conv1d_fn(x, weight, initial_states=before, return_final_states=True, cu_seq_lens_q=bounds)
    for n, part in enumerate(x[0].split((3, 0, 7), 1)):
        close(y[0, :, bounds[n] : bounds[n + 1]], by_definition(part, weight, None, None, before[n]))
        close(last[n], torch.cat((before[n], part), 1)[:, part.shape[1] :])


EVERY_WAY = [*itertools.product((3, 4, 6), (0, 2), (False, True), (False,)), (4, 1, True, True), (6, 2, False, True)]


@pytest.mark.parametrize("columns, tokens, ring, pool", EVERY_WAY)
def test_update(columns, tokens, ring, pool):
    """States of several sizes; tokens in a row or (0) none but one; rings; rows of a pool, one of them skipped."""
    weight, bias, T = torch.randn(5, 4), torch.randn(5), max(tokens, 1)
    past = torch.randn(3, 5, columns)
    x = torch.randn(3, 5, T) if tokens else torch.randn(3, 5)
    seen = torch.tensor([0, 5, columns], dtype=torch.int32)
    state = past.clone()
    if ring:  # the next token's column holds the oldest input
        state = torch.stack([past[n].roll(int(seen[n]), 1) for n in range(3)])
    indices = torch.tensor([4, -1, 0], dtype=torch.int32) if pool else None
    rows, untouched = state, None
    if pool:
        state = torch.randn(6, 5, columns)
        state[[4, 0]] = rows[[0, 2]]
        untouched = state.clone()
    y = causal_conv1d_update(x, state, weight, bias, "silu", seen if ring else None, indices)
    assert y.shape == x.shape and y.dtype == x.dtype
    for n in (0, 2) if pool else range(3):
        new, got = x[n].view(5, T), state[int(indices[n])] if pool else state[n]
        close(y[n].view(5, T), by_definition(new, weight, bias, "silu", past[n, :, -3:]))
        got = got.roll(-int(seen[n]) - T, 1) if ring else got
        close(got, torch.cat((past[n], new), 1)[:, -columns:])
    if pool:
        assert not y[1].any() and torch.equal(state[[1, 2, 3, 5]], untouched[[1, 2, 3, 5]])


def test_update_continues_and_has_gradients():
    x, weight, state = torch.randn(2, 5, 7), torch.randn(5, 4), torch.zeros(2, 5, 4)
    steps = [causal_conv1d_update(x[..., t : t + 1], state, weight, None, "silu") for t in range(7)]
    close(torch.cat(steps, 2), causal_conv1d_fn(x, weight, activation="silu"))
    leaf, before = x[..., :1].clone().requires_grad_(), state.clone()
    y = causal_conv1d_update(leaf, state, weight)
    close(torch.autograd.grad(y.sum(), leaf)[0], weight[:, -1:].expand(2, 5, 1))
    assert not state.requires_grad and torch.equal(state[..., :-1], before[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    """Sums in float32, and a weight of another dtype than `x`, as in models that keep convolutions in float32."""
    x, weight = torch.randn(1, 5, 9).to(dtype), torch.randn(5, 4)
    y = causal_conv1d_fn(x, weight, activation="silu")
    assert y.dtype == dtype and torch.equal(y[0], by_definition(x[0].float(), weight, None, "silu").to(dtype))


X, WEIGHT, STATE = torch.randn(1, 5, 9), torch.randn(5, 4), torch.randn(1, 5, 4)
BAD = {
    "x must": lambda: causal_conv1d_fn(X[0], WEIGHT),
    "weight must": lambda: causal_conv1d_fn(X, WEIGHT[:, None]),
    "weight must have": lambda: causal_conv1d_fn(X.transpose(1, 2), WEIGHT),
    "activation must be": lambda: causal_conv1d_fn(X, WEIGHT, activation="gelu"),
    "seq_idx must be": lambda: causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(1, 8, dtype=torch.int32)),
    "cu_seq": lambda: causal_conv1d_fn(X, WEIGHT, cu_seq_lens_q=torch.tensor([0, 8])),
    "seq_idx and cu_seq_lens_q must agree": lambda: causal_conv1d_fn(
        X, WEIGHT, seq_idx=torch.zeros(1, 9, dtype=torch.int32), cu_seq_lens_q=torch.tensor([0, 4, 9])
    ),
    "initial_states must have 3 columns": lambda: causal_conv1d_fn(X, WEIGHT, initial_states=STATE),
    "final_states_out can": lambda: causal_conv1d_fn(X, WEIGHT, final_states_out=STATE),
    "final_states_out must have shape": lambda: causal_conv1d_fn(
        X, WEIGHT, return_final_states=True, final_states_out=STATE
    ),
    "conv_state must be": lambda: causal_conv1d_update(X, None, WEIGHT),
    "conv_state must have at least 3": lambda: causal_conv1d_update(X, STATE[..., :2], WEIGHT),
    "conv_state must have 1 rows": lambda: causal_conv1d_update(X, STATE.expand(2, 5, 4), WEIGHT),
    "cache_seqlens must be": lambda: causal_conv1d_update(X, STATE, WEIGHT, cache_seqlens=torch.zeros(1)),
    "conv_state_indices must be a tensor": lambda: causal_conv1d_update(X, STATE, WEIGHT, conv_state_indices=[0]),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_calls(said):
    with pytest.raises((TypeError, ValueError), match=said):
        BAD[said]()
