"""RWKV-6 "Finch" (https://arxiv.org/abs/2404.05892)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fla.layers.rwkv6 import RWKV6Attention, RWKV6ChannelMix
from fla.models._decoder import register_causal_lm
from fla.models._rwkv import RWKVBlock, RWKVConfig, RWKVForCausalLM, RWKVModel


class RWKV6Config(RWKVConfig):
    """The fields of `RWKVConfig`, and RWKV-6's own. `fuse_swiglu` must keep its default."""

    model_type = "rwkv6"
    tiny: ClassVar[Mapping[str, Any]] = {
        **RWKVConfig.tiny,
        "num_heads": 2,
        "proj_low_rank_dim": 4,
        "gate_low_rank_dim": 5,
    }
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wide": {"expand_k": 1.0, "fuse_norm": False, "norm_bias": False, "norm_first": False, "group_norm_eps": 64e-5},
        "hybrid": {"attn": {"layers": [0], "num_heads": 2}},
    }
    field_help: ClassVar[Mapping[str, str]] = {
        **RWKVConfig.field_help,
        "proj_low_rank_dim": "Rank of the projections that say how a token is mixed with the one before.",
        "gate_low_rank_dim": "Rank of the projection of decays.",
        "group_norm_eps": "Eps of the group norms in mixers; None: `norm_eps`. The official models have 64e-5.",
    }

    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_ratio: float | None = 3.5
    num_heads: int = 4
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64
    group_norm_eps: float | None = None


class RWKV6FeedForward(RWKV6ChannelMix):
    """The channel mix of an `RWKV6Block`."""


class RWKV6Block(RWKVBlock):
    """`RWKV6Attention` and `RWKV6FeedForward`."""

    mixer_cls, mlp_cls = RWKV6Attention, RWKV6FeedForward


class RWKV6Model(RWKVModel):
    """RWKV-6 without a head."""

    config_class, block_cls = RWKV6Config, RWKV6Block


@register_causal_lm
class RWKV6ForCausalLM(RWKVForCausalLM):
    """RWKV-6 language model."""

    config_class, model_cls = RWKV6Config, RWKV6Model
