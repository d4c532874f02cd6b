"""Gated DeltaNet (https://arxiv.org/abs/2412.06464)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.gated_deltanet import GatedDeltaNet
from fla.models._decoder import (
    DecoderBlock,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    GatedMLP,
    register_causal_lm,
)

# Checkpoints of the reference's first release have a weight without effect in every layer.
UNUSED_KEYS = [r"\.attn\.D$"]


class GatedDeltaNetConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and Gated DeltaNet's own.

    `elementwise_affine` and `norm_first` must keep their defaults.
    """

    model_type = "gated_deltanet"
    fixed_fields: ClassVar[Mapping[str, Any]] = {"elementwise_affine": True, "norm_first": False}
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2, "head_dim": 8}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "hybrid": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}, "num_v_heads": 4}
    }

    num_hidden_layers: int = 21
    attn_mode: str = "chunk"
    expand_v: float = 2
    use_gate: bool = True
    use_short_conv: bool = True
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    allow_neg_eigval: bool = False
    norm_first: bool = False


class GatedDeltaNetMLP(GatedMLP):
    """The gated MLP of a `GatedDeltaNetBlock`."""


class GatedDeltaNetBlock(DecoderBlock):
    """`GatedDeltaNet` and `GatedDeltaNetMLP`."""

    mixer_cls, mlp_cls = GatedDeltaNet, GatedDeltaNetMLP


class GatedDeltaNetModel(DecoderModel):
    """Gated DeltaNet without a head."""

    config_class, block_cls = GatedDeltaNetConfig, GatedDeltaNetBlock
    _keys_to_ignore_on_load_unexpected = [*DecoderModel._keys_to_ignore_on_load_unexpected, *UNUSED_KEYS]  # noqa: RUF012


@register_causal_lm
class GatedDeltaNetForCausalLM(DecoderForCausalLM):
    """Gated DeltaNet language model."""

    config_class, model_cls = GatedDeltaNetConfig, GatedDeltaNetModel
    _keys_to_ignore_on_load_unexpected = UNUSED_KEYS
