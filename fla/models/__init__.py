"""Language models for Hugging Face transformers. One line per model; a module's name is its model type."""

# ruff: noqa: I001 - new models are added at the end
from fla.models.utils import Cache as Cache
from fla.models.linear_attn import LinearAttentionConfig, LinearAttentionForCausalLM, LinearAttentionModel
from fla.models.retnet import RetNetConfig, RetNetForCausalLM, RetNetModel
from fla.models.gla import GLAConfig, GLAForCausalLM, GLAModel
from fla.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from fla.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from fla.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GatedDeltaNetModel
from fla.models.kda import KDAConfig, KDAForCausalLM, KDAModel
from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM, RWKV7Model
from fla.models.rwkv6 import RWKV6Config, RWKV6ForCausalLM, RWKV6Model
from fla.models.hgrn2 import HGRN2Config, HGRN2ForCausalLM, HGRN2Model
