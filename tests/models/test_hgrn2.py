"""What is special about HGRN2's model: the lower bounds of its layers, and sizes that follow from each other."""

import pytest
import torch

from fla.models import HGRN2Config, HGRN2ForCausalLM

from .tiny import build, tiny_config


def test_lower_bounds():
    """They are 0 at first, so that every layer's bound is higher by 1 / layers; the first one's is always 0."""
    model = HGRN2ForCausalLM(tiny_config("hgrn2", num_hidden_layers=4)).model
    assert model.lower_bounds.shape == (4, 32) and not model.lower_bounds.any()
    for i, bound in enumerate(model.layer_inputs()):
        torch.testing.assert_close(bound, torch.full((32,), i / 4))
    model = build("hgrn2").model
    weights = model.lower_bounds.double().softmax(0)
    expected = weights.cumsum(0) - weights[0]
    for bound, row in zip(model.layer_inputs(), expected, strict=True):
        torch.testing.assert_close(bound.double(), row, rtol=0, atol=1e-6)
    assert all(bound.dtype == torch.float32 for bound in model.bfloat16().layer_inputs())


def test_without_lower_bounds():
    model = build("hgrn2", {"use_lower_bound": False})
    assert not any("lower_bounds" in key for key in model.state_dict())
    assert list(model.model.layer_inputs()) == [None] * 3


def test_sizes():
    assert HGRN2Config().num_heads == 16 and HGRN2Config(expand_ratio=None, num_heads=8).expand_ratio == 256
    with pytest.raises(ValueError, match=r"^expand_ratio \* num_heads must be hidden_size=2048, got 128 \* 4"):
        HGRN2Config(num_heads=4)
    with pytest.raises(ValueError, match=r"^expand_ratio or num_heads must be given"):
        HGRN2Config(expand_ratio=None)


def test_number_of_parameters():
    """That of the reference's model."""
    with torch.device("meta"):
        model = HGRN2ForCausalLM(HGRN2Config(num_hidden_layers=2, vocab_size=320))
    assert sum(p.numel() for p in model.parameters()) == 104_089_600
