"""What is special about HGRN2's layer: its weights and their names, the lower bound, sizes that do not fit."""

import pytest
import torch

from fla.layers import HGRN2Attention
from fla.layers._lower_bounds import bounded_gate
from fla.models.cache import Cache
from tests.layers.cases import D


def test_state_dict_and_states():
    layer = HGRN2Attention(hidden_size=D, num_heads=4, expand_ratio=None, use_short_conv=True, layer_idx=0)
    assert "; ".join(f"{k} {','.join(map(str, v.shape))}" for k, v in layer.state_dict().items()) == (
        "q_proj.weight 32,32; f_proj.weight 32,32; i_proj.weight 32,32; q_conv1d.weight 32,1,4; "
        "f_conv1d.weight 32,1,4; i_conv1d.weight 32,1,4; g_norm.weight 32; o_proj.weight 32,32"
    )
    assert {getattr(layer, f"{name}_conv1d").activation for name in "qfi"} == {None}
    cache = Cache()
    layer(torch.randn(2, 5, D), past_key_values=cache)
    state = cache[0]["recurrent_state"]
    assert state.shape == (2, 4, 8, 8) and state.dtype == torch.float32 and len(cache[0]["conv_state"]) == 3
    assert layer.recurrent_size() == state[0].numel()


def test_128_channels_a_head():
    """Row 16 of the reported situations: 8 heads of 128 channels at width 1024, forward and backward."""
    layer, x = HGRN2Attention(hidden_size=1024, num_heads=8, expand_ratio=128), torch.randn(2, 65, 1024)
    o = layer(x, lower_bound=torch.rand(1024))[0]
    assert o.shape == x.shape
    o.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    default = HGRN2Attention()
    assert (default.num_heads, default.expand_ratio, default.hidden_size) == (8, 128, 1024)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 4, "expand_ratio": 16}, r"expand_ratio \* num_heads must be hidden_size=32, got 16 \* 4"),
        ({"num_heads": None, "expand_ratio": None}, "expand_ratio or num_heads must be given"),
        ({"num_heads": None, "expand_ratio": 5}, "expand_ratio must divide hidden_size=32, got 5"),
        ({"num_heads": 5, "expand_ratio": None}, "num_heads must divide hidden_size=32, got 5"),
    ],
)
def test_sizes_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        HGRN2Attention(hidden_size=D, **settings)


def test_a_bound_of_the_wrong_width():
    with pytest.raises(ValueError, match="lower_bound must have shape"):
        HGRN2Attention(hidden_size=D, expand_ratio=8)(torch.randn(1, 3, D), lower_bound=torch.rand(D - 1))


def test_the_bound_holds_for_closed_gates():
    """A gate that is as closed as it can be keeps the bound; without a bound all stays finite, gradients too."""
    f = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0]).requires_grad_()
    for bound in (torch.zeros(5), torch.full((5,), 0.75), torch.ones(5)):
        bound.requires_grad_()
        k, g = bounded_gate(f, bound)
        torch.testing.assert_close(k, 1 - g.exp(), rtol=0, atol=1e-6)
        assert (g.exp() >= bound - 1e-6).all()
        for gradient in torch.autograd.grad((k + g).sum(), (f, bound)):
            assert gradient.isfinite().all()
    k, g = bounded_gate(f.bfloat16(), None)
    assert k.dtype == g.dtype == torch.float32
    wide = torch.linspace(-20, 20, 41, dtype=torch.float64)
    for plain, bounded in zip(bounded_gate(wide, None), bounded_gate(wide, torch.zeros(41)), strict=True):
        torch.testing.assert_close(plain, bounded, rtol=1e-6, atol=1e-15)
