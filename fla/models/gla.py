"""GLA, gated linear attention (https://arxiv.org/abs/2312.06635)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.gla import GatedLinearAttention
from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, register_causal_lm
from fla.modules.mlp import GatedMLP


class GLAConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and GLA's own. `use_gk` and `use_gv` must keep their defaults."""

    model_type = "gla"
    fixed_fields: ClassVar[Mapping[str, Any]] = {"use_gk": True, "use_gv": False}
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2}

    expand_k: float = 0.5
    expand_v: float = 1
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str | None = None
    attn_mode: str = "chunk"
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    use_gk: bool = True
    use_gv: bool = False


class GLAMLP(GatedMLP):
    """The gated MLP of a `GLABlock`."""


class GLABlock(DecoderBlock):
    """`GatedLinearAttention` and `GLAMLP`."""

    mixer_cls, mlp_cls = GatedLinearAttention, GLAMLP


class GLAModel(DecoderModel):
    """GLA without a head."""

    config_class, block_cls = GLAConfig, GLABlock


@register_causal_lm
class GLAForCausalLM(DecoderForCausalLM):
    """GLA language model."""

    config_class, model_cls = GLAConfig, GLAModel
