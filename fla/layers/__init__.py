"""Token mixers: `[B, T, D] -> [B, T, D]`, each over one op. One line per layer."""

from fla.layers.attn import Attention
from fla.layers.gla import GatedLinearAttention
from fla.layers.linear_attn import LinearAttention
from fla.layers.multiscale_retention import MultiScaleRetention
from fla.layers.rwkv7 import RWKV7Attention
from fla.layers.simple_gla import SimpleGatedLinearAttention
