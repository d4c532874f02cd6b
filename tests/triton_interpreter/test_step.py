"""Decoding in the interpreter: pools, and states in place."""

import pytest
import torch

from fla.testing.cases import INTERPRETER, heads
from tests.ops.stepping import Served, check_against_separate_calls, check_served, step_cases

SMALL, ODD, WIDE = heads((1, 8, 12), (2, 17, 8), (1, 4, 20))


@pytest.mark.parametrize("case", step_cases(INTERPRETER, sizes=SMALL), ids=str)
def test_pool(case):
    check_served(Served(case))


@pytest.mark.parametrize("case", step_cases(INTERPRETER, tokens=(2,), sizes=ODD), ids=str)
def test_whole_states_in_place(case):
    check_served(Served(case, indices=None))


@pytest.mark.parametrize("case", step_cases(INTERPRETER, tokens=((2, 0, 1, 4),), sizes=WIDE), ids=str)
def test_a_pool_is_separate_calls(case):
    check_against_separate_calls(Served(case, index_dtype=torch.int64))
