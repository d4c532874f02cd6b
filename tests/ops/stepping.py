"""What `inplace_final_state` and `state_indices` must do, for every suite and every form that has them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fla.ops._spec import OpSpec, Variant
from fla.testing import Case, assert_within_budget, call_reference
from fla.testing.cases import Suite, forms_of, switched, takes
from fla.testing.inputs import make_inputs, state_names
from fla.testing.runs import initial_state, parameters, parts_of, slice_axis, turned
from tests.ops.suite import specs

TOKENS = (1, 3, (2, 0, 1, 4))


def step_variants(spec: OpSpec, suite: Suite) -> list[tuple[str, Variant]]:
    """Every form that steps with every variant that does, and each layout of the state: in turn, or both of the only
    variant."""
    found: list[tuple[str, Variant]] = []
    variants = [(form, v) for v in spec.variants if v.steps for form in forms_of(spec, v, suite)]
    for form in [form for form in spec.forms if "state_indices" in parameters(spec.forms[form])]:
        own = [v for other, v in variants if other == form]
        for i, variant in enumerate(own if len(own) > 1 else own * 2):
            turn = i % 2 == 1 and takes(spec, form, variant, "state_v_first")
            if turn or i == 0 or len(own) > 1:
                found.append((form, switched(variant, "state_v_first") if turn else variant))
    return found


def step_cases(suite: Suite, tokens=TOKENS, each: int | None = None, **changes: Any) -> list[Case]:
    """Every op, variant and layout with every kind of `tokens`, or with `each` of them in turn; dtypes and sizes in
    turn."""
    found: list[Case] = []
    for spec in specs(suite):
        for n, (form, variant) in enumerate(step_variants(spec, suite)):
            for T in [tokens[(n + i) % len(tokens)] for i in range(each or len(tokens))]:
                i = len(found)
                turns = {"dtype": suite.dtypes[i % len(suite.dtypes)], "sizes": suite.sizes[i % len(suite.sizes)]}
                fields = {**turns, "tokens": T, "batch": 4, "seed": i, **changes}
                found.append(Case(spec, form, variant, **fields, device=suite.device, backend=suite.backend))
    return found


@dataclass
class Served:
    """A case on a pool of seven slots; `indices` by default skips the second sequence, the others are out of order."""

    case: Case
    slots: int = 7
    indices: tuple[int, ...] | None = (5, -1, 0, 3)
    index_dtype: torch.dtype = torch.int32

    def __post_init__(self):
        case, inputs = self.case, self.case.inputs()
        names = state_names(case.spec, case.variant)
        self.tensors = {name: x for name, x in inputs.items() if name not in names}
        P = len(inputs[names[0]]) if self.indices is None else self.slots
        sizes = case.dims | {"B": P, "T": 1}
        made = make_inputs(case.spec, sizes, case.dtype, case.device, case.seed + 1, case.variant)
        self.pools = [made[name] for name in names]
        self.names = names

    @property
    def v_first(self) -> bool:
        return self.case.variant.settings.get("state_v_first", False)

    @property
    def state_indices(self) -> Tensor | None:
        if self.indices is None:
            return None
        return torch.tensor(self.indices, dtype=self.index_dtype, device=self.case.device)

    def owned(self) -> tuple[Tensor, ...]:
        """Fresh copies of the pools, in the layout of the call."""
        return tuple(pool.clone(memory_format=torch.contiguous_format) for pool in self.turned(tuple(self.pools)))

    def keywords(self, owned: tuple[Tensor, ...], in_place: bool) -> dict[str, Any]:
        case = self.case
        keywords = {**self.tensors, **case.variant.settings, "backend": case.backend}
        if "scale" in parameters(case.function):
            keywords["scale"] = case.scale
        if case.cu_seqlens is not None:
            keywords["cu_seqlens"] = case.cu_seqlens
        return (
            keywords
            | initial_state(owned)
            | {
                "output_final_state": True,
                "inplace_final_state": in_place,
                "state_indices": self.state_indices,
            }
        )

    def run(self, in_place: bool, function: Callable | None = None, owned: tuple[Tensor, ...] | None = None):
        """Output, final states as returned, and the pools afterwards, all in the layout of the call."""
        owned = self.owned() if owned is None else owned
        with torch.no_grad():
            o, final = (function or self.case.function)(**self.keywords(owned, in_place))
        return o, parts_of(final), owned

    def turned(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Between the layout of the pools and that of the call."""
        return turned(self.case.spec, parts) if self.v_first else parts

    def live(self) -> list[int]:
        """The sequences that are not skipped."""
        N = len(self.pools[0]) if self.indices is None else len(self.indices)
        return [n for n in range(N) if self.indices is None or self.indices[n] >= 0]

    def reference(self, dtype: torch.dtype | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and final states of all sequences by the naive recurrence (in `dtype` if given), 0 where skipped."""
        case = self.case
        rows = slice(None) if self.indices is None else [max(i, 0) for i in self.indices]
        inputs = self.tensors | {name: pool[rows] for name, pool in zip(self.names, self.pools, strict=True)}
        if dtype is not None:
            inputs = {name: x.to(dtype) for name, x in inputs.items()}
        o, states = call_reference(case.spec, inputs, case.variant, cu_seqlens=case.cu_seqlens, scale=case.scale)
        bounds = None if case.cu_seqlens is None else case.cu_seqlens.tolist()
        for n in set(range(len(states[0]))) - set(self.live()):
            if bounds is None:
                o[n] = 0
            else:
                o[:, bounds[n] : bounds[n + 1]] = 0
            for state in states:
                state[n] = 0
        return o, states


def check_served(served: Served, function: Callable | None = None) -> None:
    """Fresh and in place: results within the budget, the same bits, and nothing else written.

    Triton lays a V-first tile out as it is stored, so in place its sums over K run in another order and its products
    and sums are fused in other places: there both results only hold the budget.
    """
    o, states, pools = served.run(False, function)
    here, returned, written = served.run(True, function)
    hold(served, o, states)
    same_bits = not (served.v_first and served.case.backend == "triton")
    if same_bits:
        assert torch.equal(o, here)
    live = served.live()
    slots = live if served.indices is None else [served.indices[n] for n in live]
    there = []
    for i, (state, pool, before) in enumerate(zip(states, pools, served.owned(), strict=True)):
        assert torch.equal(pool, before), "a pool was written to without being asked for"
        assert returned[i] is written[i], "in place returns the tensor that it was given"
        there.append(state.index_copy(0, torch.tensor(live, dtype=torch.long, device=state.device), written[i][slots]))
        if same_bits:
            assert torch.equal(there[i], state)
        before[slots] = written[i][slots]
        assert torch.equal(written[i], before), "a slot was written to that no sequence has"
    hold(served, here, tuple(there))


def hold(served: Served, o: Tensor, states: tuple[Tensor, ...]) -> None:
    """Outputs and final states of all sequences to the budget."""
    case = served.case
    exact, exact_states = served.reference(torch.float64)
    naive, naive_states = served.reference(torch.float32 if case.dtype == torch.float64 else None)
    budget: dict[str, Any] = {"dtype": case.dtype, "backend": case.backend}
    assert_within_budget(f"{case}: o", o, exact, naive, **budget)
    for i, parts in enumerate(zip(served.turned(states), exact_states, naive_states, strict=True)):
        assert_within_budget(f"{case}: state {i}", *parts, **budget)


def check_against_separate_calls(served: Served) -> None:
    """Every sequence alone, through the ordinary path from the state in its slot: within the same budget, and the same
    bits where a program computes one sequence in one way (Triton, one state, in one layout)."""
    assert served.indices is not None
    case, (o, states, _) = served.case, served.run(False)
    bounds = None if case.cu_seqlens is None else case.cu_seqlens.tolist()
    apart, finals = torch.zeros_like(o), tuple(torch.zeros_like(state) for state in states)
    for n in served.live():
        row, tokens = (n, (0, o.shape[1])) if bounds is None else (0, (bounds[n], bounds[n + 1] - bounds[n]))
        alone = replace(served, indices=None)
        row_alone = slice_axis(case.spec, served.tensors, "B", row, 1)
        alone.tensors = slice_axis(case.spec, row_alone, "T", *tokens)
        alone.case = replace(case, tokens=tokens[1], batch=1)
        owned = tuple(pool[served.indices[n]][None].contiguous() for pool in served.owned())
        keywords = alone.keywords(owned, False)
        del keywords["inplace_final_state"], keywords["state_indices"]
        with torch.no_grad():
            found, final = case.function(**keywords)
        apart[row : row + 1].narrow(1, *tokens).copy_(found)
        for part, found in zip(finals, parts_of(final), strict=True):
            part[n : n + 1] = found
    hold(served, apart, finals)
    if case.backend == "triton" and not served.v_first and len(served.names) == 1:
        assert torch.equal(apart, o)
        assert all(torch.equal(*pair) for pair in zip(finals, states, strict=True))
