"""What is special about RWKV-6's layer: its weights and their names, the mixed tokens, very strong decays."""

import pytest
import torch
from torch import nn

from fla.layers import RWKV6Attention
from fla.layers.rwkv6 import DDLerpLinear, LerpLinear, LoRA, RWKV6ChannelMix
from fla.models.cache import Cache
from fla.modules.token_shift import token_shift
from tests.layers.cases import CASES, D, check_rows, rows_of

TINY = {"hidden_size": D, "num_heads": 2, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}


def shapes(module: nn.Module) -> str:
    return "; ".join(f"{k} {','.join(map(str, v.shape))}" for k, v in module.state_dict().items())


def test_state_dict():
    assert shapes(RWKV6Attention(**TINY, expand_v=2.0)) == (
        "x_bias 5,32; bonus 2,8; x_proj.0.mu 32; x_proj.0.linear.weight 15,32; x_proj.2.weight 32,15; "
        "r_proj.linear.weight 16,32; k_proj.linear.weight 16,32; w_proj.linear.lora.0.weight 5,32; "
        "w_proj.linear.lora.2.weight 16,5; w_proj.linear.lora.2.bias 16; v_proj.linear.weight 64,32; "
        "g_proj.linear.weight 64,32; g_norm.weight 64; g_norm.bias 64; o_proj.weight 32,64"
    )
    assert shapes(RWKV6ChannelMix(100)) == (
        "key.mu 100; key.linear.weight 352,100; value.weight 100,352; receptance.mu 100; "
        "receptance.linear.weight 100,100"
    )
    assert "g_norm.weight" not in RWKV6Attention(**TINY, elementwise_affine=False).state_dict()


def test_the_default_layer_trains():
    layer, x = RWKV6Attention(), torch.randn(2, 65, 1024)
    o = layer(x)[0]
    assert o.shape == x.shape
    (o * torch.randn_like(o)).sum().backward()
    assert layer.o_proj.weight.grad.isfinite().all() and layer.o_proj.weight.grad.any()


@pytest.mark.parametrize("tokens", (1, 2, 17))
def test_very_short_inputs(tokens):
    check_rows("short", [CASES["rwkv6"].build()(rows_of((tokens,))[0][None])[0][0]], "rwkv6", (tokens,))


def test_mixed_tokens():
    """`delta` is the token before less the token; where it is not given, every row is a sequence."""
    x, mu = torch.randn(2, 4, 6), torch.rand(6)
    delta = token_shift(x)
    plain, low_rank = LerpLinear(6, 5), DDLerpLinear(6, 5, low_rank_dim=3)
    assert isinstance(low_rank.linear, LoRA) and not plain.mu.any()
    with torch.no_grad():
        plain.mu.copy_(mu)
    expected = (x + delta * mu) @ plain.linear.weight.T
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(plain(x, delta), expected)
    torch.testing.assert_close(low_rank(x, mu), low_rank.linear(x + delta * mu))
    with pytest.raises(ValueError, match=r"^low_rank_dim must be at least 1"):
        LerpLinear(6, 5, 0)


def test_a_decay_that_leaves_nothing():
    """Its gradient is a number, though `exp(exp(...))` has none; a mild one's is that of the formulas."""
    layer, x = CASES["rwkv6"].build(), torch.randn(1, 9, D)
    with torch.no_grad():
        layer.w_proj.linear.lora[2].bias[::2] = 200.0
        torch.testing.assert_close(layer(x)[0], layer.naive(x), rtol=1e-4, atol=1e-5)
    layer(x)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.w_proj.linear.lora[2].bias.grad[1::2].all()


def test_the_cache_has_each_sequences_last_input():
    layer, cache, x = CASES["rwkv6"].build(layer_idx=0), Cache(), torch.randn(1, 6, D)
    layer(x, past_key_values=cache, cu_seqlens=torch.tensor([0, 4, 4, 6]))
    assert torch.equal(cache[0]["attn_shift"], torch.stack((x[0, 3], torch.zeros(D), x[0, 5])))
    assert cache[0]["recurrent_state"].shape == (3, 2, 8, 16)


def test_eps_of_the_group_norm():
    for fuse_norm in (True, False):
        assert RWKV6Attention(**TINY, norm_eps=1e-4, fuse_norm=fuse_norm).g_norm.eps == 1e-4
        assert RWKV6Attention(**TINY, group_norm_eps=64e-5, fuse_norm=fuse_norm).g_norm.eps == 64e-5


@pytest.mark.parametrize(("layer_idx", "layers"), [(0, 1), (0, 3), (1, 3), (2, 3), (None, None)])
def test_initial_weights(layer_idx, layers):
    layer = RWKV6Attention(**TINY, expand_k=1.0, layer_idx=layer_idx, num_hidden_layers=layers)
    mix = RWKV6ChannelMix(D, layer_idx=layer_idx, num_hidden_layers=layers)
    index, layers = layer_idx or 0, layers or 1
    rho, left = index / max(layers - 1, 1), 1 - index / layers
    weights, expected = dict(layer.named_parameters()), {}
    for n in range(D):
        some, more = 1 - (n / D) ** left, 1 - (n / D) ** (0.5 * left)
        values = {
            "x_proj.0.mu": some,
            "w_proj.linear.lora.2.bias": -6 + 5 * (n / (D - 1)) ** (0.7 + 1.3 * rho),
            "bonus": rho * (1 - n / (D - 1)) + 0.1 * ((n + 1) % 3 - 1),
            "g_norm.weight": ((1 + index) / layers) ** 0.7,
            "g_norm.bias": 0.0,
            "x_bias": (more, some, some, 1 - ((n / D) ** left + 0.3 * rho), more),
        }
        for name, value in values.items():
            expected.setdefault(name, []).append(value)
    for name, values in expected.items():
        found = weights.pop(name).T if name == "x_bias" else weights.pop(name).flatten()
        torch.testing.assert_close(found, torch.tensor(values))
    for mu in (mix.key.mu, mix.receptance.mu):
        torch.testing.assert_close(mu, torch.tensor(expected["x_proj.0.mu"]))
    square = ((layer.r_proj, 1.0), (layer.k_proj, 0.1), (layer.v_proj, 1.0), (layer.g_proj, 0.1))
    for projection, gain in (*square, (mix.key, 1.0)):
        weight = projection.linear.weight.double()
        torch.testing.assert_close(weight.T @ weight, gain**2 * torch.eye(D).double(), rtol=0, atol=1e-5)
    for name in ("x_proj.2.weight", "w_proj.linear.lora.2.weight"):
        assert 0.008 < weights.pop(name).abs().max() <= 0.01
    left_over = {name for name in weights if not any(f"{x}_proj.linear.weight" == name for x in "rkvg")}
    assert left_over == {"o_proj.weight", "x_proj.0.linear.weight", "w_proj.linear.lora.0.weight"}
    zero = [*(weights[name] for name in left_over), mix.value.weight, mix.receptance.linear.weight]
    assert not any(weight.any() for weight in zero)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expand_k": 0.3}, r"expand_k \* hidden_size must be a positive multiple of num_heads=2, got 0.3 \* 32 = 9"),
        ({"num_heads": 5}, "expand_k .* num_heads=5"),
        ({"proj_low_rank_dim": 0}, "proj_low_rank_dim must be at least 1, got 0"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim must be at least 1, got 0"),
        ({"gate_fn": "tan"}, "gate_fn must be"),
        ({"mode": "parallel"}, "mode must be one of chunk, fused_recurrent"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RWKV6Attention(**{**TINY, **settings})
