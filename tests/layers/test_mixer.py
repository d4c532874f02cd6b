"""`TokenMixer` itself, on the toy layer: what a model hands to a layer, convolutions by name, slots of the cache."""

import pytest
import torch
from torch import nn

from fla.layers._mixer import ChannelMixer, TokenMixer, build_from_config
from fla.models.cache import Cache
from tests import toys

D = 16
namespace: dict = {"__name__": "fla.layers.toy"}
exec(toys.LAYER, namespace)
ToyMixer = namespace["ToyMixer"]


class Shifted(ChannelMixer):
    """The token before each token."""

    def mix(self, x, call):
        x = x + self.shift(x, call, "ffn_shift")
        self.remember(call)
        return x

    def recurrent_size(self):
        return self.hidden_size


def toy(**settings):
    torch.manual_seed(0)
    return ToyMixer(hidden_size=D, **settings)


def test_the_first_layer_makes_the_carry_and_others_hand_it_on():
    x, first, later = torch.randn(2, 5, D), toy(layer_idx=0), toy(layer_idx=1)
    *nothing, carry = first(x)[1:]
    assert (nothing, carry.shape) == ([None, None], x.shape)
    given = carry + 1
    mixed, *_, same = later(x, v_first=given)
    assert same is given
    assert not torch.equal(mixed, later(x)[0])


@pytest.mark.parametrize("columns", [[0, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
def test_a_carry_is_padded_like_the_tokens(columns):
    mask = torch.tensor([columns, [1, 1, 1, 1, 1]])
    x, layer, real = torch.randn(2, 5, D), toy(), mask.bool()
    made = layer(x, attention_mask=mask)[3]
    assert torch.equal(made[~real], torch.zeros_like(made[~real]))
    torch.testing.assert_close(made[0, real[0]], layer(x[:1, real[0]])[3][0])
    given = torch.randn(2, 5, D)
    mixed = layer(x, attention_mask=mask, v_first=given)[0]
    torch.testing.assert_close(mixed[0, real[0]], layer(x[:1, real[0]], v_first=given[:1, real[0]])[0][0])


def test_what_a_model_hands_over_is_named_and_checked():
    layer, x = toy(), torch.randn(2, 5, D)
    bound, carry = torch.rand(D), torch.randn(2, 5, D)
    assert layer.named_inputs(None, ()) == {}
    assert layer.named_inputs(carry, (bound,)) == {"lower_bound": bound, "v_first": carry}
    assert Shifted(D, None).named_inputs(carry, (bound, bound)) == {}
    with pytest.raises(ValueError, match="ToyMixer must be given lower_bound, got 2 values"):
        layer.named_inputs(carry, (bound, bound))
    with pytest.raises(ValueError, match="lower_bound must have shape"):
        layer(x, lower_bound=bound[1:])
    with pytest.raises(ValueError, match="v_first must have shape"):
        layer(x, v_first=carry[:, 1:])
    with pytest.raises(TypeError, match="v_first must be a tensor"):
        layer(x, v_first=3)


def test_convolutions_go_by_their_names():
    layer, x = toy(layer_idx=0), torch.randn(2, 9, D)
    assert layer.conv_names == ("conv1d",)
    assert layer.state_size() == D + 3 * D
    cache = Cache()
    whole = layer(x)[0]
    pieces = [layer(piece, past_key_values=cache)[0] for piece in x.split((4, 1, 4), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert [state.shape for state in cache[0]["conv_state"]] == [(2, D, 3)]
    assert Shifted(D, None).convolve(None, x) == (x,)


def test_a_shift_goes_on_from_its_slot_and_counts_no_tokens():
    layer, x, cache = Shifted(D, layer_idx=0), torch.randn(3, 7, D), Cache()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]])
    o = [
        layer(x[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        for start, end in ((0, 3), (3, 4), (4, 7))
    ]
    for row, shifted, real in zip(x, torch.cat(o, 1), mask.bool(), strict=True):
        torch.testing.assert_close(shifted[real], torch.cat([torch.zeros(1, D), row[real][:-1]]))
    assert cache.get_seq_length(0) == 0
    assert set(cache[0]) == {"ffn_shift"}


def test_built_from_a_config_by_the_names_of_parameters():
    config = type("Config", (), {"hidden_size": D, "conv_size": 5, "vocab_size": 3})
    layer = build_from_config(ToyMixer, config, 4)
    assert (layer.hidden_size, layer.conv1d.kernel_size, layer.layer_idx) == (D, (5,), 4)
    assert build_from_config(nn.Identity, config, 4).training  # which takes neither


def test_a_mixer_must_say_what_it_does():
    with pytest.raises(NotImplementedError, match="TokenMixer must define mix"):
        TokenMixer(D, None)(torch.randn(1, 2, D))
    with pytest.raises(NotImplementedError, match="TokenMixer must define recurrent_size"):
        TokenMixer(D, None).state_size()
