"""The family `dplr` (IPLR, DPLR, RWKV-7): what its ops are to each other, their options, and RWKV-7's helpers."""

import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fla.ops
from fla.backends import family
from fla.ops._spec import REGISTRY, OpSpec, Variant
from fla.ops.generalized_delta_rule import dplr, iplr
from fla.ops.rwkv7 import (
    CALLED,
    SHAPES_MUL,
    TENSORS_MUL,
    channel_mixing_rwkv7,
    channel_mixing_rwkv7_torch,
    fused_addcmul_rwkv7,
    fused_k_rwkv7,
    fused_mul_recurrent_rwkv7,
    gate_output_correction,
    naive_recurrent_rwkv7,
)
from fla.testing import TORCH, Case, assert_within_budget, check_values, make_inputs, value_cases
from fla.testing.contract import in_pieces, whole
from fla.testing.runs import run
from tests.ops.stepping import Served, check_served

OPS = ("dplr", "iplr", "rwkv7")
EVERY_FORM = [(op, form) for op in OPS for form in REGISTRY[op].forms]
every_form = pytest.mark.parametrize("op, form", EVERY_FORM, ids="-".join)


def case_of(op, form, **changes):
    return Case(REGISTRY[op], form, REGISTRY[op].variants[0], **changes)


# ---- the form of RWKV-7 with arguments of its own


def _reference_mul(r, w, k, v, kk, a, scale=1.0, initial_state=None, output_final_state=False):
    return naive_recurrent_rwkv7(r, w, k, v, -kk, kk * a, scale, initial_state, output_final_state)


MUL = OpSpec(
    name="rwkv7",
    family="dplr",
    shapes=SHAPES_MUL,
    reference=_reference_mul,
    forms={"fused_mul_recurrent": fused_mul_recurrent_rwkv7},
    inputs=lambda x: x | {"kk": F.normalize(x["kk"], dim=-1), "a": x["a"].sigmoid(), "w": -0.6 * x["w"].sigmoid()},
    gates=("w",),
    required=(*TENSORS_MUL, "w"),
    same_dtype=TENSORS_MUL,
)


MUL_CASES = value_cases(MUL, replace(TORCH, sizes=TORCH.sizes[:2], tokens=(1, 66, (3, 0, 9))))


@pytest.mark.parametrize("case", MUL_CASES, ids=str)
def test_mul_recurrent(case):
    check_values(case)


@pytest.mark.parametrize("reverse", (False, True))
def test_mul_recurrent_is_fused_recurrent(reverse):
    x = make_inputs(MUL, {"T": 9})
    o, state = fused_mul_recurrent_rwkv7(**x, output_final_state=True, reverse=reverse)
    turned = {name: value.flip(1) if reverse and name != "initial_state" else value for name, value in x.items()}
    kk, a = turned.pop("kk"), turned.pop("a")
    expected, expected_state = fla.ops.fused_recurrent_rwkv7(**turned, a=-kk, b=kk * a)
    assert torch.equal(o, expected.flip(1) if reverse else expected) and torch.equal(state, expected_state)
    assert fused_mul_recurrent_rwkv7(**x)[1] is None


@pytest.mark.parametrize("indices", (None, (5, -1, 0, 3)))
def test_mul_recurrent_steps(indices):
    check_served(Served(Case(MUL, "fused_mul_recurrent", Variant("default"), tokens=2, batch=4), indices=indices))


@pytest.mark.parametrize("name", SHAPES_MUL)
def test_mul_recurrent_names_its_own_arguments(name):
    x = make_inputs(MUL, {"T": 2})
    with pytest.raises(ValueError, match=f"{name} must have shape|with . = "):
        fused_mul_recurrent_rwkv7(**x | {name: x[name][..., :3]})
    x[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"for inference: {name} must not need a gradient"):
        fused_mul_recurrent_rwkv7(**x, inplace_final_state=True)
    assert set(CALLED.values()) <= set(SHAPES_MUL)


# ---- what the ops are to each other


@pytest.mark.parametrize("op", OPS)
def test_the_naive_chunks_are_the_recurrence(op):
    spec = REGISTRY[op]
    x = make_inputs(spec, {"T": 70})
    exact, state = spec.reference(**{name: value.double() for name, value in x.items()}, output_final_state=True)
    naive, naive_state = spec.reference(**x, output_final_state=True)
    scale = {"scale": 1.0} if op == "rwkv7" else {}
    names = {"a": "alpha", "b": "beta"} | ({"r": "q", "w": "gk"} if op == "rwkv7" else {})
    given = {names.get(name, name): value for name, value in x.items()}
    for size in (16, 64):
        function = iplr.iplr_chunkwise if op == "iplr" else dplr.dplr_chunkwise
        o, final = function(**given, chunk_size=size, **scale)
        assert_within_budget("o", o, exact, naive, c=4.0)
        assert_within_budget("state", final, state, naive_state, c=4.0)
    assert function(**given, output_final_state=False)[1] is None


def test_iplr_is_dplr_without_decays():
    x = make_inputs(REGISTRY["iplr"], {"T": 70}, torch.float64)
    gk = torch.zeros_like(x["k"])
    for form in ("chunk", "fused_recurrent"):
        o, state = REGISTRY["iplr"].forms[form](**x, output_final_state=True)
        expected, expected_state = REGISTRY["dplr"].forms[form](**x, gk=gk, output_final_state=True)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(state, expected_state)


def test_iplr_has_the_delta_rule():
    """`a = -beta k`, `b = k` and `beta v`: what a token writes is `beta (v - S^T k)`."""
    x = make_inputs(REGISTRY["iplr"], {"T": 20}, torch.float64)
    q, k, v, state = x["q"], x["k"], x["v"], x["initial_state"]
    beta = x["b"].norm(dim=-1, keepdim=True)
    o, final = fla.ops.chunk_iplr_delta_rule(q, k, v * beta, -beta * k, k, initial_state=state, output_final_state=True)
    for t in range(20):
        u = beta[:, t] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * u[:, :, None]
        expected = torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, state)
        torch.testing.assert_close(o[:, t], expected)
    torch.testing.assert_close(final, state)


def test_rwkv7_is_dplr_with_scale_1():
    x = make_inputs(REGISTRY["rwkv7"], {"T": 70})
    given = {{"r": "q", "w": "gk"}.get(name, name): value for name, value in x.items()}
    for form in ("chunk", "fused_recurrent"):
        o, state = REGISTRY["rwkv7"].forms[form](**x, output_final_state=True)
        expected, expected_state = REGISTRY["dplr"].forms[form](**given, scale=1.0, output_final_state=True)
        assert torch.equal(o, expected) and torch.equal(state, expected_state)
    assert fla.ops.chunk_rwkv7(**x)[1] is None and fla.ops.fused_recurrent_rwkv7(**x)[1] is not None


# ---- situations from bug reports


@every_form
@pytest.mark.parametrize("tokens", range(1, 18))
def test_few_tokens(op, form, tokens):
    check_values(case_of(op, form, tokens=tokens, sizes={"H": 1}, seed=tokens))


def test_few_tokens_compile():
    torch._dynamo.reset()
    function = torch.compile(fla.ops.chunk_rwkv7, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 2, 16, 17):
        case = case_of("rwkv7", "chunk", tokens=tokens, sizes={"H": 1})
        check_values(case, whole(case, function))


@every_form
def test_empty_sequences_keep_their_state(op, form):
    """Bounds 0 0 5 5 12 12: three of five sequences have no tokens."""
    case = case_of(op, form, tokens=(0, 5, 0, 7, 0))
    inputs = case.inputs()
    actual = check_values(case)
    empty = [0, 2, 4]
    assert torch.equal(actual.state[0][empty], inputs["initial_state"][empty])
    through = run(whole(case), inputs, use=("state",), cotangents=lambda i, x: torch.ones_like(x))
    assert torch.equal(through.grads["initial_state"][empty], torch.ones_like(inputs["initial_state"][empty]))


@every_form
@pytest.mark.parametrize("prefix", (64, 128))
def test_one_token_after_whole_chunks(op, form, prefix):
    """The state after 64 or 128 tokens, of the chunk form, goes on with either form as if there were no cut."""
    case = case_of(op, "chunk", tokens=prefix + 1)
    check_values(case, in_pieces(case, (prefix,)))
    x = case.inputs()
    before = {name: value[:, :prefix] if name != "initial_state" else value for name, value in x.items()}
    after = {name: value[:, prefix:] for name, value in x.items() if name != "initial_state"}
    whole_o, whole_state = case.function(**x, output_final_state=True)
    _, state = case.function(**before, output_final_state=True)
    o, final = REGISTRY[op].forms[form](**after, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, whole_o[:, prefix:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, whole_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_a_new_request_in_a_used_slot(op):
    """A slot that is zeroed, as the documentation says, gives what no state gives; other slots stay as they are."""
    case = case_of(op, "fused_recurrent", tokens=3, batch=1, state="none")
    x = case.inputs()
    pool = torch.full((4, *[case.dims[axis] for axis in "HKV"]), 7.0)
    pool[2].zero_()
    with torch.no_grad():
        o, _ = case.function(**x, initial_state=pool, state_indices=torch.tensor([2]), inplace_final_state=True)
        expected, state = case.function(**x, output_final_state=True)
    assert torch.equal(o, expected) and torch.equal(pool[2:3], state)
    assert (pool[[0, 1, 3]] == 7.0).all()


@pytest.mark.parametrize("strength", (1.0, 2.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("op", OPS)
def test_keys_that_point_the_same_way(op, dtype, strength):
    """Correlation 0.9, and transitions that forget all of a direction (1) or reflect it (2)."""
    case = case_of(op, "chunk", tokens=130, sizes={"H": 1, "K": 32, "V": 16}, dtype=dtype)
    x = case.inputs()
    along = F.normalize(x["k"][:, :1].float(), dim=-1)
    key = F.normalize(0.1**0.5 * F.normalize(x["a"].float(), dim=-1) + 0.9**0.5 * along, dim=-1)
    x |= {"k": key.to(dtype), "a": -key.to(dtype), "b": (strength * key).to(dtype)}
    check_values(case, inputs=x)


# ---- options


@pytest.mark.parametrize("name", ("chunk_dplr_delta_rule", "chunk_rwkv7"))
def test_options_without_effect(name):
    function, op = getattr(fla.ops, name), name.split("_")[1]
    x = make_inputs(REGISTRY[op], {"T": 5})
    o, _ = function(**x)
    for given in (
        {"safe_gate": True, "lower_bound": -5.0},
        {"lower_bound": -1},
        {"disable_recompute": True},
        {"chunk_size": 16},
    ):
        assert torch.equal(function(**x, **given)[0], o)
    for given, error, says in (
        ({"lower_bound": 0}, ValueError, "lower_bound must be negative.* got 0"),
        ({"lower_bound": 0.5}, ValueError, "lower_bound must be negative.* got 0.5"),
        ({"lower_bound": float("nan")}, ValueError, "lower_bound must be negative.* got nan"),
        ({"lower_bound": "-5"}, TypeError, "lower_bound must be a negative number or None, got str"),
        ({"safe_gate": "no"}, TypeError, "safe_gate must be True or False, got str"),
        ({"disable_recompute": 1}, TypeError, "disable_recompute must be True or False, got int"),
        ({"cp_context": object()}, NotImplementedError, f"{name} computes whole sequences on one device: cp_context"),
    ):
        with pytest.raises(error, match=says):
            function(**x, **given)


def test_positions_are_the_contract():
    """Calls by position, as other programs have them: state and its wish after the scale."""
    x = make_inputs(REGISTRY["rwkv7"], {"T": 5})
    state = x.pop("initial_state")
    expected, final = fla.ops.chunk_rwkv7(**x, initial_state=state, output_final_state=True)
    for function in (fla.ops.chunk_rwkv7, fla.ops.fused_recurrent_rwkv7):
        o, last = function(*x.values(), 1.0, state, True)
        assert torch.equal(o, expected) and torch.equal(last, final)


def test_triton_does_not_compute_it_yet():
    with pytest.raises(ValueError, match=r"'triton' does not compute the family 'dplr': backend='torch' does"):
        family("dplr", "triton", "chunk_rwkv7")


# ---- names


@pytest.mark.parametrize(
    "place, name",
    (
        ("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule"),
        ("fla.ops.generalized_delta_rule.dplr", "fused_recurrent_dplr_delta_rule"),
        ("fla.ops.generalized_delta_rule.dplr.chunk", "chunk_dplr_delta_rule"),
        ("fla.ops.generalized_delta_rule.dplr.fused_recurrent", "fused_recurrent_dplr_delta_rule"),
        ("fla.ops.generalized_delta_rule.dplr.naive", "dplr_recurrence"),
        ("fla.ops.generalized_delta_rule.dplr.naive", "dplr_chunkwise"),
        ("fla.ops.generalized_delta_rule.iplr", "chunk_iplr_delta_rule"),
        ("fla.ops.generalized_delta_rule.iplr.naive", "iplr_recurrence"),
        ("fla.ops.generalized_delta_rule.iplr.naive", "iplr_chunkwise"),
        ("fla.ops.rwkv7", "fused_mul_recurrent_rwkv7"),
        ("fla.ops.rwkv7", "gate_output_correction"),
        ("fla.ops.rwkv7.fused_recurrent", "fused_mul_recurrent_rwkv7"),
        ("fla.ops.rwkv7.fused_addcmul", "fused_addcmul_rwkv7"),
        ("fla.ops.rwkv7.fused_k_update", "fused_k_rwkv7"),
        ("fla.ops.rwkv7.gate_output_correction", "gate_output_correction"),
        ("fla.ops.rwkv7.channel_mixing", "channel_mixing_rwkv7"),
        ("fla.ops.rwkv7.channel_mixing", "channel_mixing_rwkv7_torch"),
    ),
)
def test_where_other_programs_look(place, name):
    assert callable(getattr(importlib.import_module(place), name))


# ---- RWKV-7's functions of single elements

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)


def check_elementwise(function, naive, tensors, dtype):
    """Results and gradients of `function` in `dtype` within the budget that `naive` in float32 and float64 gives."""
    tensors = {name: x.to(dtype) for name, x in tensors.items()}

    def evaluate(compute, rounding):
        def result(x):
            found = compute(**x)
            found = found if isinstance(found, tuple) else (found,)
            return found[0].to(rounding), tuple(y.to(rounding) for y in found[1:] if y is not None)

        return result

    narrow = {name: x.float() for name, x in tensors.items()}
    wide = {name: x.double() for name, x in tensors.items()}
    rounding = torch.float32 if dtype == torch.float64 else dtype
    actual = run(evaluate(function, dtype), tensors)
    exact = run(evaluate(naive, torch.float64), wide)
    rounded = run(evaluate(naive, rounding), narrow)
    pairs = [(actual.output, exact.output, rounded.output)]
    pairs += zip(actual.state, exact.state, rounded.state, strict=True)
    pairs += [(actual.grads[n], exact.grads[n], rounded.grads[n].to(rounding)) for n in tensors]
    for i, (x, x64, naive_x) in enumerate(pairs):
        assert_within_budget(f"{function.__name__} {i}", x, x64, naive_x, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("shape", ((1, 1, 20), (20,)), ids=str)
@pytest.mark.parametrize("count", (5, 6))
def test_addcmul(dtype, shape, count):
    def naive(hidden_states, delta, **mixes):
        return tuple(hidden_states + delta * x for x in mixes.values())

    names = ("xr", "xw", "xk", "xv", "xa", "xg")[:count]
    tensors = {name: torch.randn(2, 7, 20) for name in ("hidden_states", "delta")}
    check_elementwise(fused_addcmul_rwkv7, naive, tensors | {name: torch.rand(shape) for name in names}, dtype)
    x = torch.randn(2, 7, 20, dtype=dtype)
    found = fused_addcmul_rwkv7(x, x, *[torch.rand(shape)] * count)  # weights of another dtype
    assert len(found) == 6 and (found[5] is None) == (count == 5)
    assert all(y.dtype == dtype for y in found[:count])


@DTYPES
def test_k_update(dtype):
    def naive(k, a, ka):
        return k + k * (a - 1) * ka

    tensors = {"k": torch.randn(2, 7, 20), "a": torch.rand(2, 7, 20), "ka": torch.rand(20)}
    check_elementwise(fused_k_rwkv7, naive, tensors, dtype)


@DTYPES
def test_gate_output_correction(dtype):
    def naive(o, r, k, r_k, v, g):
        bonus = torch.stack(
            [(r[:, :, h] * k[:, :, h] * r_k[h]).sum(-1, keepdim=True) * v[:, :, h] for h in range(3)], 2
        )
        return (o + bonus.reshape(o.shape)) * g

    tensors = {name: torch.randn(2, 7, 15) for name in "og"} | {name: torch.randn(2, 7, 3, 8) for name in "rk"}
    tensors |= {"r_k": torch.randn(3, 8), "v": torch.randn(2, 7, 3, 5)}
    check_elementwise(gate_output_correction, naive, tensors, dtype)


@DTYPES
@pytest.mark.parametrize("function", (channel_mixing_rwkv7, channel_mixing_rwkv7_torch))
def test_channel_mixing(dtype, function):
    """In two pieces it is what it is in one: the state of the shift is the second result."""

    def naive(x, x_prev, x_k, key_weight, value_weight):
        rows, last = [], x_prev
        for t in range(x.shape[1]):
            z = x[:, t] + (last - x[:, t]) * x_k
            rows.append(torch.relu(z @ key_weight) ** 2 @ value_weight)
            last = x[:, t]
        return torch.stack(rows, 1), last

    def in_two(x, x_prev, **weights):
        first, last = function(x[:, :3], x_prev, **weights)
        second, last = function(x[:, 3:], last, **weights)
        return torch.cat((first, second), 1), last

    tensors = {"x": torch.randn(2, 7, 20), "x_prev": torch.randn(2, 20), "x_k": torch.rand(20)}
    tensors |= {"key_weight": torch.randn(20, 40) / 5, "value_weight": torch.randn(40, 20) / 5}
    check_elementwise(function, naive, tensors, dtype)
    in_two.__name__ = function.__name__
    check_elementwise(in_two, naive, tensors, dtype)
    x, weights = tensors["x"], {name: tensors[name] for name in ("x_k", "key_weight", "value_weight")}
    assert torch.equal(function(x, None, **weights)[0], function(x, torch.zeros(2, 20), **weights)[0])
    with pytest.raises(ValueError, match=r"key_weight and value_weight must have shapes \[D, I\] and \[I, D\].*20"):
        function(x, None, tensors["x_k"], tensors["key_weight"].T, tensors["value_weight"].T)
