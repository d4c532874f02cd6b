"""Ops without Triton kernels on GPU tensors: the torch backend computes them, and the default says so."""

import pytest
import torch

from fla.ops._spec import REGISTRY
from fla.testing.cases import TORCH_ON_GPU, plain_cases
from fla.testing.errors import good_call
from tests.ops.suite import contract, every_op, specs


class TestContract(contract(TORCH_ON_GPU)):
    """All of `suite.contract`."""


def plain(**changes):
    return every_op(lambda spec: plain_cases(spec, TORCH_ON_GPU, **changes), TORCH_ON_GPU)


@pytest.mark.parametrize("case", plain(tokens=66), ids=str)
def test_it_is_the_default(case):
    keywords = {name: x for name, x in good_call(case).items() if name != "backend"}
    with torch.no_grad():
        default, _ = case.function(**keywords)
        asked, _ = case.function(**keywords, backend="torch")
    assert torch.equal(default, asked)


@pytest.mark.parametrize("case", plain(tokens=66), ids=str)
def test_asking_for_triton_raises(case):
    keywords = {name: x for name, x in good_call(case).items() if name != "backend"}
    with pytest.raises(ValueError, match="torch"):
        case.function(**keywords, backend="triton")


def test_every_such_op_is_here():
    computed = {spec.family for spec in specs(TORCH_ON_GPU)}
    assert "decay" not in computed
    assert {spec.family for spec in REGISTRY.values()} == computed | {"decay"}
