"""Token mixers: `[B, T, D] -> [B, T, D]`, each over one op. One line per layer."""

from fla.layers.attn import Attention
from fla.layers.delta_net import DeltaNet
from fla.layers.gated_deltanet import GatedDeltaNet
from fla.layers.gla import GatedLinearAttention
from fla.layers.hgrn2 import HGRN2Attention
from fla.layers.kda import KimiDeltaAttention
from fla.layers.linear_attn import LinearAttention
from fla.layers.multiscale_retention import MultiScaleRetention
from fla.layers.rwkv6 import RWKV6Attention
from fla.layers.rwkv7 import RWKV7Attention
from fla.layers.simple_gla import SimpleGatedLinearAttention
