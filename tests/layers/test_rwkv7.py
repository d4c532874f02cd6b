"""What is special about RWKV-7's layer: its weights and their names, v_first, very short inputs, the low-rank maps."""

import math

import pytest
import torch
from torch import nn

from fla.layers import RWKV7Attention
from fla.layers.rwkv6 import LoRA
from fla.layers.rwkv7 import RWKV7ChannelMix
from fla.models.cache import Cache
from fla.testing import assert_within_budget
from tests.layers.cases import CASES, D, check_rows, handed_over, rows_of

TINY = {"hidden_size": D, "head_dim": 16, "decay_low_rank_dim": 5, "gate_low_rank_dim": 6, "a_low_rank_dim": 4}


def shapes(module: nn.Module) -> str:
    return "; ".join(f"{k} {','.join(map(str, v.shape))}" for k, v in module.state_dict().items())


def test_state_dict():
    layer = RWKV7Attention(**TINY, v_low_rank_dim=3, layer_idx=1, value_dim=64)
    assert shapes(layer) == (
        "x_r 1,1,32; x_w 1,1,32; x_k 1,1,32; x_v 1,1,32; x_a 1,1,32; x_g 1,1,32; k_k 32; k_a 32; r_k 2,16; "
        "r_proj.weight 32,32; k_proj.weight 32,32; v_proj.weight 64,32; o_proj.weight 32,64; "
        "w_lora.lora.0.weight 5,32; w_lora.lora.2.weight 32,5; w_lora.lora.2.bias 32; "
        "v_lora.lora.0.weight 3,32; v_lora.lora.2.weight 64,3; v_lora.lora.2.bias 64; "
        "a_lora.lora.0.weight 4,32; a_lora.lora.2.weight 32,4; a_lora.lora.2.bias 32; "
        "g_lora.lora.0.weight 6,32; g_lora.lora.2.weight 64,6; g_norm.weight 64; g_norm.bias 64"
    )
    first = set(RWKV7Attention(**TINY, layer_idx=0).state_dict())
    assert {name for name in layer.state_dict() if "v_lora" not in name} == first
    assert shapes(RWKV7ChannelMix(D, layer_idx=0)) == "x_k 32; key.weight 128,32; value.weight 32,128"
    assert RWKV7ChannelMix(100, hidden_ratio=3.3).intermediate_size == 352
    assert "g_norm.weight" not in RWKV7Attention(**TINY, elementwise_affine=False).state_dict()


@pytest.mark.parametrize(("hidden_size", "ranks"), [(32, (32, 32, 32, 32)), (1024, (64, 160, 64, 64))])
def test_ranks_that_follow_from_the_width(hidden_size, ranks):
    with torch.device("meta"):
        layer = RWKV7Attention(hidden_size=hidden_size, head_dim=32 if hidden_size == 32 else 64, layer_idx=1)
    loras = (layer.w_lora, layer.g_lora, layer.a_lora, layer.v_lora)
    assert tuple(lora.low_rank_dim for lora in loras) == ranks


def test_the_default_layer_trains():
    layer, x = RWKV7Attention(), torch.randn(2, 65, 1024)
    o, _, _, v_first = layer(x)
    assert o.shape == x.shape and v_first.shape == x.shape
    (o * torch.randn_like(o)).sum().backward()
    assert layer.o_proj.weight.grad.isfinite().all() and layer.o_proj.weight.grad.any()


@pytest.mark.parametrize("tokens", range(1, 18))
def test_very_short_inputs(tokens):
    check_rows("short", [CASES["rwkv7"].build()(rows_of((tokens,))[0][None])[0][0]], "rwkv7", (tokens,))


def test_v_first_goes_from_layer_to_layer():
    """The first layer's values, whatever it is given; another layer hands on what it got, or else its own."""
    x, given = torch.randn(1, 5, D), torch.randn(1, 5, D)
    for layer_idx in (0, 1, None):
        layer = RWKV7Attention(**TINY, layer_idx=layer_idx)
        own = layer(x)[3]
        assert own.shape == x.shape and not torch.equal(own, given)
        handed_on = layer(x, v_first=given)[3]
        assert handed_on is given if layer_idx != 0 else torch.equal(handed_on, own)
    with pytest.raises(ValueError, match="v_first must have shape"):
        layer(x, v_first=given[..., :3])


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_one_token_after_64(form):
    """A state that was kept at a multiple of the chunk's length goes on by either form as if it had not been kept."""
    layer, (row,) = CASES["rwkv7"].build(layer_idx=1), rows_of((65,))
    whole = layer(row[None])[0][0, -1]
    cache = Cache()
    layer(row[None, :64], past_key_values=cache)
    layer.mode = form
    alone = layer(row[None, 64:], past_key_values=cache)[0][0, -1]
    wide = CASES["rwkv7"].build().double()
    reference = wide.naive(row[None].double(), **handed_over(wide, row[None].double()))[0, -1]
    assert_within_budget("one token after 64", alone, reference, whole)


def test_the_cache_has_each_sequences_last_input():
    layer, cache, x = CASES["rwkv7"].build(layer_idx=1), Cache(), torch.randn(1, 6, D)
    layer(x, past_key_values=cache, cu_seqlens=torch.tensor([0, 4, 4, 6]))
    last, state = cache[1]["attn_shift"], cache[1]["recurrent_state"]
    assert torch.equal(last, torch.stack((x[0, 3], torch.zeros(D), x[0, 5])))
    assert state.shape == (3, 2, 16, 16) and state.dtype == torch.float32
    assert layer.state_size() == (last[0].numel() + state[0].numel())


def official(layer_idx: int, layers: int, width: int, head_dim: int) -> dict[str, list[float]]:
    """Initial values, channel by channel, as the official code writes them."""
    deep, left = layer_idx / max(layers - 1, 1), 1 - layer_idx / layers
    lists: dict[str, list[float]] = {}
    for n in range(width):
        ddd, linear = n / width, n / (width - 1) - 0.5
        z = (n % head_dim - (head_dim - 1) / 2) / ((head_dim - 1) / 2)
        values = {
            **{f"x_{name}": 1 - ddd ** (0.2 * left) for name in "rg"},
            **{f"x_{name}": 1 - ddd ** (0.9 * left) for name in "wa"},
            **{f"x_{name}": 1 - ddd ** (0.7 * left) for name in "kv"},
            "k_k": 0.71 - 0.1 * linear,
            "k_a": 1.02,
            "r_k": -0.04,
            "w_lora.lora.2.bias": -6 + 6 * (n / (width - 1)) ** (1 + deep**0.3) + 0.5 + 2.5 * z * abs(z),
            "a_lora.lora.2.bias": -0.19 + 0.3 * z * abs(z) + 0.4 * linear,
            "v_lora.lora.2.bias": 0.73 - 0.4 * linear,
            "g_norm.weight": ((layer_idx + 1) / layers) ** 0.7,
            "g_norm.bias": 0.0,
        }
        for name, value in values.items():
            lists.setdefault(name, []).append(value)
    return lists


@pytest.mark.parametrize(("layer_idx", "layers"), [(0, 1), (0, 3), (1, 3), (2, 3), (None, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_weights(layer_idx, layers, dtype):
    torch.set_default_dtype(dtype)
    try:
        layer = RWKV7Attention(**TINY, v_low_rank_dim=40, layer_idx=layer_idx, num_hidden_layers=layers)
        mix = RWKV7ChannelMix(D, layer_idx=layer_idx, num_hidden_layers=layers)
    finally:
        torch.set_default_dtype(torch.float32)
    index, layers, weights = layer_idx or 0, layers or 1, dict(layer.named_parameters())
    assert {p.dtype for p in weights.values()} == {dtype}
    eps = torch.finfo(dtype).eps
    close = {"rtol": 4 * eps, "atol": 4 * eps}  # drawn and computed in float32, rounded once
    for name, values in official(index, layers, D, 16).items():
        if name in weights:
            torch.testing.assert_close(weights.pop(name).flatten().float(), torch.tensor(values), **close)
    gains = {"r_proj": 1, "k_proj": 0.1, "v_proj": 1, "w_lora.lora.2": 0.1, "a_lora.lora.2": 0.1, "g_lora.lora.2": 0.1}
    gains["v_lora.lora.2"] = 0.1 * math.sqrt(40 / D)
    for name, gain in gains.items():
        weight = weights.pop(f"{name}.weight", None)
        if weight is not None:
            assert_orthogonal(weight, gain, eps)
    assert set(weights) <= {"o_proj.weight", *(f"{x}_lora.lora.0.weight" for x in "wvag")}
    assert not any(weight.any() for weight in weights.values())
    ramp = torch.tensor([1 - (n / D) ** ((1 - index / layers) ** 4) for n in range(D)])
    torch.testing.assert_close(mix.x_k.float(), ramp, **close)
    assert_orthogonal(mix.key.weight, 1, eps)
    assert not mix.value.weight.any()


def assert_orthogonal(weight, gain, eps):
    """The rows, or the columns if they are fewer, are orthogonal and of length `gain`."""
    weight = weight.detach().double()
    square = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(square, gain**2 * torch.eye(len(square)).double(), rtol=0, atol=8 * gain**2 * eps)


def test_one_matrix_in_place_of_six_vectors_loads():
    layer = CASES["rwkv7"].build(layer_idx=1)
    other = nn.Sequential(CASES["rwkv7"].cls(hidden_size=D, head_dim=16, layer_idx=1))
    state = {f"0.{k}": v for k, v in layer.state_dict().items()}
    state["0.x_x"] = torch.cat([state.pop(f"0.x_{name}").flatten(0, 1) for name in "rwkvag"])
    other.load_state_dict(state)
    assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="x_x"):
        other.load_state_dict(state | {"0.x_x": state["0.x_x"][:5]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": None}, "head_dim or num_heads must be given"),
        ({"head_dim": 16, "num_heads": 4}, r"head_dim \* num_heads must be hidden_size=32, got 16 \* 4"),
        ({"head_dim": 5}, "head_dim must divide hidden_size=32, got 5"),
        ({"head_dim": None, "num_heads": 5}, "num_heads must divide hidden_size=32, got 5"),
        ({"value_dim": 33}, "value_dim must be a multiple of the number of heads 2, got 33"),
        ({"v_first_layer": -1}, "v_first_layer must be at least 0, got -1"),
        ({"a_low_rank_dim": 0}, "a_low_rank_dim must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RWKV7Attention(**{**TINY, **settings})


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", None])
def test_the_low_rank_projection(activation):
    lora, x = LoRA(6, 5, 3, bias=activation is None, activation=activation), torch.randn(2, 4, 6)
    keys = "lora.0.weight 3,6; lora.2.weight 5,3"
    assert shapes(lora) == keys + ("; lora.2.bias 5" if activation is None else "")
    down, up = lora.lora[0].weight, lora.lora[2].weight
    inner = x @ down.T if activation is None else getattr(torch, activation)(x @ down.T)
    torch.testing.assert_close(lora(x), inner @ up.T + (lora.lora[2].bias if activation is None else 0))
    with pytest.raises(ValueError, match=r"^activation must be .tanh., .* got .gelu."):
        LoRA(6, 5, 3, activation="gelu")
    with pytest.raises(ValueError, match=r"^low_rank_dim must be at least 1"):
        LoRA(6, 5, 0)
