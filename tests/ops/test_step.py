"""Decoding on states that the caller owns: in a pool, or overwritten in place. The torch backend, and every error."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fla.ops._spec import REGISTRY
from fla.testing import TORCH
from fla.testing.contract import accepts
from fla.testing.inputs import state_names
from fla.testing.runs import parts_of
from tests.ops.stepping import Served, check_against_separate_calls, check_served, step_cases

EVERY_WAY = step_cases(TORCH, tokens=(2,), dtype=torch.float32)
EVERY_OP = list({(case.spec.name, case.form): case for case in EVERY_WAY}.values())  # the last variant, state turned


@pytest.mark.parametrize("case", step_cases(TORCH), ids=str)
def test_pool(case):
    check_served(Served(case))


@pytest.mark.parametrize("case", step_cases(TORCH), ids=str)
def test_whole_states_in_place(case):
    check_served(Served(case, indices=None))


@pytest.mark.parametrize("case", step_cases(TORCH, scale=0.3), ids=str)
def test_a_pool_is_separate_calls(case):
    check_against_separate_calls(Served(case, index_dtype=torch.int64))


@pytest.mark.parametrize("tokens", (2, (2, 0, 1, 4)), ids=str)
@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_all_skipped(case, tokens):
    served = Served(replace(case, tokens=tokens), indices=(-1, -1, -1, -1))
    o, states, _ = served.run(False)
    assert not o.any() and not any(state.any() for state in states)
    _, _, pools = served.run(True)
    assert all(torch.equal(pool, before) for pool, before in zip(pools, served.owned(), strict=True))


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_no_tokens(case):
    """A call without tokens leaves states as they are."""
    served = Served(replace(case, tokens=0))
    for in_place in (False, True):
        o, states, pools = served.run(in_place)
        assert o.shape[1] == 0
        assert all(torch.equal(pool, before) for pool, before in zip(pools, served.owned(), strict=True))
        for state, before in zip(states, served.owned(), strict=True):
            expected = before if in_place else before[[5, 0, 0, 3]]
            if not in_place:
                expected[1] = 0
            assert torch.equal(state, expected)


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_final_state_only_when_asked_for(case):
    served = Served(case)
    with torch.no_grad():
        _, state = case.function(**served.keywords(served.owned(), False) | {"output_final_state": False})
        owned = served.owned()
        _, same = case.function(**served.keywords(owned, True) | {"output_final_state": False})
    assert state is None
    assert parts_of(same)[0] is owned[0]


def compiled(case):
    torch._dynamo.reset()
    return torch.compile(case.function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_compiles_as_one_graph(case):
    check_served(Served(case), compiled(case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("indices", (None, (5, -1, 0, 3)), ids=("whole", "pool"))
@pytest.mark.parametrize("case", EVERY_WAY, ids=str)
def test_every_way_compiles_as_one_graph(case, indices):
    check_served(Served(case, indices=indices), compiled(case))


class Operators(TorchDispatchMode):
    """The calls of the library's own operators within it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fla":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_operators_are_registered_right(case, in_place, monkeypatch):
    """Schema (what is written), fake results and tracing, by PyTorch's own check."""
    served = Served(case)
    with monkeypatch.context() as patched, Operators() as seen:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)  # the way of `torch.compile`
        served.run(in_place)
    assert seen.calls
    # in place a composition may read by an operator that writes nothing, before the one that writes
    assert any(operator._schema.is_mutable for operator, _, _ in seen.calls) == in_place
    for operator, args, keywords in seen.calls:
        torch.library.opcheck(operator, args, keywords)


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_writing_in_place_is_seen_by_autograd(case):
    served = Served(case)
    owned = served.owned()
    before = owned[0]._version
    served.run(True, owned=owned)
    assert owned[0]._version > before


@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_under_inference_mode_and_autocast(case):
    served = Served(replace(case, dtype=torch.bfloat16))
    expected, _, written = served.run(True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        owned = served.owned()
        o, _ = case.function(**served.keywords(owned, True))
        assert torch.equal(o, expected) and torch.equal(owned[0], written[0])


def bad(change, error, says):
    return pytest.param(change, error, says, id=says[:40])


BAD = (
    bad(lambda x: {"state_indices": [5, -1, 0, 3]}, TypeError, r"state_indices must be an int32 or int64.*list"),
    bad(lambda x: {"state_indices": x["state_indices"].float()}, TypeError, r"state_indices.*float32"),
    bad(lambda x: {"state_indices": x["state_indices"][:3]}, ValueError, r"state_indices.*N = 4.*\[3\]"),
    bad(lambda x: {"state_indices": x["state_indices"][None]}, ValueError, r"state_indices.*\[1, 4\]"),
    bad(lambda x: {"state_indices": x["state_indices"].to("meta")}, ValueError, r"state_indices.*cpu.*meta"),
    bad(lambda x: {"state_indices": x["state_indices"] - 1}, ValueError, r"state_indices.*0 to 6, got -2"),
    bad(lambda x: {"state_indices": x["state_indices"] + 2}, ValueError, r"state_indices.*0 to 6, got 7"),
    bad(
        lambda x: {"state_indices": x["state_indices"].clamp(max=0)}, ValueError, r"state_indices must name a slot once"
    ),
    bad(lambda x: {"initial_state": None}, ValueError, r"initial_state must be (a tensor|the pair)"),
)


@pytest.mark.parametrize("case", [case for case in EVERY_OP if accepts(case, "reverse")], ids=str)
def test_not_backwards_in_time(case):
    test_bad_calls(case, lambda x: {"reverse": True}, ValueError, r"reverse must be False")


@pytest.mark.parametrize("change, error, says", BAD)
@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_bad_calls(case, change, error, says):
    served = Served(case)
    owned = served.owned()
    keywords = served.keywords(owned, True)
    with torch.no_grad(), pytest.raises(error, match=says):
        case.function(**keywords | change(keywords))
    assert all(torch.equal(pool, before) for pool, before in zip(owned, served.owned(), strict=True))


BAD_STATES = (
    bad(lambda s: s.double(), TypeError, r"initial_state must be torch.float32.*float64"),
    bad(lambda s: s.bfloat16(), TypeError, r"initial_state must be torch.float32.*bfloat16"),
    bad(lambda s: torch.cat((s, s), -1)[..., : s.shape[-1]], ValueError, r"initial_state must be contiguous.*strides"),
    bad(lambda s: s[0], ValueError, r"(PARTS) must have shape \[[PN]"),
    bad(lambda s: s.clone().requires_grad_(), ValueError, r"for inference: initial_state must not need a gradient"),
)


PARTS = [(case, i) for case in EVERY_OP for i in range(len(state_names(case.spec, case.variant)))]


@pytest.mark.parametrize("indices", (None, (5, -1, 0, 3)), ids=("whole", "pool"))
@pytest.mark.parametrize("change, error, says", BAD_STATES)
@pytest.mark.parametrize("case, part", PARTS, ids=str)
def test_bad_states(case, change, error, says, indices, part):
    """Nothing is written before all parts of a state are known to be good."""
    served = Served(case, indices=indices)
    owned = list(served.owned())
    owned[part] = change(owned[part])
    with pytest.raises(error, match=says.replace("PARTS", "|".join(served.names))):
        case.function(**served.keywords(tuple(owned), True))
    others = [pool for i, pool in enumerate(owned) if i != part]
    kept = [pool for i, pool in enumerate(served.owned()) if i != part]
    assert all(torch.equal(pool, before) for pool, before in zip(others, kept, strict=True))


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("case", EVERY_OP, ids=str)
def test_gradients_are_refused(case, in_place):
    served = Served(case)
    for name in served.tensors:
        keywords = served.keywords(served.owned(), in_place)
        keywords[name] = keywords[name].clone().requires_grad_()
        with pytest.raises(ValueError, match=rf"for inference: (g, as|{name}|g) must not need a gradient"):
            case.function(**keywords)
        with torch.no_grad():
            case.function(**keywords)


def test_a_normalizer_is_needed_where_it_is_written():
    served = Served(next(case for case in EVERY_WAY if case.variant.settings.get("normalize")))
    keywords = served.keywords(served.owned(), True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"initial_state must be the pair \(S, z\)"):
        served.case.function(**keywords | {"initial_state": keywords["initial_state"][0]})


def test_new_parameters_move_no_other():
    """`inplace_final_state` and `state_indices` are keyword-only."""
    for spec in REGISTRY.values():
        for function in spec.forms.values():
            parameters = inspect.signature(function).parameters
            if "state_indices" in parameters:
                kinds = {parameters[name].kind for name in ("inplace_final_state", "state_indices")}
                assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    assert "state_indices" in inspect.signature(REGISTRY["gla"].forms["fused_recurrent"]).parameters
