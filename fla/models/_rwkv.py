"""What the language models of RWKV share: layer norms, one more in front of the first block, and initial weights."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import initialization as init

from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, ModuleNames
from fla.modules import LayerNorm


class RWKVConfig(DecoderConfig):
    """The fields of `DecoderConfig`, and those of every RWKV. `fuse_swiglu` must keep its default."""

    fixed_fields: ClassVar[Mapping[str, Any]] = {"fuse_swiglu": True}
    field_help: ClassVar[Mapping[str, str]] = {
        "hidden_ratio": "Width of the MLPs as a factor of `hidden_size`, rounded up to a multiple of 32.",
        "norm_first": "Whether a norm stands between the embeddings and the first block.",
        "norm_bias": "Whether the norms of blocks and model have biases.",
        "initializer_range": "Standard deviation of the initial weights that have no rule of RWKV's own.",
    }

    attn_mode: str = "chunk"
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5


class RWKVBlock(DecoderBlock):
    """A block with layer norms, whose MLP is called `ffn`."""

    names = ModuleNames(mlp_norm="ffn_norm", mlp="ffn")

    @classmethod
    def build_norm(cls, config: Any) -> nn.Module:
        """The layer norm of blocks and model. With `fuse_norm=False` it is PyTorch's; the keys are the same."""
        norm_cls = LayerNorm if config.fuse_norm else nn.LayerNorm
        return norm_cls(config.hidden_size, bias=config.norm_bias, eps=config.norm_eps)

    @classmethod
    def build_pre_norm(cls, config: Any, layer_idx: int) -> nn.Module | None:
        """With `norm_first` the first block has a norm in front."""
        return cls.build_norm(config) if config.norm_first and layer_idx == 0 else None


class RWKVModel(DecoderModel):
    """An RWKV without a head."""

    def reset_parameters(self) -> None:
        """The embeddings are small at first: the first norm makes them as large as they must be."""
        embeddings: Any = self.get_input_embeddings()
        init.uniform_(embeddings.weight, -1e-4, 1e-4)


class RWKVForCausalLM(DecoderForCausalLM):
    """An RWKV language model."""

    def reset_parameters(self) -> None:
        """The head is orthogonal at first."""
        vocab_size, width = self.lm_head.weight.shape
        init.orthogonal_(self.lm_head.weight, gain=0.5 * max(1.0, (vocab_size / width) ** 0.5))
