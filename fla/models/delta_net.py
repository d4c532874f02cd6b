"""DeltaNet (https://arxiv.org/abs/2406.06484)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.delta_net import DeltaNet
from fla.models._decoder import (
    DecoderBlock,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    GatedMLP,
    register_causal_lm,
)


class DeltaNetConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and DeltaNet's own.

    `use_output_norm`, `elementwise_affine` and `norm_first` must keep their defaults.
    """

    model_type = "delta_net"
    fixed_fields: ClassVar[Mapping[str, Any]] = {
        "use_output_norm": True,
        "elementwise_affine": True,
        "norm_first": False,
    }
    field_help: ClassVar[Mapping[str, str]] = {
        "use_beta": "Whether the strength of a write is computed from the token; otherwise it is 1.",
        "use_output_norm": "Must be True: every head's output is normalised.",
        "qk_activation": "What queries and keys go through: silu, relu, elu (elu + 1) or identity.",
    }
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gated": {"use_gate": True, "use_short_conv": False}}

    attn_mode: str = "chunk"
    expand_k: float = 1
    expand_v: float = 1
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    use_beta: bool = True
    use_output_norm: bool = True
    num_heads: int = 16
    qk_norm: str = "l2"
    qk_activation: str = "silu"
    allow_neg_eigval: bool = False
    norm_first: bool = False


class DeltaNetMLP(GatedMLP):
    """The gated MLP of a `DeltaNetBlock`."""


class DeltaNetBlock(DecoderBlock):
    """`DeltaNet` and `DeltaNetMLP`."""

    mixer_cls, mlp_cls = DeltaNet, DeltaNetMLP


class DeltaNetModel(DecoderModel):
    """DeltaNet without a head."""

    config_class, block_cls = DeltaNetConfig, DeltaNetBlock


@register_causal_lm
class DeltaNetForCausalLM(DecoderForCausalLM):
    """DeltaNet language model."""

    config_class, model_cls = DeltaNetConfig, DeltaNetModel
