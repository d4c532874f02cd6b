"""Test helpers that ship with the library: error budgets, inputs from an `OpSpec`, the contract of an op as cases.

The project's CPU, interpreter and GPU suites are these functions over the op registry. An op of one's own is held to
the same contract by `for case in value_cases(spec, TORCH): check_values(case)`.
"""

from fla.testing.budget import assert_within_budget, relative_rms
from fla.testing.cases import GPU, INTERPRETER, TORCH, Suite, plain_cases, value_cases
from fla.testing.contract import Case, check_values
from fla.testing.errors import bad_calls, check_bad_call
from fla.testing.inputs import make_inputs, pack, poisoned_allocation
from fla.testing.runs import Result, call, call_reference, run

__all__ = [
    "GPU",
    "INTERPRETER",
    "TORCH",
    "Case",
    "Result",
    "Suite",
    "assert_within_budget",
    "bad_calls",
    "call",
    "call_reference",
    "check_bad_call",
    "check_values",
    "make_inputs",
    "pack",
    "plain_cases",
    "poisoned_allocation",
    "relative_rms",
    "run",
    "value_cases",
]
