"""Linear attention without decay (https://arxiv.org/abs/2006.16236)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.linear_attn import LinearAttention
from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, register_causal_lm
from fla.modules.mlp import GatedMLP


class LinearAttentionConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and linear attention's own."""

    model_type = "linear_attn"
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2}

    attn_mode: str = "fused_chunk"
    expand_k: float = 1
    expand_v: float = 1
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str = "elementwise_product"
    tie_feature_map_qk: bool = False
    norm_q: bool = False
    norm_k: bool = False
    norm_feature_map: bool = False


class LinearAttentionMLP(GatedMLP):
    """The gated MLP of a `LinearAttentionBlock`."""


class LinearAttentionBlock(DecoderBlock):
    """`LinearAttention` and `LinearAttentionMLP`."""

    mixer_cls, mlp_cls = LinearAttention, LinearAttentionMLP


class LinearAttentionModel(DecoderModel):
    """Linear attention without a head."""

    config_class, block_cls = LinearAttentionConfig, LinearAttentionBlock


@register_causal_lm
class LinearAttentionForCausalLM(DecoderForCausalLM):
    """Linear attention language model."""

    config_class, model_cls = LinearAttentionConfig, LinearAttentionModel
