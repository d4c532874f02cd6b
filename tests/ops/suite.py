"""The contract of every registered op, once for all machines: each suite subclasses `contract(levels)`.

A case is made by registering an op (`fla.ops`), not by editing a test.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import fla.ops  # noqa: F401  (registers the ops)
from fla.ops._spec import REGISTRY, OpSpec
from fla.testing.cases import PACKED, Suite, enough_heads, plain_cases, value_cases
from fla.testing.contract import (
    Case,
    accepts,
    by_rows,
    check_attentions,
    check_index_dtypes,
    check_inputs_unwritten,
    check_repeats,
    check_strides,
    check_values,
    compiled,
    in_pieces,
)
from fla.testing.errors import bad_calls, check_bad_call, good_call
from fla.testing.inputs import EXTREME_GATES

STRIDES = ("transposed", "sliced", "expanded")


def every_op(make):
    """`make(spec)` over all registered ops, in one list."""
    return [item for spec in REGISTRY.values() for item in make(spec)]


def gate_cases(suite: Suite) -> list[Case]:
    """Every gated form and variant with every extreme gate, dtypes in turn; a mixture of them in every dtype."""
    dtypes, found = suite.dtypes, []
    for i, gates in enumerate((*EXTREME_GATES, *["mixed"] * len(dtypes))):
        cases = every_op(lambda spec, gates=gates: plain_cases(spec, suite, gates=gates))
        gated = [case for case in cases if case.gated]
        turned = [replace(case, dtype=dtypes[(i + j) % len(dtypes)]) for j, case in enumerate(gated)]
        turned = [suite.shortened(enough_heads(case)) for case in turned]
        found += turned if suite.thorough or gates == "mixed" else turned[i % 3 :: 3]
    return found


def gradients_to_hold(case: Case) -> tuple[str, ...] | None:
    """All, but for a constant decay's of -5 where heads are wide and operands fp16.

    It is one sum over all tokens of terms of which e^-5 is left, and row sums in float32 (of K products each, the two
    to be subtracted a hundred times their difference) have an error that all earlier tokens share: measured in the
    interpreter, at T 130 and K = V = 64, 0.5 to 1.2 of fp16's budget while the gradient per token uses 0.13 of it. bf16
    has eight times that budget, the interpreter's heads are narrow: there it is held.
    """
    names = tuple(case.inputs())
    constant = {name for name in case.spec.gates if name in names and "T" not in case.spec.shapes[name].split()}
    wide = case.backend == "triton" and case.dtype == torch.float16 and min(case.heads[1:]) > 20
    return tuple(name for name in names if name not in constant) if wide and case.gates == -5.0 else None


def chunk_cases(suite: Suite, **changes: Any) -> list[Case]:
    """The chunk form of every op with each kind of decay: none, constant, per token and head, per channel.

    `changes` as in `plain_cases`; heads stay as given (`check_chunks` wants no gradient that needs many).
    """

    def of(spec: OpSpec) -> list[Case]:
        gates = changes.get("gates", "ordinary") if spec.gates else "ordinary"
        return plain_cases(spec, suite, **changes | {"gates": gates})

    cases = [case for case in every_op(of) if case.form == "chunk" and case.variant.name != "g and g_gamma"]
    return [replace(case, heads=changes.get("heads", case.heads)) for case in cases]


def check_chunks(case: Case) -> None:
    """Values and gradients, but not that of a constant decay: one that needs its gradient is computed per token."""
    check_values(case, needs=tuple(name for name in case.inputs() if name != "g_gamma"))


def contract(suite: Suite) -> type:
    """The test class of a suite: `class TestContract(contract(TORCH)): ...`"""
    plain = every_op(lambda spec: plain_cases(spec, suite))
    all_ways = every_op(lambda spec: plain_cases(spec, suite, all_callings=suite.thorough))
    stateful = [case for case in all_ways if case.returns_state]
    packed = every_op(lambda spec: plain_cases(spec, suite, tokens=PACKED[0]))
    short = every_op(lambda spec: plain_cases(spec, suite, tokens=5, dtype=suite.dtypes[0]))
    attending = every_op(lambda spec: plain_cases(spec, replace(suite, same=())))
    attending = [case for case in attending if accepts(case, "output_attentions")]
    wrong = every_op(lambda spec: bad_calls(plain_cases(spec, suite, dtype=suite.dtypes[0])))

    class OpContract:
        @pytest.mark.parametrize("case", every_op(lambda spec: value_cases(spec, suite)), ids=str)
        def test_values_and_gradients(self, case):
            check_values(case)

        @pytest.mark.parametrize("case", stateful, ids=str)
        def test_pieces_are_the_whole(self, case):
            """Also the gradients through the states handed over; a piece of one token, a cut inside a chunk."""
            check_values(case, in_pieces(case, (1, case.tokens // 2 + 1)))

        @pytest.mark.parametrize("case", every_op(lambda spec: plain_cases(spec, suite, batch=2)), ids=str)
        def test_a_row_alone_is_a_row_in_a_batch(self, case):
            check_values(case, by_rows(case))

        @pytest.mark.parametrize("case", packed, ids=str)
        def test_index_dtypes_agree(self, case):
            check_index_dtypes(case)

        @pytest.mark.parametrize("case", gate_cases(suite), ids=str)
        def test_extreme_gates(self, case):
            # a float64 op promises numbers there, not float64's last digits: running sums of -1e4 cost some
            check_values(case, needs=gradients_to_hold(case), eps=2.0**-22 if case.dtype == torch.float64 else None)

        @pytest.mark.parametrize("case, kind", list(zip(plain, itertools.cycle(STRIDES), strict=False)), ids=str)
        def test_strides(self, case, kind):
            check_strides(case, kind)

        @pytest.mark.parametrize("case", plain + packed if suite.thorough else alternating(plain, packed), ids=str)
        def test_repeated_runs_are_bitwise_equal(self, case):
            check_repeats(case)

        @pytest.mark.parametrize("case", plain, ids=str)
        def test_inputs_are_not_written_to(self, case):
            check_inputs_unwritten(case)

        @pytest.mark.parametrize("case", [case for case in plain if case.returns_state], ids=str)
        def test_gradients_through_the_final_state_alone(self, case):
            check_values(case, use=("state",))

        @pytest.mark.parametrize("case", short, ids=str)
        def test_gradient_of_one_input_alone(self, case):
            for name in case.inputs():
                check_values(case, needs=(name,))

        @pytest.mark.parametrize("case", alternating(plain, packed), ids=str)
        def test_compiles_as_one_graph(self, case):
            check_values(case, compiled(case))

        @pytest.mark.parametrize("case", attending, ids=str)
        def test_attentions(self, case):
            check_attentions(case)

        @pytest.mark.parametrize("case", plain, ids=str)
        def test_scale_none_is_the_default_scale(self, case):
            keywords = good_call(case)
            default, _ = case.function(**keywords)
            given, _ = case.function(**keywords, scale=case.heads[1] ** -0.5)
            assert torch.equal(default, given)

        @pytest.mark.parametrize("bad", wrong, ids=str)
        def test_bad_calls(self, bad):
            check_bad_call(bad)

        @pytest.mark.parametrize("case", list({str(bad.case): bad.case for bad in wrong}.values()), ids=str)
        def test_what_bad_calls_change_is_good(self, case):
            case.function(**good_call(case))

    return OpContract


def alternating(first: list[Case], second: list[Case]) -> list[Case]:
    return [(first, second)[i % 2][i] for i in range(len(first))]
