"""KDA, Kimi Delta Attention (https://arxiv.org/abs/2510.26692)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.kda import KimiDeltaAttention, check_bounded_gate
from fla.models._decoder import (
    DecoderBlock,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    GatedMLP,
    register_causal_lm,
)


class KDAConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and KDA's own. `elementwise_affine` must keep its default."""

    model_type = "kda"
    fixed_fields: ClassVar[Mapping[str, Any]] = {"elementwise_affine": True}
    field_help: ClassVar[Mapping[str, str]] = {
        "safe_gate": "Whether decays are bounded by a `lower_bound` of at least -5, and all rates begin at 1.",
        "lower_bound": "The lowest log decay of a token, below 0; None: decays are not bounded.",
    }
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "num_heads": 2, "head_dim": 8}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bounded": {"safe_gate": True, "lower_bound": -5.0}}

    attn_mode: str = "chunk"
    expand_v: float = 1.0
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None
    conv_size: int = 4
    head_dim: int = 128
    num_heads: int = 16
    num_v_heads: int | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError unless a model can be built from these values."""
        super().check()
        check_bounded_gate(self.safe_gate, self.lower_bound)


class KDAMLP(GatedMLP):
    """The gated MLP of a `KDABlock`."""


class KDABlock(DecoderBlock):
    """`KimiDeltaAttention` and `KDAMLP`."""

    mixer_cls, mlp_cls = KimiDeltaAttention, KDAMLP


class KDAModel(DecoderModel):
    """KDA without a head."""

    config_class, block_cls = KDAConfig, KDABlock


@register_causal_lm
class KDAForCausalLM(DecoderForCausalLM):
    """KDA language model."""

    config_class, model_cls = KDAConfig, KDAModel
