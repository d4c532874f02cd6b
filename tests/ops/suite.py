"""The contract of every registered op, once for all machines: each suite subclasses `contract(levels)`.

A case is made by registering an op (`fla.ops`), not by editing a test. Checks that need the same reference stand beside
each other, so that it is computed once (`fla.testing.contract.references`).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fla.ops  # noqa: F401  (registers the ops)
from fla.backends import computes
from fla.ops._spec import REGISTRY, OpSpec
from fla.testing.cases import Suite, calling_variants, distinct, enough_heads, plain_cases, value_cases
from fla.testing.contract import (
    Case,
    accepts,
    by_rows,
    check_attentions,
    check_index_dtypes,
    check_prefix,
    check_repeats,
    check_same_form,
    check_strides,
    check_values,
    compiled,
    in_pieces,
)
from fla.testing.errors import bad_calls, check_bad_call, good_call
from fla.testing.inputs import EXTREME_GATES

STRIDES = ("transposed", "sliced", "expanded")


def specs(suite: Suite) -> list[OpSpec]:
    """The ops that the suite's backend computes, less those of the backend that it stands in for."""
    found = [spec for spec in REGISTRY.values() if computes(suite.backend, spec.family)]
    return [spec for spec in found if suite.instead_of is None or not computes(suite.instead_of, spec.family)]


def gaps(backend: str) -> list[str]:
    """A line for each family with ops that the backend does not compute."""
    missing: dict[str, list[str]] = {}
    for spec in REGISTRY.values():
        if not computes(backend, spec.family):
            missing.setdefault(spec.family, []).append(spec.name)
    return [f"no {backend.capitalize()} backend: {family} ({', '.join(ops)})" for family, ops in missing.items()]


def every_op(make: Callable[[OpSpec], list], suite: Suite) -> list:
    """`make(spec)` over all ops of the suite's backend, in one list."""
    return [item for spec in specs(suite) for item in make(spec)]


def gate_cases(spec: OpSpec, suite: Suite) -> list[Case]:
    """Every form with every extreme gate, and with a mixture of them in every dtype: its gated variants and the dtypes
    in turn.

    Exhaustive: each with every gated variant.
    """
    found: list[Case] = []
    for i, gates in enumerate((*EXTREME_GATES, *["mixed"] * len(suite.dtypes)) if spec.gates else ()):
        cases = [case for case in plain_cases(spec, suite, turn=i, gates=gates) if case.gated]
        cases = cases if suite.exhaustive else variant_in_turn(cases, suite, i)
        for j, case in enumerate(cases):
            dtype = suite.dtypes[(i + (j if suite.exhaustive else 0)) % len(suite.dtypes)]
            cases[j] = suite.shortened(enough_heads(replace(case, dtype=dtype)))
        found += cases if suite.exhaustive else distinct(cases, suite, i // 2)
    return found


def variant_in_turn(cases: list[Case], suite: Suite, turn: int) -> list[Case]:
    """One case of each form. Variants and dtypes take turns, so that every variant meets every dtype."""
    found = []
    for form in dict.fromkeys(case.form for case in cases):
        own = [case for case in cases if case.form == form]
        found.append(own[(turn + turn // len(suite.dtypes)) % len(own)])
    return found


def prefix_cases(spec: OpSpec, suite: Suite) -> list[Case]:
    """Every form and variant, dtypes in turn. In the interpreter each family has its own."""
    return plain_cases(spec, suite, batch=1)


def check_pieces(case: Case) -> None:
    """The pieces of a sequence give what the whole gives, gradients through the states included.

    One piece has a single token, and one cut is inside a chunk.
    """
    check_values(case, in_pieces(case, (1, case.tokens // 2 + 1)))


WAYS: dict[str, Callable[[Case], Any]] = {
    "pieces": check_pieces,
    "rows": lambda case: check_values(case, by_rows(case)),
    "state_alone": lambda case: check_values(case, use=("state",)),
    "again": check_repeats,
    "index_dtypes": check_index_dtypes,
    **{kind: lambda case, kind=kind: check_strides(case, kind) for kind in STRIDES},
}


def ways_of_calling(spec: OpSpec, suite: Suite) -> list[tuple[str, Case]]:
    """Ways to call the same problem: names in `WAYS`, and a case each.

    Every way for every form, with every variant or with these in turn; dtypes, and `reverse` and `state_v_first`, in
    turn. Exhaustive: with all combinations of them, and all ways with all strides.
    """
    if not suite.every_way:
        return _ways_in_turn(spec, suite)
    found: list[tuple[str, Case]] = []
    for i, case in enumerate(_whole_cases(spec, suite)):
        strides = STRIDES if suite.exhaustive else [STRIDES[i % len(STRIDES)]]
        ways = [way for way in ("rows", "pieces", "state_alone", *strides, "again") if is_possible(way, case)]
        packed = suite.shortened(replace(case, tokens=suite.tokens_of(case.form, suite.packed)))
        found += [(way, case) for way in ways]
        found += [(way, packed) for way in (("index_dtypes", "again") if suite.exhaustive else ("index_dtypes",))]
    return found


def _ways_in_turn(spec: OpSpec, suite: Suite) -> list[tuple[str, Case]]:
    found, strides = [], STRIDES[len(spec.name) % 3]
    for i, way in enumerate(("pieces", "rows", strides, "again", "state_alone", "index_dtypes")):
        if way == "rows" and suite.steps is not None:
            continue  # other cases have one row
        dtype = suite.dtypes[i % len(suite.dtypes)]
        tokens = suite.packed if way == "index_dtypes" else suite.long
        if suite.steps is not None and way in ("again", "state_alone", "index_dtypes"):  # not about chunks
            tokens = suite.tokens_of("recurrent", tokens)
        batch = 2 if way in ("rows", strides) else suite.batch
        cases = plain_cases(spec, suite, turn=i, tokens=tokens, dtype=dtype, batch=batch)
        possible = [case for case in cases if is_possible(way, case)]
        found += [(way, case) for case in forms_in_turn(variant_in_turn(possible, suite, i), suite, i, tokens)]
    return found


def forms_in_turn(cases: list[Case], suite: Suite, turn: int = 0, tokens: Any = None) -> list[Case]:
    """Of an interpreted suite, where a call is expensive, one form of an op: ops of a family share kernels, and have
    different ones. An op without such neighbours keeps all its forms.

    A chunk form gets the dtype that the backend computes in chunks, and `tokens` with it.
    """
    if suite.steps is None or suite.exhaustive or not cases:
        return cases
    spec = cases[0].spec
    family = [other.name for other in specs(suite) if other.family == spec.family]
    forms = list(dict.fromkeys(case.form for case in cases))
    turns = range(len(forms)) if len(family) == 1 else ((family.index(spec.name) + turn) % len(forms),)
    found = []
    for case in (case for case in cases if forms.index(case.form) in turns):
        in_chunks = "recurrent" not in case.form
        changed = replace(case, dtype=torch.float16, tokens=tokens or case.tokens) if in_chunks else case
        found.append(enough_heads(changed))
    return found


def is_possible(way: str, case: Case) -> bool:
    """Whether the form has the states that a way of calling needs."""
    return way not in ("pieces", "state_alone") or (case.returns_state and case.takes_state)


def _whole_cases(spec: OpSpec, suite: Suite) -> list[Case]:
    """`plain_cases` of two rows, called in all ways or in turn: plainly, with everything, with one keyword.

    A form with one variant gets a second problem, of another dtype.
    """
    if suite.exhaustive:
        return plain_cases(spec, suite, all_callings=True, batch=2)
    found = plain_cases(spec, suite, batch=2)
    several = Counter(case.form for case in found)
    found += [case for case in plain_cases(spec, suite, turn=1, batch=2) if several[case.form] == 1]
    seen: Counter[str] = Counter()
    for i, case in enumerate(found):
        ways = calling_variants(spec, case.form, case.variant)
        ways.insert(1, ways.pop())
        found[i] = replace(case, variant=ways[seen[case.form] % len(ways)])
        seen[case.form] += 1
    return found


def richest(cases: list[Case]) -> list[Case]:
    """Of each form of each op, the case that leaves the fewest tensors out."""
    found: dict[tuple[str, str], Case] = {}
    for case in cases:
        key = case.spec.name, case.form
        if key not in found or len(case.variant.without) < len(found[key].variant.without):
            found[key] = case
    return list(found.values())


def over_ops(cases: list[Case], suite: Suite) -> list[Case]:
    """`forms_in_turn` of each op's cases."""
    names = dict.fromkeys(case.spec.name for case in cases)
    return [case for name in names for case in forms_in_turn([x for x in cases if x.spec.name == name], suite)]


def same_forms(spec: OpSpec, suite: Suite) -> list[Case]:
    """The forms that only call another one, on a batch and on a pack."""
    cases = plain_cases(spec, replace(suite, same=True), scale=0.3)
    cases = [case for case in cases if case.form in spec.same]
    return [replace(case, tokens=tokens) for case in cases for tokens in (suite.long, suite.packed)]


def compiled_cases(spec: OpSpec, suite: Suite) -> list[Case]:
    """The first form as it is called by default, the last one with all that it takes, on a pack."""
    plain = plain_cases(spec, suite)
    packed = plain_cases(spec, suite, tokens=suite.packed)
    if suite.exhaustive:
        return alternating(plain, packed)
    return forms_in_turn([plain[0], richest(packed)[-1]], suite)


def alternating(first: list[Case], second: list[Case]) -> list[Case]:
    return [(first, second)[i % 2][i] for i in range(len(first))]


def contract(suite: Suite) -> type:
    """The test class of a suite: `class TestContract(contract(TORCH)): ...`"""

    def over(make: Callable[[OpSpec, Suite], list]) -> list:
        return every_op(lambda spec: make(spec, suite), suite)

    few = 5 if suite.steps is None else 2
    short = over(lambda spec, suite: plain_cases(spec, suite, tokens=few, dtype=suite.dtypes[0]))
    short = short if suite.every_way else over_ops(richest(short), suite)
    all_forms = over(lambda spec, suite: plain_cases(spec, replace(suite, same=True)))
    wrong = over(lambda spec, suite: bad_calls(forms_in_turn(plain_cases(spec, suite, dtype=suite.dtypes[0]), suite)))

    class OpContract:
        @pytest.mark.parametrize("case", over(value_cases), ids=str)
        def test_values_and_gradients(self, case):
            check_values(case)

        @pytest.mark.parametrize("way, case", over(ways_of_calling), ids=str)
        def test_ways_of_calling(self, way, case):
            """The same problem in pieces, row by row, strided, once more: the same results, or the same bits."""
            WAYS[way](case)

        @pytest.mark.parametrize("case", over(gate_cases), ids=str)
        def test_extreme_gates(self, case):
            # a float64 op promises numbers there, not float64's last digits: running sums of -1e4 cost some
            check_values(case, eps=2.0**-22 if case.dtype == torch.float64 else None)

        @pytest.mark.parametrize("case", over(prefix_cases), ids=str)
        def test_later_tokens_change_nothing_before_them(self, case):
            """Bit for bit: a prefix that ends within a chunk, and one that lacks a token, which forgets everything."""
            check_prefix(case, 10, 0.0)
            check_prefix(case, case.tokens - 1, -50.0)
            if case.backend == "torch":
                check_prefix(case, 10, -5.0)

        @pytest.mark.parametrize("case", short, ids=str)
        def test_gradient_of_one_input_alone(self, case):
            for name in case.inputs():
                check_values(case, needs=(name,))

        @pytest.mark.parametrize("case", over(same_forms), ids=str)
        def test_forms_that_call_another(self, case):
            check_same_form(case)

        @pytest.mark.parametrize("case", over(compiled_cases), ids=str)
        def test_compiles_as_one_graph(self, case):
            check_values(case, compiled(case))

        @pytest.mark.parametrize("case", [x for x in all_forms if accepts(x, "output_attentions")], ids=str)
        def test_attentions(self, case):
            check_attentions(case)

        @pytest.mark.parametrize("case", [x for x in short if accepts(x, "scale")], ids=str)
        def test_scale_none_is_the_default_scale(self, case):
            keywords, scale = good_call(case), case.spec.default_scale
            default, _ = case.function(**keywords)
            given, _ = case.function(**keywords, scale=case.dims["K"] ** -0.5 if scale is None else scale)
            assert torch.equal(default, given)

        @pytest.mark.parametrize("bad", wrong, ids=str)
        def test_bad_calls(self, bad):
            check_bad_call(bad)

        @pytest.mark.parametrize("case", list({str(bad.case): bad.case for bad in wrong}.values()), ids=str)
        def test_what_bad_calls_change_is_good(self, case):
            case.function(**good_call(case))

    if suite.backend != "torch":
        del OpContract.test_forms_that_call_another
    if suite.steps is not None:
        del OpContract.test_later_tokens_change_nothing_before_them
    return OpContract


def diagonal(*lists: list) -> list:
    """The i-th item of the i-th list, and so on around."""
    return [item for n, items in enumerate(lists) for i, item in enumerate(items) if i % len(lists) == n]


def in_turn(*lists: list) -> list:
    """All items: those of the `diagonal` for every suite, the others for the exhaustive one."""
    return [
        pytest.param(
            *(item if isinstance(item, tuple) else (item,)),
            marks=() if i % len(lists) == n else pytest.mark.exhaustive,
        )
        for n, items in enumerate(lists)
        for i, item in enumerate(items)
    ]
