"""The contract of every op on the compiled Triton kernels: real head dims and dtypes. And what only a GPU shows."""

from dataclasses import replace

import pytest
import torch

from fla import check_packing
from fla.ops import chunk_gla
from fla.ops._spec import REGISTRY
from fla.testing import GPU, check_values, make_inputs, plain_cases
from fla.testing.cases import GPU_EXHAUSTIVE
from fla.testing.contract import accepts, rounded_cotangent, run, whole
from fla.testing.errors import good_call
from tests.ops.suite import contract, every_op, specs


class TestContract(contract(GPU)):
    """All of `suite.contract`."""


@pytest.mark.exhaustive
class TestExhaustively(contract(GPU_EXHAUSTIVE)):
    """The same with products of levels in place of pairs."""


LONG = {"sizes": {"H": 4, "K": 128, "V": 128}, "dtype": torch.bfloat16}


def plain(**changes):
    return every_op(lambda spec: plain_cases(spec, GPU, **changes), GPU)


def in_chunks(**changes):
    return [case for case in plain(**changes) if "chunk" in case.form]


@pytest.mark.parametrize("gates", ("ordinary", "weak"))
@pytest.mark.parametrize("case", in_chunks(tokens=1024, **LONG), ids=str)
def test_many_chunks(case, gates):
    """Errors that grow with the number of chunks show here: the gate gradient's, and the state's."""
    check_values(replace(case, gates=gates))


@pytest.mark.parametrize("case", plain(tokens=2048, **LONG), ids=str)
def test_many_repeats_are_bitwise_equal(case):
    """Races show in some runs only: twenty of them, forward and backward."""
    inputs, cotangents = case.inputs(), rounded_cotangent(case)
    first = run(whole(case), inputs, cotangents=cotangents)
    for _ in range(20):
        again = run(whole(case), inputs, cotangents=cotangents)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(a, b) for a, b in zip(first.state, again.state, strict=True))
        for name, grad in first.grads.items():
            assert (grad is None) == (again.grads[name] is None), name
            assert grad is None or torch.equal(grad, again.grads[name]), name


@pytest.mark.parametrize("case", plain(tokens=(65, 0, 1, 62)), ids=str)
def test_no_host_sync_on_the_packed_path(case):
    """Forward and backward of a pack never wait for the GPU."""
    inputs, cotangents = case.inputs(), rounded_cotangent(case)
    evaluate = whole(case)
    run(evaluate, inputs, cotangents=cotangents)  # compiles
    bounds, leaves = case.cu_seqlens, {name: x.requires_grad_() for name, x in inputs.items()}
    keywords = good_call(case) | {"cu_seqlens": bounds}
    keywords |= {name: x for name, x in leaves.items() if name in keywords and name != "initial_state"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = case.function(**keywords)
        output.backward(torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _parts(value) -> list[torch.Tensor]:
    """The tensors of an argument: itself, or the parts of a state."""
    values = value if isinstance(value, tuple) else (value,)
    return [x for x in values if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("case", plain(tokens=130), ids=str)
def test_cuda_graph_capture(case):
    """A captured forward replays on new values: nothing in it was decided on the host."""
    keywords = good_call(case)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            case.function(**keywords)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured, _ = case.function(**keywords)
    other = good_call(replace(case, seed=case.seed + 100))
    for name, x in keywords.items():
        for part, new in zip(_parts(x), _parts(other[name]), strict=True):
            part.copy_(new)
    graph.replay()
    with torch.no_grad():
        expected, _ = case.function(**other)
    assert torch.equal(captured, expected)


def test_default_backend_is_triton():
    x = make_inputs(REGISTRY["gla"], {"T": 65}, torch.bfloat16, "cuda")
    x = {name: x[name] for name in ("q", "k", "v", "g")}
    default, _ = chunk_gla(**x)
    triton, _ = chunk_gla(**x, backend="triton")
    assert torch.equal(default, triton)


@pytest.mark.parametrize("case", in_chunks(tokens=65, dtype=torch.float32), ids=str)
def test_torch_backend_on_the_gpu(case):
    check_values(replace(case, backend="torch"))


def test_float64_names_the_torch_backend():
    x = make_inputs(REGISTRY["gla"], {"T": 65}, torch.float64, "cuda")
    with pytest.raises(ValueError, match=r"torch\.float64.*backend='torch'"):
        chunk_gla(*(x[name] for name in ("q", "k", "v", "g")))


def test_packing_checked_on_the_device_is_off_by_default_and_passes_when_right():
    x = make_inputs(REGISTRY["gla"], {"B": 1, "T": 65}, torch.bfloat16, "cuda")
    bounds = torch.tensor([0, 1, 65], dtype=torch.int32, device="cuda")
    with check_packing():
        chunk_gla(*(x[name] for name in ("q", "k", "v", "g")), cu_seqlens=bounds)
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", plain(tokens=65), ids=str)
def test_another_stream(case):
    """Kernels run on the current stream."""
    inputs = case.inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    here = run(whole(case), inputs, cotangents=rounded_cotangent(case))
    with torch.cuda.stream(stream):
        there = run(whole(case), inputs, cotangents=rounded_cotangent(case))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(here.output, there.output)


def test_every_form_is_here():
    """The suite runs every registered form on Triton but those that only call another."""
    seen = {(case.spec.name, case.form) for case in plain()}
    assert seen == {(spec.name, form) for spec in specs(GPU) for form in spec.forms if form not in spec.same}
    assert all(accepts(case, "backend") for case in plain())
