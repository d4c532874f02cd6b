"""Situations of the delta rule, the gated delta rule and KDA that users met elsewhere, and what is right there."""

import pytest
import torch
import torch.nn.functional as F

from fla.ops import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from fla.ops._spec import REGISTRY
from fla.ops.delta_rule import delta_rule_recurrence
from fla.testing import assert_within_budget
from fla.testing.contract import Case, check_values
from tests.families.delta import GATED, OPS, each_gated, inputs, same, variant


@pytest.mark.parametrize("T", (7, 50, 64, 100, 512))
def test_without_decay_the_gated_rule_is_the_delta_rule(T):
    x = inputs("delta_rule", T=T, K=64, V=64, B=1)
    g = torch.zeros_like(x["beta"])
    naive, exact = (REGISTRY["delta_rule"].reference(**y)[0] for y in (x, {name: t.double() for name, t in x.items()}))
    for found in (
        chunk_delta_rule(**x)[0],
        chunk_gated_delta_rule(**x, g=g)[0],
        fused_recurrent_gated_delta_rule(**x, g=g)[0],
        fused_recurrent_delta_rule(**x)[0],
    ):
        assert_within_budget("o", found, exact, naive)


def test_values_that_decay_by_channel():
    """`gv` against a loop of six lines: what a key gives is taken off after all decays."""
    x = inputs("gated_delta_rule", "every gate", T=33, H=2, HV=2, V=24, dtype=torch.float64)
    state, expected = torch.zeros(2, 2, 16, 24, dtype=torch.float64), []
    for t in range(33):
        decays = x["g"][:, t, :, None, None] + x["gk"][:, t, :, :, None] + x["gv"][:, t, :, None, :]
        state = state * decays.exp()
        new = x["beta"][:, t] * (x["v"][:, t] - (state.mT @ x["k"][:, t, :, :, None])[..., 0])
        state = state + x["k"][:, t, :, :, None] * new[:, :, None]
        expected.append((state.mT @ x["q"][:, t, :, :, None])[..., 0] / 4)
    same(fused_recurrent_gated_delta_rule(**x)[0], torch.stack(expected, 1))


@each_gated
def test_a_value_head_reads_the_key_head_of_its_group(op):
    """With 2 key heads and 4 value heads, value head h reads key head h // 2: not h % 2."""
    x = inputs(op, T=70, H=2, HV=4, dtype=torch.float64)
    grouped = {name: t.repeat_interleave(2, 2) if name in "qk" else t for name, t in x.items()}
    tiled = {name: t.repeat(1, 1, 2, 1) if name in "qk" else t for name, t in x.items()}
    for form in GATED[op]:
        o, _ = form(**x)
        same(o, form(**grouped)[0])
        assert (o - form(**tiled)[0]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strong_decays_of_channels_over_whole_chunks(dtype):
    """Gates of -5 a token over 130 tokens: no product of e^(g - ref) and e^(ref - g) overflows."""
    case = Case(REGISTRY["kda"], "chunk", variant("kda", "default"), tokens=130, dtype=dtype, gates=-5.0, batch=1)
    check_values(case)


def test_a_later_gate_changes_nothing_before_it():
    """KDA with a bounded gate made in the op: outputs and gradients of tokens 0 to 20, when the gate of 21 changes."""
    torch.manual_seed(0)
    shape = (1, 22, 4, 128)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
    x = {
        "q": q,
        "k": F.normalize(k, dim=-1),
        "v": v,
        "g": (-0.5 - 0.2 * torch.rand(shape)).bfloat16(),
        "beta": torch.ones(1, 22, 4),
        "A_log": (1 + 15 * torch.rand(4)).log(),
    }
    settings = {"use_gate_in_kernel": True, "safe_gate": True, "lower_bound": -5.0}
    changed = x | {"g": torch.cat((x["g"][:, :21], torch.full_like(x["g"][:, 21:], 3.0)), 1)}

    def first(x):
        leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
        o, _ = chunk_kda(**leaves, **settings)
        gradients = torch.autograd.grad(o[:, :21].float().square().sum(), list(leaves.values()))
        return [o[:, :21], *(d[:, :21] if d.dim() > 1 else d for d in gradients)]

    for one, other in zip(first(x), first(changed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_short_inputs(op):
    for T in range(1, 18):
        case = Case(REGISTRY[op], ("chunk", "fused_recurrent")[T % 2], variant(op, "default"), tokens=T, batch=1)
        check_values(case)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ("chunk", "fused_recurrent"))
def test_empty_sequences_keep_their_state(op, form):
    """And the gradient of the state goes through them unchanged."""
    case = Case(REGISTRY[op], form, variant(op, "default"), tokens=(0, 5, 0, 7))
    made = case.inputs()
    state = made["initial_state"].requires_grad_()
    o, final = case.function(**made, cu_seqlens=case.cu_seqlens, output_final_state=True)
    assert o.isfinite().all() and torch.equal(final[::2], state[::2])
    incoming = torch.randn_like(final)
    (d,) = torch.autograd.grad(final, state, incoming)
    assert torch.equal(d[::2], incoming[::2]) and not torch.equal(d[1::2], incoming[1::2])


@pytest.mark.parametrize("op", OPS)
def test_a_state_of_64_tokens_goes_on_as_from_the_start(op):
    x = inputs(op, T=66, dtype=torch.float64, B=1)
    forms = [REGISTRY[op].forms[name] for name in ("chunk", "fused_recurrent")]
    expected, _ = forms[0](**x)
    _, state = forms[0](**{name: t[:, :64] for name, t in x.items()}, output_final_state=True)
    for form in forms:
        o, _ = form(**{name: t[:, 64:65] for name, t in x.items()}, initial_state=state)
        same(o, expected[:, 64:65])


@pytest.mark.parametrize("op", OPS)
def test_a_slot_that_was_used_before(op):
    """A request without a prefix takes a slot filled with 7.0 and zeroes it: outputs as from zeros."""
    x = {name: t[:1] for name, t in inputs(op, T=1).items()}
    form = REGISTRY[op].forms["fused_recurrent"]
    heads = x["v"].shape[2]
    pool = torch.full((3, heads, 16, 16), 7.0)
    pool[1].zero_()
    with torch.no_grad():
        o, _ = form(**x, initial_state=pool, state_indices=torch.tensor([1]), inplace_final_state=True)
    torch.testing.assert_close(o, form(**x)[0])
    assert (pool[::2] == 7.0).all() and pool[1].count_nonzero()


def test_beta_outside_of_0_to_2_and_negative_eigenvalues():
    for scale in (2.0, -0.5):
        x = {name: t.double() for name, t in inputs("delta_rule", T=70).items()}
        x["beta"] = x["beta"] * scale
        same(chunk_delta_rule(**x)[0], delta_rule_recurrence(**x)[0])
