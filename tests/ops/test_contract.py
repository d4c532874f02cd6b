"""The contract of every op on the torch backend."""

from dataclasses import replace

import pytest

from fla.testing.cases import TORCH, TORCH_EXHAUSTIVE, plain_cases
from fla.testing.contract import check_gradients_numerically, check_values
from tests.ops.suite import contract, every_op

NARROW = {"batch": 1, "sizes": {"H": 1, "K": 3, "V": 2}}
LARGE = ((1, 256, 16), (1, 512, 33), (1, 16, 512), (1, 1, 1))


class TestContract(contract(TORCH)):
    """All of `suite.contract`."""


@pytest.mark.exhaustive
class TestExhaustively(contract(TORCH_EXHAUSTIVE)):
    """The same with products of levels in place of pairs, and the forms that only call another one."""


def gradcheck_cases(spec, suite):
    """Exhaustive: of every form and variant. Else the first of every form."""
    cases = plain_cases(spec, suite, **NARROW, tokens=66)
    first = {case.form: case for case in reversed(cases)}
    return cases if suite.exhaustive else list(first.values())


@pytest.mark.parametrize("case", every_op(lambda spec: gradcheck_cases(spec, TORCH), TORCH), ids=str)
def test_gradcheck(case):
    """66 tokens: a chunk, and two tokens of the next."""
    check_gradients_numerically(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", every_op(lambda spec: gradcheck_cases(spec, TORCH_EXHAUSTIVE), TORCH), ids=str)
def test_gradcheck_of_every_variant(case):
    check_gradients_numerically(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("heads", LARGE, ids="K{0[1]}V{0[2]}".format)
@pytest.mark.parametrize(
    "case", every_op(lambda spec: plain_cases(spec, TORCH_EXHAUSTIVE, tokens=66, batch=1), TORCH), ids=str
)
def test_large_and_tiny_heads(case, heads):
    """K to 512 and any V: the default heads of the published models are 256 and 512 wide."""
    check_values(replace(case.resized(**dict(zip("HKV", heads, strict=True))), dtype=TORCH.dtypes[0]))
