"""The contract of every op on the Triton kernels, interpreted: tiny heads, float32 and float16."""

from fla.testing.cases import INTERPRETER
from tests.ops.suite import contract


class TestContract(contract(INTERPRETER)):
    """All of `suite.contract`."""
