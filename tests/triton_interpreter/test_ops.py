"""The contract of every op on the Triton kernels, interpreted: tiny heads, float32 and float16."""

import pytest

from fla.testing.cases import INTERPRETER, INTERPRETER_EXHAUSTIVE
from tests.ops.suite import contract


class TestContract(contract(INTERPRETER)):
    """All of `suite.contract`."""


@pytest.mark.exhaustive
class TestExhaustively(contract(INTERPRETER_EXHAUSTIVE)):
    """The same with products of levels in place of pairs."""
