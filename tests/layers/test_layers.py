"""What is special about a layer: names and shapes of weights, printed form, bad input, building from a config."""

import copy
import inspect
import types
import typing

import pytest
import torch
from transformers import DynamicCache
from transformers.activations import ACT2FN as THEIRS

from fla.layers import (
    Attention,
    GatedLinearAttention,
    LinearAttention,
    MultiScaleRetention,
    SimpleGatedLinearAttention,
)
from fla.layers._heads import MultiHeadMixer
from fla.layers.utils import Padding
from fla.models.cache import Cache
from fla.modules.activations import ACT2FN
from tests.layers.cases import CASES, IDX, PLAIN, D

EVERY = [CASES[name].cls for name in PLAIN]
HEADED = [cls for cls in EVERY if issubclass(cls, MultiHeadMixer)]
LINEAR = [GatedLinearAttention, LinearAttention, MultiScaleRetention, SimpleGatedLinearAttention]


def tiny(cls, **settings):
    """The smallest layer of its kind."""
    return cls(**{"hidden_size": D, **cls.tiny, **settings})


SEED_RETNET = """
MultiScaleRetention(
(q_proj): Linear(in_features=1024, out_features=1024, bias=False)
(k_proj): Linear(in_features=1024, out_features=1024, bias=False)
(v_proj): Linear(in_features=1024, out_features=2048, bias=False)
(g_proj): Linear(in_features=1024, out_features=2048, bias=False)
(o_proj): Linear(in_features=2048, out_features=1024, bias=False)
(g_norm_swish_gate): FusedRMSNormSwishGate(512, eps=1e-05)
(rotary): RotaryEmbedding()
)
"""
SEED_GLA = """
GatedLinearAttention(
(q_proj): Linear(in_features=2048, out_features=1024, bias=False)
(k_proj): Linear(in_features=2048, out_features=1024, bias=False)
(v_proj): Linear(in_features=2048, out_features=2048, bias=False)
(g_proj): Linear(in_features=2048, out_features=2048, bias=False)
(gk_proj): Sequential(
(0): Linear(in_features=2048, out_features=16, bias=False)
(1): Linear(in_features=16, out_features=1024, bias=True)
)
(o_proj): Linear(in_features=2048, out_features=2048, bias=False)
(g_norm_swish_gate): FusedRMSNormSwishGate(512, eps=1e-06)
)
"""


@pytest.mark.parametrize(
    ("layer", "printed"),
    [
        (lambda: MultiScaleRetention(hidden_size=1024, num_heads=4), SEED_RETNET),
        (lambda: GatedLinearAttention(hidden_size=2048, norm_eps=1e-6), SEED_GLA),
    ],
    ids=["retnet", "gla"],
)
def test_prints_what_the_readme_prints(layer, printed):
    assert [line.strip() for line in repr(layer()).splitlines()] == printed.split("\n")[1:-1]


def test_the_readme_example():
    layer = MultiScaleRetention(hidden_size=64, num_heads=4).to(dtype=torch.bfloat16)
    y, *_ = layer(torch.randn(2, 100, 64).to(dtype=torch.bfloat16))
    assert y.shape == (2, 100, 64)
    assert y.dtype == torch.bfloat16


# Shapes for hidden_size 32, 4 heads of which 2 for keys and values, short convolutions of width 4 with biases.
GQA = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 2}
CONV = {"use_short_conv": True, "conv_bias": True}
KEYS = {
    "gla": (
        GatedLinearAttention(**GQA, **CONV),
        "q_proj.weight 16,32; k_proj.weight 8,32; v_proj.weight 16,32; g_proj.weight 32,32; q_conv1d.weight 16,1,4; "
        "q_conv1d.bias 16; k_conv1d.weight 8,1,4; k_conv1d.bias 8; v_conv1d.weight 16,1,4; v_conv1d.bias 16; "
        "gk_proj.0.weight 16,32; gk_proj.1.weight 8,16; gk_proj.1.bias 8; o_proj.weight 32,32; "
        "g_norm_swish_gate.weight 8",
    ),
    "gla-sigmoid": (
        GatedLinearAttention(**GQA, gate_fn="sigmoid"),
        "q_proj.weight 16,32; k_proj.weight 8,32; v_proj.weight 16,32; g_proj.weight 32,32; gk_proj.0.weight 16,32; "
        "gk_proj.1.weight 8,16; gk_proj.1.bias 8; o_proj.weight 32,32; g_norm.weight 8",
    ),
    "retnet": (
        MultiScaleRetention(**GQA, use_output_gate=False),
        "q_proj.weight 32,32; k_proj.weight 16,32; v_proj.weight 32,32; o_proj.weight 32,64; g_norm.weight 16",
    ),
    "simple-gla": (
        SimpleGatedLinearAttention(**GQA, fuse_norm=False),
        "q_proj.weight 32,32; k_proj.weight 16,32; v_proj.weight 16,32; g_proj.weight 32,32; q_conv1d.weight 32,1,4; "
        "k_conv1d.weight 16,1,4; v_conv1d.weight 16,1,4; gk_proj.weight 4,32; gk_proj.bias 4; o_proj.weight 32,32; "
        "g_norm.weight 8",
    ),
    "linear": (
        LinearAttention(**GQA),
        "q_proj.weight 32,32; k_proj.weight 16,32; v_proj.weight 16,32; feature_map_q.layer1.weight 8,8; "
        "feature_map_q.layer1.bias 8; feature_map_q.layer2.weight 8,8; feature_map_q.layer2.bias 8; "
        "feature_map_k.layer1.weight 8,8; feature_map_k.layer1.bias 8; feature_map_k.layer2.weight 8,8; "
        "feature_map_k.layer2.bias 8; norm.weight 8; o_proj.weight 32,32",
    ),
    "attention": (
        Attention(**GQA, qkv_bias=True, qk_norm=True),
        "q_proj.weight 32,32; q_proj.bias 32; k_proj.weight 16,32; k_proj.bias 16; v_proj.weight 16,32; "
        "v_proj.bias 16; o_proj.weight 32,32; q_norm.weight 8; k_norm.weight 8",
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_state_dict(name):
    layer, keys = KEYS[name]
    assert "; ".join(f"{k} {','.join(map(str, v.shape))}" for k, v in layer.state_dict().items()) == keys


@pytest.mark.parametrize("cls", [GatedLinearAttention, MultiScaleRetention, SimpleGatedLinearAttention])
def test_both_names_of_the_output_norm_load(cls):
    fused, plain = cls(hidden_size=D, num_heads=2), cls(hidden_size=D, num_heads=2, fuse_norm=False)
    for layer in (fused, plain):
        torch.nn.init.normal_(
            dict(layer.named_parameters())["g_norm_swish_gate.weight" if layer is fused else "g_norm.weight"]
        )
    x = torch.randn(1, 7, D)
    for source, target in ((fused, plain), (plain, fused)):
        wrapped = torch.nn.Sequential(cls(hidden_size=D, num_heads=2, fuse_norm=target is fused))
        wrapped.load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()})
        torch.testing.assert_close(wrapped(x)[0], source(x)[0])
        assert set(wrapped[0].state_dict()) == set(target.state_dict())


def test_a_missing_norm_is_still_missing():
    layer = GatedLinearAttention(hidden_size=D, num_heads=2)
    state = layer.state_dict()
    del state["g_norm_swish_gate.weight"]
    with pytest.raises(RuntimeError, match="g_norm_swish_gate"):
        layer.load_state_dict(state)


def test_tied_feature_maps_are_one():
    layer = LinearAttention(hidden_size=D, num_heads=2, feature_map="t2r", tie_feature_map_qk=True)
    assert layer.feature_map_q is layer.feature_map_k
    assert len(list(layer.feature_map_q.parameters())) == 1


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "elementwise_product", "dpfp", "elu", "relu", "identity"])
def test_every_feature_map_runs(feature_map):
    layer = LinearAttention(hidden_size=D, num_heads=2, feature_map=feature_map, layer_idx=0)
    x, cache = torch.randn(1, 9, D), Cache()
    whole = layer(x)[0]
    pieces = torch.cat([layer(piece, past_key_values=cache)[0] for piece in x.split(4, 1)], 1)
    torch.testing.assert_close(pieces, whole)


def test_state_size():
    assert GatedLinearAttention(**GQA, use_short_conv=True).state_size() == 16 * 8 + (16 + 8 + 16) * 4
    assert MultiScaleRetention(hidden_size=D, num_heads=4).state_size() == 32 * 16
    assert LinearAttention(hidden_size=D, num_heads=4, feature_map="hedgehog").state_size() == 4 * 16 * 8
    assert Attention(**GQA, window_size=5).state_size() == 2 * 16 * 5
    assert Attention(**GQA, window_size=5).state_size(sequence_length=3) == 2 * 16 * 3
    with pytest.raises(ValueError, match="sequence_length must be given"):
        Attention(**GQA).state_size()
    with pytest.raises(TypeError, match="sequence_lenght"):
        Attention(**GQA).state_size(sequence_lenght=5)


@pytest.mark.parametrize("name", CASES)
def test_state_size_is_what_the_cache_holds(name):
    layer, cache = CASES[name].build(layer_idx=IDX), Cache()
    layer(torch.randn(1, 9, D), past_key_values=cache)
    tensors = [x for slot in cache[IDX].values() for x in (slot if isinstance(slot, tuple) else (slot,))]
    assert layer.state_size(sequence_length=9) == sum(x.numel() for x in tensors)


@pytest.mark.parametrize("cls", EVERY)
def test_unknown_settings_get_a_type_error(cls):
    with pytest.raises(TypeError, match="unknown_setting"):
        cls(hidden_size=D, unknown_setting=1)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        tiny(cls, hidden_size=0)


# Settings that have another range than above 0 -> what is said of 1.0.
NEGATIVE = {"clamp_min": "of at most 0", "lower_bound": "below 0"}
NEVER = {
    bool: [("false", TypeError, "True or False, got str 'false'"), (1, TypeError, "True or False, got int 1")],
    int: [("4", TypeError, "an int, got str '4'"), (2.0, TypeError, "an int, got float"), (-1, ValueError, "got -1")],
    float: [
        ("0.5", TypeError, "a number, got str '0.5'"),
        (float("nan"), ValueError, "a finite number .*, got nan"),
        (float("inf"), ValueError, "a finite number .*, got inf"),
        (-1, ValueError, "a finite number .*, got -1"),
    ],
    str: [(3, TypeError, "a string, got int 3")],
}


@pytest.mark.parametrize("cls", EVERY)
def test_no_setting_takes_what_it_cannot_be(cls):
    annotations = typing.get_type_hints(cls.__init__)
    for name in set(inspect.signature(cls).parameters) & set(annotations):
        (kind,) = (set(typing.get_args(annotations[name])) or {annotations[name]}) - {type(None)}
        for value, error, message in NEVER[kind]:
            if name in NEGATIVE and value == -1:
                value, message = 1.0, f"a finite number {NEGATIVE[name]}, got 1.0"
            with pytest.raises(error, match=f"^{name} must be .*{message}"):
                tiny(cls, **{name: value})


@pytest.mark.parametrize("cls", EVERY)
def test_every_layer_runs_as_it_is_by_default(cls):
    layer = cls()
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():  # it begins at zero, where nothing behind it would get a gradient
                parameter.normal_(std=0.1)
    x = torch.randn(2, 65, layer.hidden_size, requires_grad=True)
    o = layer(x)[0]
    assert o.shape == x.shape and o.isfinite().all()
    o.square().mean().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        if tensor.grad is None:
            assert layer.inputs, name  # a weight for what a model hands over, which nobody has here
        else:
            assert tensor.grad.isfinite().all() and tensor.grad.any(), name


@pytest.mark.parametrize("cls", EVERY)
def test_layers_are_copied_without_their_settings(cls):
    """`copy` and `pickle` call `__new__` without arguments."""
    layer = tiny(cls)
    assert str(copy.deepcopy(layer)) == str(layer)


@pytest.mark.parametrize("cls", HEADED)
def test_what_bad_settings_of_heads_get(cls):
    for changes, error, match in (
        ({"num_heads": 3}, ValueError, "num_heads"),
        ({"num_heads": "4"}, TypeError, "num_heads must be an int, got str '4'"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads=4, got 3"),
    ):
        with pytest.raises(error, match=match):
            tiny(cls, **changes)


@pytest.mark.parametrize("cls", LINEAR)
def test_what_bad_settings_of_linear_layers_get(cls):
    with pytest.raises(ValueError, match=r"mode must be one of chunk, .*fused_recurrent.*, got 'warp'"):
        cls(mode="warp", hidden_size=D, num_heads=2)
    with pytest.raises(ValueError, match=r"expand_k \* hidden_size must be a positive multiple of num_heads=4"):
        cls(hidden_size=D, num_heads=4, expand_k=0.3)
    with pytest.raises(ValueError, match=r"expand_v \* hidden_size must be a positive multiple of num_heads=4"):
        cls(hidden_size=D, num_heads=4, expand_v=0.01)
    with pytest.raises(ValueError, match=r"expand_v must be a finite number above 0, got 0.0"):
        cls(hidden_size=D, num_heads=4, expand_v=0.0)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: GatedLinearAttention(hidden_size=D, num_heads=2, gate_fn="tanh?"), "gate_fn must be one of relu"),
        (
            lambda: GatedLinearAttention(hidden_size=D, num_heads=2, feature_map="bias_gelu"),
            "feature_map must be one of",
        ),
        (
            lambda: LinearAttention(hidden_size=D, num_heads=2, feature_map="swish?"),
            "feature_map must be one of hedgehog",
        ),
        (lambda: LinearAttention(hidden_size=D, num_heads=2, output_norm="layernorm"), "output_norm must be 'rmsnorm'"),
        (lambda: SimpleGatedLinearAttention(hidden_size=D, num_heads=2, conv_size=0), "conv_size must be at least 1"),
        (lambda: MultiScaleRetention(hidden_size=12, num_heads=4), "must be even to rotate, got 3"),
        (
            lambda: Attention(hidden_size=12, num_heads=4),
            r"hidden_size must be a multiple of 2 \* num_heads = 8, got 12",
        ),
        (lambda: Attention(hidden_size=D, num_heads=2, window_size=0), "window_size must be at least 1"),
    ],
)
def test_what_bad_settings_of_one_layer_get(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize("cls", EVERY)
def test_what_bad_calls_get(cls):
    layer, x = tiny(cls, layer_idx=0), torch.randn(2, 5, D)
    for changes, error, match in (
        ({"hidden_states": x[0]}, ValueError, "hidden_states must have shape"),
        ({"hidden_states": x[..., :8]}, ValueError, rf"hidden_states must have shape \[B, T, {D}\], got \[2, 5, 8\]$"),
        ({"hidden_states": x.long()}, TypeError, "hidden_states must be a floating-point tensor"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask must have shape \[2, at least 5\]"),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, r"attention_mask must have shape \[2, at least 5\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, ValueError, "attention_mask must have shape"),
        ({"attention_mask": [1, 1]}, TypeError, "attention_mask must be a tensor"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "batch size 1, got 2"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
        ({"cu_seqlens": torch.tensor([0, 4]), "hidden_states": x[:1]}, ValueError, "cu_seqlens must end at"),
        ({"cu_seqlens": torch.tensor([0, 5]), "cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, "two names"),
        ({"output_attentions": True}, ValueError, "output_attentions must be False"),
        (
            {"padding": Padding.from_mask(torch.eye(5), 5)},
            ValueError,
            r"padding must be of a batch \[2, 5\], got \[5, 5\]",
        ),
    ):
        with pytest.raises(error, match=match):
            layer(**({"hidden_states": x} | changes))


@pytest.mark.parametrize("cls", EVERY)
def test_what_unknown_keywords_get(cls):
    layer, x = tiny(cls, layer_idx=0), torch.randn(1, 5, D)
    for name, hint in (
        ("cu_seqlen", "did you mean cu_seqlens?"),
        ("attn_mask", "did you mean attention_mask?"),
        ("past_key_value", "did you mean past_key_values?"),
        ("zzz", "the keywords are hidden_states, attention_mask, past_key_values"),
    ):
        with pytest.raises(TypeError) as error:
            layer(x, **{name: None})
        assert f"{name!r} of {cls.__name__}.forward()" in str(error.value) and hint in str(error.value)
    known = {"position_ids": torch.arange(5)[None], "cu_seq_lens_k": None, "max_length_q": 5, "max_length_k": 5}
    of_others = {name: None for other in EVERY for name in other.inputs if name not in layer.inputs}
    assert torch.equal(layer(x, **known, **of_others)[0], layer(x)[0])


@pytest.mark.parametrize("name", PLAIN)
def test_the_packing_on_the_cpu_is_enough(name):
    layer, x, bounds = CASES[name].build(), torch.randn(1, 5, D), torch.tensor([0, 2, 5])
    expected = layer(x, cu_seqlens=bounds)[0]
    assert torch.equal(layer(x, cu_seqlens_cpu=bounds)[0], expected)
    assert torch.equal(layer(x, cu_seqlens=bounds, cu_seqlens_cpu=bounds)[0], expected)
    assert not torch.allclose(layer(x)[0], expected)


@pytest.mark.parametrize("cls", EVERY)
def test_what_caches_that_do_not_fit_get(cls):
    layer, cache, x = tiny(cls, layer_idx=0), Cache(), torch.randn(3, 5, D)
    layer(x[:2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"^past_key_values must hold .* as this call has, 3, got those of 2$"):
        layer(x, past_key_values=cache)
    with pytest.raises(TypeError, match=r"^past_key_values must be a fla.models.utils.Cache .*, got DynamicCache$"):
        layer(x, past_key_values=DynamicCache())
    with pytest.raises(TypeError, match=r"^past_key_values must be a fla.models.utils.Cache .*, got list$"):
        layer(x, past_key_values=[(x, x)])
    if not cls.uses_positions:
        with pytest.raises(ValueError, match=r"^past_key_values must hold .* as this call has, 1, got those of 2$"):
            layer(x[:1], past_key_values=cache, cu_seqlens=torch.tensor([0, 5]))


def test_attention_by_position():
    layer, cache, x = Attention(D, 2, layer_idx=0), Cache(), torch.randn(2, 5, D)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        layer(x, None, cache, True)
    expected = layer(x)[0]
    o, _, returned = layer(x, None, cache, False, True)
    torch.testing.assert_close(o, expected)
    assert returned is cache
    assert (layer.qkv_bias, layer.rope_theta) == (False, 10000.0)


def test_attention_takes_the_packing_of_a_batch():
    """`cu_seqlens` may bound all rows one after the other: the rows themselves, or sequences that end anywhere."""
    layer, x = Attention(D, 2), torch.randn(2, 5, D)
    for bounds in ([0, 5, 10], [0, 2, 5, 6, 10], [0, 10]):
        for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seqlens_cpu"):
            o = layer(x, **{name: torch.tensor(bounds)})[0]
            expected = layer(x.reshape(1, 10, D), cu_seqlens=torch.tensor(bounds))[0]
            assert torch.equal(o, expected.view(2, 5, D))
    torch.testing.assert_close(layer(x, cu_seqlens=torch.tensor([0, 5, 10]))[0], layer(x)[0])


@pytest.mark.parametrize("name", sorted(set(ACT2FN) & set(THEIRS)))
def test_activations_by_name(name):
    """Every name that transformers has, with its meaning, as gate and as feature map."""
    x, theirs = torch.linspace(-3, 3, 64).view(1, 2, D), THEIRS[name].float()
    for cls in (GatedLinearAttention, MultiScaleRetention, SimpleGatedLinearAttention):
        layer = tiny(cls, gate_fn=name, feature_map=name, fuse_norm=False)
        for function in (layer.gate_fn, layer.feature_map_fn):
            if list(theirs.parameters()):  # which transformers rounds to bfloat16
                function.load_state_dict(theirs.state_dict())
            torch.testing.assert_close(function(x), theirs(x))
        layer(x)[0].sum().backward()


def test_no_activation_of_transformers_is_missing():
    assert set(THEIRS) <= set(ACT2FN)


@pytest.mark.parametrize("cls", [cls for cls in EVERY if cls.uses_positions])
def test_positions_need_the_whole_mask(cls):
    layer, cache, x = tiny(cls, layer_idx=0), Cache(), torch.randn(2, 5, D)
    layer(x, attention_mask=torch.ones(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask must cover the cached tokens too: 5 \+ 1 columns, got 1"):
        layer(x[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


@pytest.mark.parametrize("cls", EVERY)
def test_padding_handed_down_by_a_model(cls):
    layer, x = tiny(cls), torch.randn(2, 5, D)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    padding = Padding.from_mask(mask, 5)
    assert torch.equal(padding.mask(), mask.bool())
    expected = layer(x, attention_mask=mask)[0]
    assert torch.equal(layer(x, attention_mask=mask, padding=padding)[0], expected)
    assert torch.equal(layer(x, padding=padding)[0], expected)
    # None says that the model looked: the mask is not read again
    assert torch.equal(layer(x, attention_mask=mask, padding=None)[0], layer(x)[0])
    assert Padding.from_mask(torch.cat([mask, torch.ones(2, 3)], 1), 3) is None


@pytest.mark.parametrize("cls", LINEAR)
def test_from_config(cls):
    config = types.SimpleNamespace(
        attn_mode="fused_chunk", hidden_size=D, num_heads=4, num_kv_heads=2, norm_eps=1e-3, layer_idx=99, vocab_size=7
    )
    config.norm_feature_map = True
    layer = cls.from_config(config, layer_idx=3)
    assert (layer.mode, layer.num_heads, layer.num_kv_heads, layer.layer_idx) == ("fused_chunk", 4, 2, 3)
    assert getattr(layer, "do_feature_map_norm", True)


def test_attention_from_config():
    config = types.SimpleNamespace(hidden_size=D, num_heads=2, window_size=3, attn_mode="chunk", rope_theta=5.0)
    layer = Attention.from_config(config)
    assert (layer.window_size, layer.layer_idx, layer.mode) == (3, None, None)
