"""The contract of every op on the torch backend."""

from dataclasses import replace

import pytest
import torch

from fla.testing.cases import TORCH, plain_cases
from fla.testing.contract import check_gradients_numerically, check_values
from tests.ops.suite import contract, every_op

WIDE = {"batch": 1, "tokens": 66, "dtype": torch.float32}


class TestContract(contract(TORCH)):
    """All of `suite.contract`."""


@pytest.mark.parametrize(
    "case", every_op(lambda spec: plain_cases(spec, TORCH, heads=(1, 3, 2), tokens=66, batch=1)), ids=str
)
def test_gradcheck(case):
    """66 tokens: a chunk, and two tokens of the next."""
    check_gradients_numerically(case)


@pytest.mark.parametrize("heads", ((1, 256, 16), (1, 512, 33), (1, 16, 512), (1, 1, 1)), ids="K{0[1]}V{0[2]}".format)
@pytest.mark.parametrize("case", every_op(lambda spec: plain_cases(spec, TORCH, **WIDE)), ids=str)
def test_large_and_tiny_heads(case, heads):
    """K to 512 and any V: the default heads of the published models are 256 and 512 wide."""
    check_values(replace(case, heads=heads))
