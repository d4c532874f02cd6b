"""A toy layer: one file, and one line in the list of layers."""

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
    """`h_t = f_t h_{t-1} + v_t` for `[B, T, D]`, from `state` `[N, D]`: all `h`, and the last of every sequence.

    By pairs of tokens in float64, without a loop, so that a program for every length can be exported.
    """
    dtype, tokens = torch.promote_types(v.dtype, torch.float32), v.shape[1]
    if state is None:
        state = v.new_zeros(v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, v.shape[-1])
    f, v, state = f.double(), v.double(), state.double()
    if tokens == 0:
        return v.to(dtype), state.to(dtype)
    place = torch.arange(tokens, device=v.device)
    same = place[:, None] >= place
    if cu_seqlens is None:
        v = torch.cat((v[:, :1] + f[:, :1] * state[:, None], v[:, 1:]), 1)
    else:
        sequence = prepare_sequence_ids(cu_seqlens, tokens).long()
        first = (prepare_position_ids(cu_seqlens, tokens) == 0)[:, None]
        v, same = v + first * f * state[sequence], same & (sequence[:, None] == sequence)
    total = f.log().cumsum(1)
    decay = (total[:, :, None] - total[:, None]).masked_fill(~same[..., None], -torch.inf).exp()
    o = (decay * v[:, None]).sum(2)
    if cu_seqlens is None:
        return o.to(dtype), o[:, -1].to(dtype)
    last = o[0, (cu_seqlens[1:].long() - 1).clamp(min=0)]
    return o.to(dtype), torch.where((cu_seqlens.diff() > 0)[:, None], last, state).to(dtype)
'''
