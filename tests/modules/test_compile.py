"""`torch.compile(fullgraph=True)` captures every module, forward and backward."""

import pytest
import torch

from fla.modules import RotaryEmbedding, ShortConvolution
from fla.modules.token_shift import token_shift
from fla.testing import pack
from tests.modules.cases import CASES
from tests.modules.running import as_tuple, assert_matches_formula, make


@pytest.fixture(autouse=True)
def _poisoned_allocation():
    """Replaces the fixture of this name by nothing: dynamo cannot trace an allocation function that a test replaced."""


def cases() -> list:
    """Every case; a further one of the same class (its name has a word behind a dash) compiles in make test-all."""
    exhaustive = pytest.mark.exhaustive
    return [pytest.param(case, id=case.name, marks=[exhaustive] if "-" in case.name else []) for case in CASES]


@pytest.mark.parametrize("case", cases())
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    module, inputs = make(case, torch.float32)
    graph = torch.compile(module, backend="aot_eager", fullgraph=True)
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = as_tuple(case.outputs(graph(**given, **case.settings)))
    upstream = [torch.randn(y.shape) for y in outputs]
    leaves = {**given, **{f"module.{name}": p for name, p in module.named_parameters()}}
    grads = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), upstream), strict=True))
    assert_matches_formula(case, module, inputs, (outputs, grads, upstream), torch.float32)


def compiled_equals_eager(call, *tensors):
    torch._dynamo.reset()
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    floating = [x for x in leaves if x.is_floating_point()]
    runs = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        outputs = as_tuple(function(*leaves))
        runs.append((*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], floating)))
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_packed_convolution_with_state():
    conv = ShortConvolution(5, 4)
    compiled_equals_eager(
        lambda x, state, cu: conv(x, cache=state, output_final_state=True, cu_seqlens=cu),
        torch.randn(1, 9, 5),
        torch.randn(4, 5, 4),
        pack((0, 3, 1, 5)),
    )


def test_packed_token_shift_with_cache():
    compiled_equals_eager(
        lambda x, cache, cu: token_shift(x, cu, cache, True),
        torch.randn(1, 9, 5),
        torch.randn(4, 5),
        pack((0, 3, 1, 5)),
    )


def test_packed_rotary_with_offsets():
    rotary = RotaryEmbedding(4, scale_base=8.0)
    compiled_equals_eager(
        lambda q, k, cu, offsets: rotary(q, k, offsets, cu_seqlens=cu),
        torch.randn(1, 9, 2, 4),
        torch.randn(1, 9, 1, 4),
        pack((0, 3, 1, 5)),
        torch.tensor([1, 0, -2, 7]),
    )


def test_decoding_step_in_place():
    torch._dynamo.reset()
    conv, x, cache = ShortConvolution(5, 4).requires_grad_(False), torch.randn(2, 1, 5), torch.randn(2, 5, 4)
    expected = conv(x, cache=cache.clone(), output_final_state=True)
    y, _ = torch.compile(conv, backend="aot_eager", fullgraph=True)(x, cache=cache, output_final_state=True)
    torch.testing.assert_close(y, expected[0])
    assert torch.equal(cache, expected[1])
