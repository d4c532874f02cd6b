"""What is special about the layers over the delta rule: weights and their first values, printed form, bad settings."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fla.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from fla.layers._decay import LOWEST_RATE, LearnedDecay
from fla.models.cache import Cache
from fla.testing import assert_within_budget
from tests.layers.cases import TYPES, D

DECAYING = [cls for cls in TYPES.values() if issubclass(cls, LearnedDecay)]
HEADS = {"hidden_size": D, "num_heads": 2, "num_v_heads": 4, "head_dim": 8}
KEYS = {
    "delta_net": (
        DeltaNet(hidden_size=D, num_heads=4, expand_k=0.5, use_gate=True, conv_bias=True),
        "q_proj.weight 16,32; k_proj.weight 16,32; v_proj.weight 32,32; b_proj.weight 4,32; q_conv1d.weight 16,1,4; "
        "q_conv1d.bias 16; k_conv1d.weight 16,1,4; k_conv1d.bias 16; v_conv1d.weight 32,1,4; v_conv1d.bias 32; "
        "g_proj.weight 32,32; o_norm.weight 8; o_proj.weight 32,32",
    ),
    "delta_net-bare": (
        DeltaNet(d_model=D, num_heads=4, use_beta=False, use_short_conv=False),
        "q_proj.weight 32,32; k_proj.weight 32,32; v_proj.weight 32,32; o_norm.weight 8; o_proj.weight 32,32",
    ),
    "gated_deltanet": (
        GatedDeltaNet(**HEADS),
        "A_log 4; dt_bias 4; q_proj.weight 16,32; k_proj.weight 16,32; v_proj.weight 64,32; b_proj.weight 4,32; "
        "a_proj.weight 4,32; q_conv1d.weight 16,1,4; k_conv1d.weight 16,1,4; v_conv1d.weight 64,1,4; "
        "g_proj.weight 64,32; o_norm.weight 16; o_proj.weight 32,64",
    ),
    "kda": (
        KimiDeltaAttention(**HEADS, expand_v=0.5, conv_size=3),
        "A_log 4; dt_bias 32; q_proj.weight 16,32; k_proj.weight 16,32; v_proj.weight 16,32; q_conv1d.weight 16,1,3; "
        "k_conv1d.weight 16,1,3; v_conv1d.weight 16,1,3; f_proj.0.weight 4,32; f_proj.1.weight 32,4; "
        "b_proj.weight 4,32; g_proj.0.weight 4,32; g_proj.1.weight 16,4; g_proj.1.bias 16; o_norm.weight 4; "
        "o_proj.weight 32,16",
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_state_dict(name):
    layer, keys = KEYS[name]
    assert "; ".join(f"{k} {','.join(map(str, v.shape))}" for k, v in layer.state_dict().items()) == keys


def test_states():
    for layer, shape in (
        (DeltaNet(hidden_size=D, num_heads=4, expand_k=0.5, layer_idx=0), (2, 4, 4, 8)),
        (GatedDeltaNet(**HEADS, layer_idx=0), (2, 4, 8, 16)),
        (KimiDeltaAttention(**HEADS, expand_v=0.5, layer_idx=0), (2, 4, 8, 4)),
    ):
        cache = Cache()
        layer(torch.randn(2, 5, D), past_key_values=cache)
        state, convs = cache[0]["recurrent_state"], cache[0]["conv_state"]
        assert state.shape == shape and state.dtype == torch.float32 and len(convs) == 3
        assert layer.recurrent_size() == state[0].numel()


@pytest.mark.parametrize("cls", [GatedDeltaNet, KimiDeltaAttention])
def test_a_value_head_reads_the_key_head_of_its_group(cls):
    """Two key heads, four value heads: as with each key head written out twice, in the order 0, 0, 1, 1."""
    torch.manual_seed(0)
    grouped, whole, x = cls(**HEADS), cls(**{**HEADS, "num_heads": 4}), torch.randn(2, 20, D)
    weights = grouped.state_dict()
    for name in ("q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight"):
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(weights)
    reference = copy.deepcopy(whole).double()(x.double())[0]
    assert_within_budget("grouped heads", grouped(x)[0], reference, whole(x)[0])


# ---- the first values of the decay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "low", "high"),
    [
        (lambda **k: GatedDeltaNet(hidden_size=1, num_heads=1, use_short_conv=False, head_dim=1, **k), 0, 16),
        (lambda **k: KimiDeltaAttention(hidden_size=1, num_heads=1, use_short_conv=False, head_dim=1, **k), 1, 16),
    ],
    ids=["gated_deltanet", "kda"],
)
def test_the_decay_is_drawn_in_float32(build, low, high, dtype, monkeypatch):
    """Also in a bfloat16 model: 10^5 rates of which none has an infinite logarithm, and all their digits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = build(num_v_heads=100_000)
    finally:
        torch.set_default_dtype(before)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32 and layer.q_proj.weight.dtype == dtype
    rates, steps = layer.A_log.detach().double().exp(), F.softplus(layer.dt_bias.detach().double())
    assert layer.A_log.isfinite().all() and layer.A_log.unique().numel() > 90_000
    assert rates.min() >= 0.999 * max(low, LOWEST_RATE) and rates.max() <= 16.001
    assert abs(rates.mean() - (low + high) / 2) < 0.1 and abs(rates.std() - (high - low) / 12**0.5) < 0.1
    assert steps.min() >= 0.00099 and steps.max() <= 0.101
    assert abs(steps.log().mean() - torch.tensor([0.001, 0.1]).log().mean()) < 0.03  # log-uniform
    layer.bfloat16().reset_parameters()
    assert layer.A_log.dtype == torch.bfloat16 and layer.A_log.isfinite().all() and layer.dt_bias.isfinite().all()


def test_bounded_gates_begin_with_rates_of_1():
    assert not KimiDeltaAttention(**HEADS, safe_gate=True, lower_bound=-5.0).A_log.any()
    assert KimiDeltaAttention(**HEADS, lower_bound=-5.0).A_log.all()


@pytest.mark.parametrize("cls", DECAYING)
def test_the_decay_has_no_weight_decay_and_stays_what_was_loaded(cls):
    torch.manual_seed(0)
    layer = cls(**{"hidden_size": D, **cls.tiny})
    marked = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias"}
    layer.A_log = torch.nn.Parameter(torch.ones_like(layer.A_log))  # as loaders put a weight in place
    assert layer.A_log._no_weight_decay
    layer.A_log._is_hf_initialized = True
    before = layer.dt_bias.clone()
    layer.reset_parameters()
    assert (layer.A_log == 1).all() and not torch.equal(layer.dt_bias, before)


def test_an_unused_weight_of_the_first_release_is_dropped():
    layer = GatedDeltaNet(**HEADS)
    torch.nn.Sequential(layer).load_state_dict(
        {f"0.{k}": v for k, v in layer.state_dict().items()} | {"0.D": torch.ones(4)}
    )
    with pytest.raises(RuntimeError, match="E"):
        layer.load_state_dict(layer.state_dict() | {"E": torch.ones(4)})


# ---- settings


@pytest.mark.parametrize("cls", [GatedDeltaNet, KimiDeltaAttention])
def test_negative_eigenvalues_double_beta(cls):
    """With beta near 2 and equal keys, what a write reads is turned round: the second token undoes the first."""
    torch.manual_seed(0)
    plain, twice = (cls(**HEADS, allow_neg_eigval=flag, use_short_conv=False).double() for flag in (False, True))
    twice.load_state_dict(plain.state_dict())
    for layer in (plain, twice):
        layer.b_proj.weight.data.fill_(1.0)
    x = torch.ones(1, 2, D).double()
    expected = {flag: layer.naive(x) for flag, layer in ((False, plain), (True, twice))}
    for flag, layer in ((False, plain), (True, twice)):
        torch.testing.assert_close(layer(x)[0], expected[flag])
    assert not torch.allclose(expected[False], expected[True])


@pytest.mark.parametrize("lower_bound", [-5.0, -0.5])
def test_bounded_decay_by_its_formula(lower_bound):
    layer = KimiDeltaAttention(**HEADS, lower_bound=lower_bound).double()
    g, _ = layer.naive_gates(100 * torch.randn(1, 50, D).double())
    assert g.shape == (1, 50, 4, 8) and g.min() >= lower_bound and g.max() <= 0
    assert g.min() < 0.99 * lower_bound


def test_sums_of_zero_divide_nothing():
    """ReLU may leave a head no key at all: it writes and reads nothing, and gets finite gradients."""
    layer = DeltaNet(hidden_size=D, num_heads=4, qk_activation="relu", qk_norm="sum", use_short_conv=False)
    x = torch.randn(2, 7, D)
    x[0] = 0
    x.requires_grad_()
    o = layer(x)[0]
    o.square().sum().backward()
    assert o.isfinite().all() and not o[0].any() and o[1].any() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: DeltaNet(hidden_size=D, qk_norm="l1"), ValueError, "qk_norm must be 'l2' or 'sum', got 'l1'"),
        (
            lambda: DeltaNet(hidden_size=D, qk_activation="tanh"),
            ValueError,
            "qk_activation must be one of silu, relu, elu, identity, got 'tanh'",
        ),
        (
            lambda: DeltaNet(hidden_size=D, num_heads=4, expand_k=0.3),
            ValueError,
            r"expand_k \* hidden_size must be a positive multiple of num_heads=4, got 0.3 \* 32 = 9",
        ),
        (lambda: DeltaNet(hidden_size=D, num_heads=3), ValueError, "expand_k .* multiple of num_heads=3"),
        (lambda: DeltaNet(mode="warp", hidden_size=D), ValueError, "mode must be one of chunk, .*, got 'warp'"),
        (
            lambda: GatedDeltaNet(**HEADS, expand_v=1.3),
            ValueError,
            r"expand_v \* head_dim must be a whole number of at least 1, got 1.3 \* 8 = 10.4",
        ),
        (lambda: KimiDeltaAttention(**HEADS, expand_v=0.1), ValueError, r"expand_v \* head_dim must be"),
        (
            lambda: GatedDeltaNet(hidden_size=D, head_dim=8, num_heads=2, num_v_heads=3),
            ValueError,
            "num_v_heads must be a multiple of num_heads=2, got 3",
        ),
        (
            lambda: KimiDeltaAttention(hidden_size=D, head_dim=8, num_heads=4, num_v_heads=2),
            ValueError,
            "num_v_heads must be a multiple of num_heads=4, got 2",
        ),
        (
            lambda: KimiDeltaAttention(**HEADS, safe_gate=True),
            ValueError,
            "lower_bound must be of at least -5 and below 0 with safe_gate=True, got None",
        ),
        (
            lambda: KimiDeltaAttention(**HEADS, safe_gate=True, lower_bound=-6),
            ValueError,
            "lower_bound must be of at least -5 and below 0 with safe_gate=True, got -6",
        ),
        (lambda: KimiDeltaAttention(**HEADS, lower_bound=0), ValueError, "lower_bound must be .* below 0, got 0"),
        (lambda: KimiDeltaAttention(**HEADS, conv_size=0), ValueError, "conv_size must be at least 1, got 0"),
    ],
)
def test_what_bad_settings_get(build, error, match):
    with pytest.raises(error, match=f"^{match}"):
        build()


def test_whole_widths_need_no_whole_factor():
    assert GatedDeltaNet(hidden_size=D, head_dim=10, num_heads=2, expand_v=1.1).head_v_dim == 11
