"""RetNet, the retentive network (https://arxiv.org/abs/2307.08621)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.multiscale_retention import MultiScaleRetention
from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, register_causal_lm
from fla.modules.mlp import GatedMLP


class RetNetConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and RetNet's own."""

    model_type = "retnet"
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2}

    attn_mode: str = "chunk"
    expand_k: float = 1
    expand_v: float = 2
    hidden_ratio: float | None = 2
    num_heads: int = 8
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True


class RetNetMLP(GatedMLP):
    """The gated MLP of a `RetNetBlock`."""


class RetNetBlock(DecoderBlock):
    """`MultiScaleRetention` and `RetNetMLP`."""

    mixer_cls, mlp_cls = MultiScaleRetention, RetNetMLP


class RetNetModel(DecoderModel):
    """RetNet without a head."""

    config_class, block_cls = RetNetConfig, RetNetBlock


@register_causal_lm
class RetNetForCausalLM(DecoderForCausalLM):
    """RetNet language model."""

    config_class, model_cls = RetNetConfig, RetNetModel
