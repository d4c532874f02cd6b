"""The transformer with softmax attention, as a baseline: rotary positions, gated MLPs (https://arxiv.org/abs/2302.13971)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.attn import Attention
from fla.models._decoder import (
    DecoderBlock,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    GatedMLP,
    cache_before_embeds,
    register_causal_lm,
)


class TransformerConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and the transformer's own.

    `elementwise_affine`, `norm_first` and `attention_bias` must keep their defaults.
    """

    model_type = "transformer"
    fixed_fields: ClassVar[Mapping[str, Any]] = {
        "elementwise_affine": True,
        "norm_first": False,
        "attention_bias": False,
    }
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2}

    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0
    norm_first: bool = False
    attention_bias: bool = False


class TransformerMLP(GatedMLP):
    """The gated MLP of a `TransformerBlock`."""


class TransformerBlock(DecoderBlock):
    """`Attention` and `TransformerMLP`."""

    mixer_cls, mlp_cls = Attention, TransformerMLP


class TransformerModel(DecoderModel):
    """The transformer without a head."""

    config_class, block_cls = TransformerConfig, TransformerBlock
    forward = cache_before_embeds(DecoderModel.forward)


@register_causal_lm
class TransformerForCausalLM(DecoderForCausalLM):
    """Transformer language model."""

    config_class, model_cls = TransformerConfig, TransformerModel
    forward = cache_before_embeds(DecoderForCausalLM.forward)
