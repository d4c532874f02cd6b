"""What the contract does not cover of the family `delta`: stages of a chunk, what is made in the op, gates, options."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F

from fla.backends import delta
from fla.ops import (
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_kda,
    fused_kda_gate,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    parallel_delta_rule,
)
from fla.ops._spec import REGISTRY
from fla.ops.delta_rule import delta_rule_chunkwise, delta_rule_parallel, delta_rule_recurrence
from fla.ops.gated_delta_rule import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from fla.ops.kda import naive_chunk_kda, naive_recurrent_kda
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.testing import assert_within_budget
from fla.testing.contract import Case, check_values
from fla.testing.delta import DeltaChunk
from tests.families.delta import GATED, OPS, each_gated, inputs, same, variant, with_gradients

# ---- the stages of a chunk


@pytest.mark.parametrize("channels", (0, 1, 5))
def test_stages_follow_autograd(channels):
    """The oracle's gradients are the derivatives of its forward, which is the recurrence."""
    torch.manual_seed(channels)
    C, K, V = 9, 5, 4
    shapes = {"q": (C, K), "k": (C, K), "v": (C, V), "beta": (C,), "w": (C, max(channels, 1)), "S": (K, V)}
    x = {name: torch.randn(2, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    x["k"], x["beta"], x["w"] = F.normalize(x["k"], dim=-1), x["beta"].sigmoid(), -x["w"].abs() * min(channels, 1)
    x = {name: t.requires_grad_() for name, t in x.items()}
    chunk = DeltaChunk(**x, scale=0.3)
    stages = chunk.forward()
    gate = {"gk": x["w"][:, :, None].expand(2, C, 1, K)}
    rows = {name: x[name][:, :, None] for name in ("q", "k", "v", "beta")}
    o, state = naive_recurrent_gated_delta_rule(
        **rows, g=None, **gate, scale=0.3, initial_state=x["S"][:, None], output_final_state=True
    )
    same(stages.O, o[:, :, 0])
    same(stages.S, state[:, 0])

    dO, dS = torch.randn_like(stages.O), torch.randn_like(stages.S)
    found = chunk.backward(dO, dS)
    loss = (stages.O * dO).sum() + (stages.S * dS).sum()
    for name, tensor in (("X", stages.X), ("R", stages.R), ("P", stages.P), ("L", stages.L), *x.items()):
        (expected,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        expected = expected.tril() if name == "P" else expected.tril(-1) if name == "L" else expected
        same(getattr(found, f"d{name}"), expected)


@pytest.mark.parametrize("channels", (0, 1, 24))
def test_the_torch_backend_follows_the_stages(channels):
    """A call of one chunk, with a state before it and the gradient of the state after it."""
    torch.manual_seed(channels)
    T, K, V = 64, 24, 20
    q, k, v = torch.randn(2, T, 1, K), F.normalize(torch.randn(2, T, 1, K), dim=-1), torch.randn(2, T, 1, V)
    beta, state = torch.rand(2, T, 1) * 2, torch.randn(2, 1, K, V)
    w = -torch.rand(2, T, 1, max(channels, 1)) * min(channels, 1)
    x = {"q": q, "k": k, "v": v, "beta": beta, "w": w, "S": state}
    do, dstate = torch.randn_like(v), torch.randn_like(state)
    chunk = DeltaChunk(q[:, :, 0], k[:, :, 0], v[:, :, 0], beta[:, :, 0], w[:, :, 0], state[:, 0], 0.2)
    exact = chunk.forward()
    gradients = chunk.backward(do[:, :, 0], dstate[:, 0])

    x = {name: t.requires_grad_() for name, t in x.items()}
    gates = {"g": x["w"][..., 0]} if channels == 1 else {"gk": x["w"]} if channels else {}
    o, final = delta.chunk(
        x["q"], x["k"], x["v"], beta=x["beta"], **gates, scale=0.2, initial_state=x["S"], output_final_state=True
    )
    found = torch.autograd.grad((o, final), list(x.values()), (do, dstate), allow_unused=True)
    pairs = [("O", o[:, :, 0], exact.O), ("S", final[:, 0], exact.S)]
    for name, d in zip(x, found, strict=True):
        expected = getattr(gradients, f"d{name}")
        if d is not None:
            pairs.append((f"d{name}", d[:, 0] if name == "S" else d[:, :, 0], expected))
    for name, actual, expected in pairs:
        assert_within_budget(name, actual, expected, expected.float(), gate=name == "dw")


# ---- naive functions


def test_naive_delta_rules_agree():
    x = inputs("delta_rule", T=70)
    wide = {name: t.double() for name, t in x.items()}
    o, state = delta_rule_recurrence(**wide)
    for found, final in (delta_rule_chunkwise(**wide), delta_rule_chunkwise(**wide, chunk_size=64)):
        same(found, o)
        same(final, state)
    found, matrix = delta_rule_parallel(**wide)
    same(found, o)
    _, given = parallel_delta_rule(**wide, output_attentions=True)
    same(given, matrix)


@pytest.mark.parametrize(
    "op, naive, chunked",
    (
        ("gated_delta_rule", naive_recurrent_gated_delta_rule, naive_chunk_gated_delta_rule),
        ("kda", naive_recurrent_kda, naive_chunk_kda),
    ),
)
def test_naive_chunks(op, naive, chunked):
    x = {name: t.double() for name, t in inputs(op, T=70, H=2).items()}
    state = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    expected = naive(**x, initial_state=state, output_final_state=True)
    for size in (16, 64):
        for one, other in zip(
            chunked(**x, initial_state=state, output_final_state=True, chunk_size=size), expected, strict=True
        ):
            same(one, other)


# ---- what is made in the op


@each_gated
def test_all_that_is_made_in_the_op_equals_what_is_made_outside(op):
    """Forward and every gradient, in both forms; also where the computed gate is very strong."""
    x = inputs(op, "all in the op", T=70, dtype=torch.float64)
    x["g"][:, ::7] += 100.0
    settings = variant(op, "all in the op").settings

    def outside(form, q, k, v, g, beta, A_log, dt_bias):
        lengths = [(t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k)]
        factor = A_log.exp() if op == "gated_delta_rule" else A_log.exp()[:, None]
        gate = -factor * F.softplus(g + dt_bias)
        return form(q / lengths[0], k / lengths[1], v, g=gate, beta=2 * beta.sigmoid())

    for form in GATED[op]:
        o, gradients = with_gradients(form, x, **settings)
        expected, others = with_gradients(lambda form=form, **t: outside(form, **t), x)
        same(o, expected)
        for name in gradients:
            torch.testing.assert_close(gradients[name], others[name], rtol=1e-9, atol=1e-11)


@each_gated
def test_a_strong_gate_made_in_the_op(op):
    """Decays of -20 and below: finite, no gradient through them in float32, and the right sum for A_log."""
    x = inputs(op, "all in the op", T=70)
    x["g"][:, ::3] = torch.tensor([40.0, 1e4, float("inf")])[torch.arange(24) % 3].view(24, *[1] * (x["g"].dim() - 2))
    x["A_log"] = x["A_log"].abs()
    for form in GATED[op]:
        o, gradients = with_gradients(form, x, **variant(op, "all in the op").settings)
        assert o.isfinite().all() and all(d.isfinite().all() for d in gradients.values())
        assert not gradients["g"][:, ::3].count_nonzero() and gradients["g"][:, 1::3].count_nonzero()


def test_bounded_gate_without_a_factor():
    """`A_log=None`: g = -5 sigmoid(g + dt_bias); in the op as outside, forward and all gradients."""
    x = inputs("kda", "bounded", T=70, dtype=torch.float64)
    del x["A_log"]
    settings = variant("kda", "bounded").settings

    def outside(form, g, dt_bias, **others):
        return form(**others, g=-5 * (g + dt_bias).sigmoid())

    for form in GATED["kda"]:
        o, gradients = with_gradients(form, x, **settings)
        expected, others = with_gradients(lambda form=form, **t: outside(form, **t), x)
        same(o, expected)
        for name in gradients:
            torch.testing.assert_close(gradients[name], others[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", (0.0, 1e-4))
@pytest.mark.parametrize("op", OPS)
def test_l2_norm_of_short_keys(op, norm):
    """`x / sqrt(sum x^2 + 1e-6)`: the 1e-6 stands inside the root."""
    name = {"delta_rule": "l2norm in the op"}.get(op, "all in the op")
    x = inputs(op, name, T=5, dtype=torch.float64)
    x["k"] = norm * F.normalize(x["k"], dim=-1)
    case = Case(REGISTRY[op], "chunk", variant(op, name), tokens=5)
    settings = case.variant.settings
    for form in ("chunk", "fused_recurrent"):
        o, gradients = with_gradients(REGISTRY[op].forms[form], x, **settings)
        expected, others = with_gradients(case.spec.reference, x, **settings)
        same(o, expected)
        for key in gradients:
            same(gradients[key], others[key])


@pytest.mark.parametrize("tokens", (1, 7, 33))
@pytest.mark.parametrize("heads", (8, 12, 32))
def test_gate_and_beta_of_any_number_of_heads(tokens, heads):
    """Every element is written, for heads that are no power of two too."""
    case = Case(
        REGISTRY["gated_delta_rule"],
        "chunk",
        variant("gated_delta_rule", "all in the op"),
        tokens=tokens,
        sizes={"H": 4, "HV": heads, "K": 16, "V": 8},
    )
    check_values(case)


# ---- states before chunks


@pytest.mark.parametrize("tokens", (130, 64, 5))
@pytest.mark.parametrize("v_first", (False, True))
def test_intermediate_states(tokens, v_first):
    x = inputs("kda", T=tokens)
    with torch.inference_mode():
        o, final, states = chunk_kda(
            **x, output_final_state=True, return_intermediate_states=True, state_v_first=v_first
        )
        same(o, chunk_kda(**x)[0], torch.float32)
    assert states.dtype == torch.bfloat16 and states.shape[:2] == (2, -(-tokens // 64))
    for n in range(states.shape[1]):
        part = {name: t[:, : 64 * n] for name, t in x.items()}
        _, expected = chunk_kda(**part, output_final_state=True, state_v_first=v_first)
        torch.testing.assert_close(states[:, n], expected.bfloat16())
    assert final.dtype == torch.float32


def test_intermediate_states_of_a_pack():
    x = inputs("kda", T=100, B=1)
    bounds = torch.tensor([0, 70, 70, 100])
    with torch.inference_mode():
        _, final, states = chunk_kda(**x, cu_seqlens=bounds, return_intermediate_states=True)
    assert final is None and states.shape[:2] == (1, 3) and not states[0, ::2].count_nonzero()
    _, expected = chunk_kda(**{name: t[:, :64] for name, t in x.items()}, output_final_state=True)
    torch.testing.assert_close(states[0, 1], expected[0].bfloat16())


def test_intermediate_states_need_inference_mode():
    with pytest.raises(ValueError, match=r"return_intermediate_states needs torch\.inference_mode"):
        chunk_kda(**inputs("kda"), return_intermediate_states=True)


# ---- the gate alone


def test_gates_and_their_gradients():
    torch.manual_seed(0)
    raw, A_log, bias = torch.randn(2, 5, 3, 4), torch.randn(3), torch.randn(3, 4)
    exact = -A_log.double().exp()[:, None] * F.softplus(raw.double() + bias.double())
    for given in (A_log, A_log.view(1, 1, 3, 1)):
        for shift in (bias, bias.flatten()):
            for gate in (fused_kda_gate, naive_kda_gate):
                found = gate(raw, given, shift)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    bounded = -5 * (A_log.exp()[:, None] * (raw + bias)).sigmoid()
    torch.testing.assert_close(fused_kda_gate(raw, A_log, bias, -5.0), bounded)
    torch.testing.assert_close(naive_kda_lowerbound_gate(raw, A_log, bias), bounded)
    torch.testing.assert_close(fused_kda_gate(raw, lower_bound=-5.0), -5 * raw.sigmoid())
    assert fused_kda_gate(raw, A_log, output_dtype=torch.bfloat16).dtype == torch.bfloat16
    leaves = [t.double().requires_grad_() for t in (raw, A_log, bias)]
    torch.autograd.gradcheck(lambda *t: fused_kda_gate(*t, output_dtype=torch.float64), leaves)


def test_the_former_signature_of_the_gate():
    torch.manual_seed(0)
    raw, A, bias = torch.randn(2, 5, 12), torch.randn(1, 1, 3, 1), torch.randn(12)
    expected = fused_kda_gate(raw.unflatten(-1, (3, 4)), A, bias)
    calls = (
        lambda: fused_kda_gate(raw, A, 4, g_bias=bias),
        lambda: fused_kda_gate(raw, A, 4, bias),
        lambda: fused_kda_gate(raw, A, 4, bias, 1.0),
        lambda: fused_kda_gate(raw, A=A.flatten(), head_k_dim=4, g_bias=bias),
    )
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = call()
        assert [w.category for w in caught] == [DeprecationWarning] and caught[0].filename == __file__
        torch.testing.assert_close(found, expected)
    with pytest.warns(DeprecationWarning):
        sharp = fused_kda_gate(raw, A, 4, beta=2.0, threshold=1.0)
    torch.testing.assert_close(sharp, -A[0].exp() * F.softplus(raw.unflatten(-1, (3, 4)), 2.0, 1.0))


# ---- what bad input gets


@each_gated
def test_options_that_contradict_each_other(op):
    x = inputs(op)
    for form in GATED[op]:
        with pytest.raises(ValueError, match="allow_neg_eigval needs use_beta_sigmoid_in_kernel=True, got False"):
            form(**x, allow_neg_eigval=True)
        with pytest.raises(ValueError, match=r"A_log must be a tensor with use_gate_in_kernel.*, got None"):
            form(**x, use_gate_in_kernel=True)
        three = {name: t[:, :, :3] if name not in "qk" else t for name, t in inputs(op, H=2, HV=4).items()}
        with pytest.raises(ValueError, match="v must have a multiple of the 2 heads of q and k, got 3 heads"):
            form(**three)
        bounds = torch.tensor([0, 7])
        with pytest.raises(ValueError, match="cu_seqlens and cu_seq_lens_q are two names"):
            form(**x, cu_seqlens=bounds, cu_seq_lens_q=bounds.clone())
    with pytest.raises(NotImplementedError, match=r"cp_context must be None, got object: .* not computed yet"):
        GATED[op][0](**x, cp_context=object())


@each_gated
def test_the_second_name_of_the_packing(op):
    x, bounds = inputs(op, B=1), torch.tensor([0, 3, 7])
    for form in GATED[op]:
        expected = form(**x, cu_seqlens=bounds)[0]
        for given in ({"cu_seq_lens_q": bounds}, {"cu_seq_lens_q": bounds, "cu_seqlens": bounds}):
            assert torch.equal(form(**x, **given)[0], expected)
        assert "cu_seq_lens_q" in inspect.signature(form).parameters


@pytest.mark.parametrize(
    "value, error", ((0.0, ValueError), (1.0, ValueError), (float("nan"), ValueError), ("-5", TypeError))
)
def test_a_lower_bound_is_below_zero(value, error):
    for form in GATED["kda"]:
        with pytest.raises(error, match="lower_bound must be"):
            form(**inputs("kda"), lower_bound=value)
    with pytest.raises(error, match="lower_bound must be"):
        fused_kda_gate(torch.randn(2, 3, 4), torch.randn(3), lower_bound=value)


def test_a_safe_gate_made_in_the_op_needs_a_bound_that_is_safe():
    x = inputs("kda", "bounded")
    for bound in (None, -6.0):
        with pytest.raises(ValueError, match=r"lower_bound must lie in \[-5, 0\) with safe_gate"):
            chunk_kda(**x, use_gate_in_kernel=True, safe_gate=True, lower_bound=bound)
    plain = inputs("kda")
    assert torch.equal(chunk_kda(**plain, safe_gate=True, lower_bound=-6.0)[0], chunk_kda(**plain)[0])


def test_a_gate_of_the_wrong_rank_is_told_which_function_takes_it():
    x = inputs("kda")
    for form in GATED["kda"]:
        with pytest.raises(ValueError, match=r"g must have shape \[B, T, HV, K\].*chunk_gated_delta_rule takes"):
            form(**x | {"g": x["g"][..., 0]})
        with pytest.raises(ValueError, match=r"g must have shape .* fused_kda_gate\(g, A, head_k_dim\) takes"):
            form(**x | {"g": x["g"].flatten(2)})
    with pytest.raises(ValueError, match=r"A_log must have 5 elements, got 3.*former fused_kda_gate\(g"):
        fused_kda_gate(torch.randn(2, 5, 12), torch.randn(3))
    with pytest.raises(ValueError, match="A_log must be a tensor without lower_bound"):
        fused_kda_gate(torch.randn(2, 5, 3, 4))


def test_parameters_of_a_gate_have_as_many_elements_as_it_has_heads_and_channels():
    x = inputs("kda", "all in the op", H=2, HV=2)
    settings = variant("kda", "all in the op").settings
    expected = chunk_kda(**x, **settings)[0]
    shaped = x | {"A_log": x["A_log"].view(1, 1, 2, 1), "dt_bias": x["dt_bias"].flatten()}
    assert torch.equal(chunk_kda(**shaped, **settings)[0], expected)
    with pytest.raises(ValueError, match="dt_bias must have 32 elements, got 2"):
        chunk_kda(**x | {"dt_bias": x["dt_bias"][:, 0]}, **settings)


def test_arguments_without_effect():
    x = inputs("kda")
    expected = chunk_kda(**x)[0]
    assert torch.equal(chunk_kda(**x, disable_recompute=True, use_graph=True, max_num_seqs=4)[0], expected)
    for name, value in (("disable_recompute", 1), ("use_graph", "yes"), ("max_num_seqs", "4")):
        with pytest.raises(TypeError, match=f"{name} must be"):
            chunk_kda(**x, **{name: value})
    y = inputs("gated_delta_rule")
    assert torch.equal(chunk_gdn(**y, chunk_indices=torch.zeros(1, 2, dtype=torch.int32))[0], chunk_gdn(**y)[0])
    assert chunk_gdn is chunk_gated_delta_rule and fused_recurrent_gdn is fused_recurrent_gated_delta_rule


def test_no_triton_kernels_yet(caplog, monkeypatch):
    """Asked for by name, Triton raises and says what there is; the log says why PyTorch computes."""
    from fla.backends import computes, family

    assert not computes("triton", "delta")
    with pytest.raises(ValueError, match="backend='triton' does not compute the family 'delta': backend='torch' does"):
        family("delta", "triton")
    monkeypatch.setattr("fla.backends._logged", set())
    with caplog.at_level("INFO", logger="fla"):
        chunk_kda(**inputs("kda"))
    assert [record.message for record in caplog.records] == [
        "chunk_kda: torch backend, which alone computes the family 'delta'"
    ]
