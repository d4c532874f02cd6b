"""A toy op, layer and model as DESIGN.md asks for them: one file each, and one line in the package's list."""

OP_LINE = "from fla.ops.toy import chunk_toy, fused_recurrent_toy\n"
OP = '''"""Toy op: half of the state is forgotten at every token.

    S_t = S_{t-1} / 2 + k_t v_t^T          S in R^{K x V}
    o_t = scale * q_t^T S_t
"""

import math

import torch

from fla.backends import decay
from fla.ops._spec import OpSpec, register
from fla.shapes import check_shapes

SHAPES = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "initial_state": "N H K V"}


def naive_recurrent_toy(q, k, v, scale=None, initial_state=None, output_final_state=False):
    """The two lines above, token by token."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, (q, k, v) = v.dtype, (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):
        state = state / 2 + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state)[:, None])
    return torch.cat(outputs, 1).to(out_dtype), state if output_final_state else None


def chunk_toy(
    q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, *, backend=None
):
    """The toy op, parallel over chunks."""
    return _toy(decay.chunk, q, k, v, scale, initial_state, output_final_state, cu_seqlens, backend)


def fused_recurrent_toy(
    q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, *, backend=None
):
    """The toy op, token by token."""
    return _toy(decay.recurrent, q, k, v, scale, initial_state, output_final_state, cu_seqlens, backend)


def _toy(form, q, k, v, scale, initial_state, output_final_state, cu_seqlens, backend):
    check_shapes(SHAPES, cu_seqlens=cu_seqlens, scale=scale, q=q, k=k, v=v, initial_state=initial_state)
    g_gamma = torch.full(q.shape[2:3], math.log(FORGET), dtype=torch.float64, device=q.device)
    return form(
        q, k, v, g_gamma=g_gamma, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, backend=backend, op="toy",
    )


FORGET = 0.5
SPEC = register(
    OpSpec(
        name="toy",
        family="decay",
        shapes=SHAPES,
        reference=naive_recurrent_toy,
        forms={"chunk": chunk_toy, "fused_recurrent": fused_recurrent_toy},
    )
)
'''

LAYER_LINE = "from fla.layers.toy import ToyMixer\n"
LAYER = '''"""Toy layer: a mixer without heads, with one convolution. Every channel forgets at a rate of its own.

    f_t = b + (1 - b) sigmoid(W_f x_t)                           b: a lower bound that the model hands to the layer
    v_t = u_t + (u1_t - u_t) sigmoid(m),  u_t = silu(conv(W_v x_t)),  u1: that of the first layer
    h_t = f_t h_{t-1} + (1 - f_t) v_t,    o_t = W_o (h_t silu(W_g x_t))
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fla.layers._mixer import TokenMixer
from fla.varlen import prepare_position_ids, prepare_sequence_ids


class ToyMixer(TokenMixer):
    """`[B, T, hidden_size] -> [B, T, hidden_size]`."""

    inputs: ClassVar = {"lower_bound": "D", "v_first": "B T D"}
    carry_name = "v_first"
    gate_names = ("f_proj",)
    variants: ClassVar = {"wide": {"conv_size": 5, "expand": 2}}

    def __init__(self, hidden_size=64, expand=1, conv_size=3, layer_idx=None):
        super().__init__(hidden_size, layer_idx)
        self.width = width = expand * hidden_size
        self.f_proj, self.g_proj = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, width, bias=False)
        self.v_proj, self.u_proj = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, width)
        self.add_short_convs({"conv1d": (hidden_size, "silu")}, conv_size, conv_bias=True)
        self.mixed = nn.Parameter(torch.zeros(hidden_size)) if layer_idx != 0 else None
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    def reset_parameters(self):
        if self.mixed is not None:
            nn.init.zeros_(self.mixed)

    def mix(self, x, call):
        f, bound = self.f_proj(x).sigmoid(), call.extra["lower_bound"]
        f = f if bound is None else bound + (1 - bound) * f
        (v,) = self.convolve(call, self.v_proj(x))
        if call.carry is None:
            call.carry = v
        elif self.mixed is not None:
            v = v + (call.carry - v) * self.mixed.sigmoid()
        h, state = scan(f, (1 - f) * v, call.state.get("recurrent_state"), call.cu_seqlens)
        self.remember(call, recurrent_state=state)
        return self.out_proj(self.u_proj(h.to(x.dtype)) * F.silu(self.g_proj(x)))

    def recurrent_size(self):
        return self.hidden_size

    def naive(self, x, lower_bound, v_first):
        """The formulas at the top for one sequence `[1, T, D]`, in the dtype of `x`."""
        weight = self.conv1d.weight[:, 0]
        windows = F.pad(self.v_proj(x), (0, 0, weight.shape[1] - 1, 0)).unfold(1, weight.shape[1], 1)
        u = F.silu((windows * weight).sum(-1) + self.conv1d.bias)
        v = u + (v_first - u) * self.mixed.sigmoid()
        f = lower_bound + (1 - lower_bound) * self.f_proj(x).sigmoid()
        h, rows = torch.zeros_like(v[:, 0]), []
        for t in range(x.shape[1]):
            h = f[:, t] * h + (1 - f[:, t]) * v[:, t]
            rows.append(h)
        return self.out_proj(self.u_proj(torch.stack(rows, 1)) * F.silu(self.g_proj(x)))


def scan(f, v, state, cu_seqlens):
    """`h_t = f_t h_{t-1} + v_t` for `[B, T, D]`, from `state` `[N, D]`: all `h`, and the last of every sequence."""
    f, v = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in (f, v))
    tokens = v.shape[1]
    state = v.new_zeros(len(v) if cu_seqlens is None else len(cu_seqlens) - 1, v.shape[-1]) if state is None else state
    if tokens == 0:
        return v, state
    h = state
    if cu_seqlens is not None:
        first = (prepare_position_ids(cu_seqlens, tokens) == 0)[:, None]
        v = v + first * f * state[prepare_sequence_ids(cu_seqlens, tokens).long()]
        f, h = f * ~first, torch.zeros_like(v[:, 0])
    rows = []
    for t in range(tokens):
        h = f[:, t] * h + v[:, t]
        rows.append(h)
    o = torch.stack(rows, 1)
    if cu_seqlens is None:
        return o, h
    last = o[0, (cu_seqlens[1:].long() - 1).clamp(min=0)]
    return o, torch.where((cu_seqlens.diff() > 0)[:, None], last, state)
'''

MODEL_LINE = "from fla.models.toy import ToyConfig, ToyForCausalLM, ToyModel\n"
MODEL = '''"""Toy language model: layers get lower bounds and the first one's values, MLPs look at the token before."""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init

from fla.layers._mixer import ChannelMixer
from fla.layers.toy import ToyMixer
from fla.models._decoder import DecoderBlock, DecoderConfig, DecoderForCausalLM, DecoderModel, register_causal_lm


class ToyConfig(DecoderConfig):
    """Fields of `DecoderConfig`, and the toy's own."""

    model_type = "toy"
    fixed_fields: ClassVar = {"hidden_act": "swish", "fuse_swiglu": True, "elementwise_affine": True, "hidden_ratio": 4}
    tiny: ClassVar = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 40}
    variants: ClassVar = {"hybrid": {"attn": {"layers": [1], "num_heads": 2}}}
    field_help: ClassVar = {"expand": "Width of the state as a factor of `hidden_size`."}

    intermediate_size: int = 4096
    expand: int = 1
    conv_size: int = 3


class ToyMLP(ChannelMixer):
    """`W_v relu(W_k (x_t + m (x_{t-1} - x_t)))^2`."""

    def __init__(self, hidden_size=64, intermediate_size=128, layer_idx=None):
        super().__init__(hidden_size, layer_idx)
        self.mixed = nn.Parameter(torch.zeros(hidden_size))
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    def reset_parameters(self):
        nn.init.constant_(self.mixed, 0.5)

    def mix(self, x, call):
        x = x + self.shift(x, call, "ffn_shift") * self.mixed
        self.remember(call)
        return self.value(self.key(x).relu().square())


class ToyBlock(DecoderBlock):
    """`ToyMixer` and `ToyMLP`."""

    mixer_cls, mlp_cls = ToyMixer, ToyMLP


class ToyModel(DecoderModel):
    """The toy without a head."""

    config_class, block_cls = ToyConfig, ToyBlock

    def add_parameters(self, config):
        self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, config.hidden_size))

    def reset_parameters(self):
        init.zeros_(self.lower_bounds)

    def layer_inputs(self):
        bounds = self.lower_bounds.softmax(0).cumsum(0)
        return (bounds - bounds[0]).unbind()


@register_causal_lm
class ToyForCausalLM(DecoderForCausalLM):
    """The toy language model."""

    config_class, model_cls = ToyConfig, ToyModel
'''
