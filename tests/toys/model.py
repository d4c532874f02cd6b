"""Toy models: one file each, and one line in the list of models."""

MODEL_LINE = "from fla.models.toy import ToyConfig, ToyForCausalLM, ToyModel\n"

MODEL = '''"""Toy language model: layers get lower bounds and the first one's values, MLPs look at the token before."""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init

from fla.layers._mixer import ChannelMixer
from fla.layers.toy import ToyMixer
from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, register_causal_lm


class ToyConfig(DecoderConfig):
    """Fields of `DecoderConfig`, and the toy's own."""

    model_type = "toy"
    fixed_fields: ClassVar = {"hidden_act": "swish", "fuse_swiglu": True, "elementwise_affine": True, "hidden_ratio": 4}
    tiny: ClassVar = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 40}
    variants: ClassVar = {"hybrid": {"attn": {"layers": [1], "num_heads": 2}}}
    field_help: ClassVar = {"expand": "Width of the state as a factor of `hidden_size`."}

    intermediate_size: int = 4096
    expand: int = 1
    conv_size: int = 3


class ToyMLP(ChannelMixer):
    """`W_v relu(W_k (x_t + m (x_{t-1} - x_t)))^2`."""

    def __init__(self, hidden_size=64, intermediate_size=128, layer_idx=None):
        super().__init__(hidden_size, layer_idx)
        self.mixed = nn.Parameter(torch.zeros(hidden_size))
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    def reset_parameters(self):
        nn.init.constant_(self.mixed, 0.5)

    def mix(self, x, call):
        x = x + self.shift(x, call, "ffn_shift") * self.mixed
        self.remember(call)
        return self.value(self.key(x).relu().square())


class ToyBlock(DecoderBlock):
    """`ToyMixer` and `ToyMLP`."""

    mixer_cls, mlp_cls = ToyMixer, ToyMLP


class ToyModel(DecoderModel):
    """The toy without a head."""

    config_class, block_cls = ToyConfig, ToyBlock

    def add_parameters(self, config):
        self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, config.hidden_size))

    def reset_parameters(self):
        init.zeros_(self.lower_bounds)

    def layer_inputs(self):
        bounds = self.lower_bounds.softmax(0).cumsum(0)
        return (bounds - bounds[0]).unbind()


@register_causal_lm
class ToyForCausalLM(DecoderForCausalLM):
    """The toy language model."""

    config_class, model_cls = ToyConfig, ToyModel
'''
