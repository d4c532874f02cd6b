"""RWKV-7 "Goose" (https://arxiv.org/abs/2503.14456)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers._heads import split_width
from fla.layers.rwkv7 import RWKV7Attention, RWKV7ChannelMix
from fla.models._decoder import register_causal_lm
from fla.models._rwkv import RWKVBlock, RWKVConfig, RWKVForCausalLM, RWKVModel


class RWKV7Config(RWKVConfig):
    """The fields of `RWKVConfig`, and RWKV-7's own. `fuse_swiglu` must keep its default.

    Of `head_dim` and `num_heads` one may be None. `value_dim` may be a list, with the same width for every layer.
    """

    model_type = "rwkv7"
    tiny: ClassVar[Mapping[str, Any]] = {**RWKVConfig.tiny, "head_dim": 16, "a_low_rank_dim": 4, "v_low_rank_dim": 3}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wide": {"value_dim": 64, "fuse_norm": False, "norm_bias": False, "norm_first": False},
        "hybrid": {"num_hidden_layers": 4, "attn": {"layers": [0, 2], "num_heads": 2}},
    }
    field_help: ClassVar[Mapping[str, str]] = {
        **RWKVConfig.field_help,
        "head_dim": "Width of a head; None: `hidden_size / num_heads`.",
        "decay_low_rank_dim": "Rank of the projection of decays; None: by `hidden_size`, as in the official models.",
        "gate_low_rank_dim": "Rank of the projection of output gates; None: by `hidden_size`.",
        "a_low_rank_dim": "Rank of the projection of how far a direction is rewritten; None: by `hidden_size`.",
        "v_low_rank_dim": "Rank of the projection of how much of the first layer's values is taken; None: likewise.",
        "value_dim": "Width of all values; None: `hidden_size`.",
        "fuse_norm": "Whether norms are the library's; keys are then divided by sqrt(|k|^2 + 1e-6), not by |k|.",
    }

    head_dim: int | None = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    value_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.value_dim, list | tuple):
            if len(set(self.value_dim)) != 1:
                raise ValueError(f"value_dim must be the same for every layer, got {self.value_dim}")
            self.value_dim = self.value_dim[0]
        super().__post_init__(**kwargs)
        self.head_dim, self.num_heads = split_width(self.hidden_size, self.head_dim, self.num_heads)

    @property
    def v_first_layer(self) -> int:
        """The first layer that is no softmax attention, whose values the others mix with theirs."""
        return next((i for i in range(self.num_hidden_layers) if self.attention_spec(i) is None), 0)


class RWKV7FeedForward(RWKV7ChannelMix):
    """The channel mix of an `RWKV7Block`."""


class RWKV7Block(RWKVBlock):
    """`RWKV7Attention` and `RWKV7FeedForward`."""

    mixer_cls, mlp_cls = RWKV7Attention, RWKV7FeedForward


class RWKV7Model(RWKVModel):
    """RWKV-7 without a head."""

    config_class, block_cls = RWKV7Config, RWKV7Block
    split_rows: ClassVar = {"attn.x_x": [f"attn.x_{name}" for name in "rwkvag"]}


@register_causal_lm
class RWKV7ForCausalLM(RWKVForCausalLM):
    """RWKV-7 language model."""

    config_class, model_cls = RWKV7Config, RWKV7Model
