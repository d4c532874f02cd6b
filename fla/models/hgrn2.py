"""HGRN2 (https://arxiv.org/abs/2404.07904)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers._heads import split_width
from fla.layers.hgrn2 import HGRN2Attention
from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, GatedMLP, register_causal_lm
from fla.models._lower_bounds import LowerBoundModel


class HGRN2Config(DecoderConfig):
    """The fields of `DecoderConfig`, and HGRN2's own. Of `num_heads` and `expand_ratio` one may be None."""

    model_type = "hgrn2"
    field_help: ClassVar[Mapping[str, str]] = {
        "num_heads": "How many heads; None: `hidden_size / expand_ratio`.",
        "expand_ratio": "Width of a head; None: `hidden_size / num_heads`.",
    }
    tiny: ClassVar[Mapping[str, Any]] = {**DecoderConfig.tiny, "expand_ratio": 8}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unbounded": {"use_lower_bound": False, "use_short_conv": True},
        "hybrid": {"attn": {"layers": [0], "num_heads": 2}},
    }

    attn_mode: str = "chunk"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.expand_ratio, self.num_heads = split_width(
            self.hidden_size, self.expand_ratio, self.num_heads, "expand_ratio"
        )


class HGRN2MLP(GatedMLP):
    """The gated MLP of an `HGRN2Block`."""


class HGRN2Block(DecoderBlock):
    """`HGRN2Attention` and `HGRN2MLP`."""

    mixer_cls, mlp_cls = HGRN2Attention, HGRN2MLP


class HGRN2Model(LowerBoundModel):
    """HGRN2 without a head."""

    config_class, block_cls = HGRN2Config, HGRN2Block


@register_causal_lm
class HGRN2ForCausalLM(DecoderForCausalLM):
    """HGRN2 language model."""

    config_class, model_cls = HGRN2Config, HGRN2Model
