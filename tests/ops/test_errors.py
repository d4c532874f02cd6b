"""What the contract's bad calls (`fla.testing.errors`) do not cover: choosing a backend, and single ops' own rules."""

import pytest
import torch

import fla
from fla.backends import interpreting
from fla.ops import chunk_gla, chunk_linear_attn, parallel_retention, parallel_simple_gla
from fla.ops._spec import REGISTRY
from fla.shapes import merge_cu_seqlens
from fla.testing import TORCH, make_inputs, plain_cases
from fla.testing.errors import good_call
from tests.ops.suite import every_op


@pytest.fixture
def inputs():
    x = make_inputs(REGISTRY["linear_attn"], {"T": 5})
    return {name: x[name] for name in ("q", "k", "v")}


@pytest.mark.parametrize("case", every_op(lambda spec: plain_cases(spec, TORCH, tokens=5), TORCH), ids=str)
def test_triton_refuses_cpu_tensors(case):
    """A named backend that cannot run raises; nothing falls back."""
    assert not interpreting()
    keywords = good_call(case) | {"backend": "triton"}
    with pytest.raises(
        ValueError, match=r"backend='triton' needs GPU tensors, got a tensor on cpu; use backend='torch'"
    ):
        case.function(**keywords)
    del keywords["backend"]
    with pytest.raises(ValueError, match=r"needs GPU tensors"), fla.use_backend("triton"):
        case.function(**keywords)
    with fla.use_backend("triton"), fla.use_backend("torch"):
        case.function(**keywords)


def test_backend_from_the_environment(inputs, monkeypatch):
    monkeypatch.setenv("FLA_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"FLA_BACKEND must be None, 'triton' or 'torch', got 'tritn'"):
        chunk_linear_attn(**inputs)
    monkeypatch.setenv("FLA_BACKEND", "triton")
    with pytest.raises(ValueError, match="needs GPU tensors"):
        chunk_linear_attn(**inputs)
    chunk_linear_attn(**inputs, backend="torch")
    monkeypatch.setenv("FLA_BACKEND", "")
    chunk_linear_attn(**inputs)


def test_first_use_of_an_op_logs_its_backend_once(inputs, caplog, monkeypatch):
    monkeypatch.setattr("fla.backends._logged", set())
    with caplog.at_level("INFO", logger="fla"):
        chunk_linear_attn(**inputs, normalize=False)
        chunk_linear_attn(**inputs, normalize=False)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1 and "chunk_linear_attn" in lines[0] and "torch" in lines[0]


@pytest.mark.parametrize("function", (parallel_retention, parallel_simple_gla))
def test_attentions_of_a_pack(inputs, function):
    packed = {name: x[:1] for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"output_attentions.*cu_seqlens"):
        function(**packed, output_attentions=True, cu_seqlens=torch.tensor([0, 2, 5]))


def test_state_pair_without_normalize(inputs):
    pair = (torch.zeros(2, 2, 16, 16), torch.zeros(2, 1, 2, 16))
    with pytest.raises(ValueError, match=r"initial_state.*normalize"):
        chunk_linear_attn(**inputs, initial_state=pair, normalize=False)
    with pytest.raises(ValueError, match=r"initial_state.*3"):
        chunk_linear_attn(**inputs, initial_state=(*pair, pair[1]), normalize=True)
    with pytest.raises(ValueError, match=r"z in initial_state must have shape"):
        chunk_linear_attn(**inputs, initial_state=(pair[0], pair[1][:1]), normalize=True)


def test_two_names_of_cu_seqlens():
    bounds = torch.tensor([0, 2, 5])
    assert merge_cu_seqlens(bounds, None) is bounds and merge_cu_seqlens(None, bounds) is bounds
    assert merge_cu_seqlens(bounds, bounds[:]) is bounds
    with pytest.raises(ValueError, match="cu_seqlens and cu_seq_lens_q"):
        merge_cu_seqlens(bounds, bounds.clone())


def test_shapes_are_checked_before_the_backend_is_asked():
    q, k, v, g = (torch.zeros(1, 5, 2, 4) for _ in range(4))
    with pytest.raises(ValueError, match=r"k must have shape \[B, T, H, K\]"):
        chunk_gla(q, k[:, :4], v, g, backend="torch")
