"""The recurrent kernels in the interpreter: pools, states in place, every combination of decays, large heads."""

import pytest
import torch

from fla.backends.triton.decay import recurrent_backward, recurrent_forward
from fla.testing.cases import INTERPRETER
from tests.ops.stepping import (
    DECAYS,
    Direct,
    Served,
    check_against_separate_calls,
    check_direct,
    check_served,
    step_cases,
)

DIRECT = [
    *(Direct(8, 20, decays, tokens=(3, 0, 1)) for decays in DECAYS),
    *(Direct(20, 8, decays, dtype=torch.float16, tokens=3) for decays in DECAYS),
    *(Direct(8, 8, decays, gates="extreme", tokens=6, heads=2) for decays in DECAYS if decays),
    *(Direct(K, V, ("g", "gk", "gv"), tokens=(2, 1), index_dtype=torch.int64) for K, V in ((36, 130), (130, 36))),
    Direct(260, 4, ("gk",), tokens=2),
    Direct(4, 260, ("g",), tokens=2),
    Direct(16, 16, ("gk", "gv"), tokens=3, states=False),
    Direct(8, 8, ("g", "gk"), torch.bfloat16, tokens=(2, 1, 0)),  # no dots, so the interpreter computes it right
]


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_forward_and_backward(case):
    check_direct(case, recurrent_forward.forward, recurrent_backward.backward)


@pytest.mark.parametrize("case", step_cases(INTERPRETER, heads=(1, 8, 12)), ids=str)
def test_pool(case):
    check_served(Served(case))


@pytest.mark.parametrize("case", step_cases(INTERPRETER, tokens=(2,), heads=(2, 17, 8)), ids=str)
def test_whole_states_in_place(case):
    check_served(Served(case, indices=None))


@pytest.mark.parametrize("case", step_cases(INTERPRETER, tokens=((2, 0, 1, 4),), heads=(1, 4, 20)), ids=str)
def test_a_pool_is_separate_calls(case):
    check_against_separate_calls(Served(case, index_dtype=torch.int64))
