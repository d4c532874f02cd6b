"""RWKV-6: linear attention with a decay per token and key channel, in front of which each token sees the one before.

    d_t = x_{t-1} - x_t,   m_t = tanh(W_1 (x_t + d_t mu))
    x'_t = x_t + d_t (W_2 m_t + b)                           for each of r, w, k, v, g its own part of m, W_2 and b
    r, k, v, g = W_r x', W_k x', W_v x', W_g x';  w = -exp(w_lora(x'))
    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),   S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T
    y_t = W_o (GroupNorm(o_t) gate_fn(g_t))

Op: `rwkv6`, with scale 1. Paper: https://arxiv.org/abs/2404.05892
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import head_dim
from fla.layers._initial import fill_, orthogonal_, uniform_
from fla.layers._mixer import Call, TokenMixer, check_positive, draw_weights
from fla.layers._rwkv import ChannelMix, DDLerpLinear, LerpLinear, channels, depth
from fla.layers._rwkv import LoRA as LoRA  # its place for other programs
from fla.modules import GroupNorm
from fla.modules.activations import get_activation
from fla.ops import chunk_rwkv6, fused_recurrent_rwkv6

_MIXED = ("r", "w", "k", "v", "g")  # the order of the rows of `x_bias`
_NOTHING_LEFT = 10.0  # of a channel whose log decay is -exp(10): any stronger decay is the same


class RWKV6Attention(TokenMixer):
    """RWKV-6's time mix, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Args:
        mode: form of the op in training and for long inputs: "chunk" or "fused_recurrent".
        expand_k, expand_v: width of all keys and of all values as factors of `hidden_size`.
        gate_fn: activation of the output gate, a name in `fla.modules.activations.ACT2FN`.
        proj_low_rank_dim: rank of the projections that say how a token is mixed with the one before.
        gate_low_rank_dim: rank of the projection of decays.
        fuse_norm: the group norm is one kernel; the keys are the same without.
        elementwise_affine, norm_eps: settings of the group norm.
        layer_idx, num_hidden_layers: the layer's place in a model, for the cache and the initial weights.
        group_norm_eps: eps of the group norm; None: `norm_eps`. The official models have 64e-5.

    Raises ValueError or TypeError, naming the argument. State: `[B, H, K / H, V / H]` in float32, and the last input
    `[B, D]`.
    """

    forms: ClassVar = {"chunk": chunk_rwkv6, "fused_recurrent": fused_recurrent_rwkv6}
    gate_names = ("w_proj",)
    tiny: ClassVar = {"num_heads": 2, "proj_low_rank_dim": 5, "gate_low_rank_dim": 6}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wide": {"expand_k": 1.0, "expand_v": 2.0, "fuse_norm": False, "gate_fn": "sigmoid", "group_norm_eps": 64e-5},
    }

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        gate_fn: str = "swish",
        proj_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 64,
        fuse_norm: bool = True,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        group_norm_eps: float | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx, mode)
        check_positive(proj_low_rank_dim=proj_low_rank_dim, gate_low_rank_dim=gate_low_rank_dim)
        D, rank = hidden_size, proj_low_rank_dim
        self.num_heads, self.num_hidden_layers = num_heads, num_hidden_layers
        self.head_k_dim = head_dim("expand_k", expand_k, D, num_heads)
        self.head_v_dim = head_dim("expand_v", expand_v, D, num_heads)
        self.key_dim, self.value_dim = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        self.gate_fn: Any = get_activation(gate_fn, "gate_fn")
        self.x_proj = nn.Sequential(
            LerpLinear(D, len(_MIXED) * rank), nn.Tanh(), nn.Linear(len(_MIXED) * rank, D, bias=False)
        )
        self.x_bias = nn.Parameter(torch.empty(len(_MIXED), D))
        self.r_proj, self.k_proj = DDLerpLinear(D, self.key_dim), DDLerpLinear(D, self.key_dim)
        self.w_proj = DDLerpLinear(D, self.key_dim, gate_low_rank_dim)
        self.v_proj, self.g_proj = DDLerpLinear(D, self.value_dim), DDLerpLinear(D, self.value_dim)
        self.bonus = nn.Parameter(torch.empty(num_heads, self.head_k_dim))
        options: dict[str, Any] = {"eps": norm_eps if group_norm_eps is None else group_norm_eps}
        self.g_norm: nn.Module
        if fuse_norm:
            self.g_norm = GroupNorm(num_heads, self.value_dim, elementwise_affine, bias=elementwise_affine, **options)
        else:
            self.g_norm = nn.GroupNorm(num_heads, self.value_dim, affine=elementwise_affine, **options)
        self.o_proj = nn.Linear(self.value_dim, D, bias=False)
        draw_weights(self)

    def reset_parameters(self) -> None:
        """The initial weights of the official code, by the layer's place in the model; loaded ones stay."""
        deep, left, height = depth(self.layer_idx, self.num_hidden_layers)
        mixing: Any = self.x_proj
        position = channels(self.x_bias) / self.hidden_size
        fill_(mixing[0].mu, 1 - position**left)
        fill_(mixing[0].linear.weight, 0.0)
        uniform_(mixing[2].weight, 0.01)
        little, much = 1 - position ** (left / 2), 1 - position**left
        fill_(self.x_bias, torch.stack((little, much, much, much - 0.3 * deep, little)))  # of r, w, k, v, g
        lora: Any = self.w_proj.linear
        n = channels(lora.lora[2].bias)
        ramp = n / max(self.key_dim - 1, 1)
        fill_(lora.lora[0].weight, 0.0)
        uniform_(lora.lora[2].weight, 0.01)
        fill_(lora.lora[2].bias, -6 + 5 * ramp ** (0.7 + 1.3 * deep))
        fill_(self.bonus, (deep * (1 - ramp) + 0.1 * ((n + 1) % 3 - 1)).view_as(self.bonus))
        for projection, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1)):
            linear: Any = projection.linear
            orthogonal_(linear.weight, gain)
        fill_(self.o_proj.weight, 0.0)
        norm: Any = self.g_norm
        if norm.weight is not None:
            fill_(norm.weight, height**0.7)
            fill_(norm.bias, 0.0)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        delta = self.shift(x, call, "attn_shift")
        mixing: Any = self.x_proj
        parts = mixing[1](mixing[0](x, delta)).unflatten(-1, (len(_MIXED), -1)).flatten(0, 1).transpose(0, 1)
        weights = mixing[2].weight.unflatten(1, (len(_MIXED), -1)).permute(1, 2, 0)
        mu = (parts @ weights + self.x_bias[:, None]).unflatten(1, x.shape[:2])
        projections = (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj)
        r, w, k, v, g = (project(x, mu[i], delta) for i, project in enumerate(projections))
        w = -w.to(torch.promote_types(w.dtype, torch.float32)).clamp(max=_NOTHING_LEFT).exp()
        r, w, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (r, w, k))
        o = self.recur(call, r, k, v.unflatten(-1, (-1, self.head_v_dim)), w, self.bonus, scale=1.0)
        return self.g_norm(o.flatten(0, 1).flatten(1)).view_as(g) * self.gate_fn(g)

    def output(self, o: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(o)

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state, a key x value matrix per head, and of its token shift."""
        return self.head_k_dim * self.value_dim + self.hidden_size

    def naive(self, x: Tensor) -> Tensor:
        """The formulas at the top for one sequence `[1, T, D]`, in the dtype of `x`."""
        mixing: Any = self.x_proj
        delta = F.pad(x, (0, 0, 1, -1)) - x
        parts = torch.tanh((x + delta * mixing[0].mu) @ mixing[0].linear.weight.T).chunk(len(_MIXED), -1)
        matrices = mixing[2].weight.chunk(len(_MIXED), 1)
        mixed = {
            name: x + delta * (m @ matrix.T + bias)
            for name, m, matrix, bias in zip(_MIXED, parts, matrices, self.x_bias, strict=True)
        }
        r, k, v, g = (getattr(self, f"{name}_proj").linear(mixed[name]) for name in "rkvg")
        decay = torch.exp(-torch.exp(self.w_proj.linear(mixed["w"])))
        r, k, decay = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (r, k, decay))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        state, rows = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
        for t in range(x.shape[1]):
            written = k[:, t, ..., None] * v[:, t, :, None]
            rows.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state + self.bonus[..., None] * written))
            state = decay[:, t, ..., None] * state + written
        norm: Any = self.g_norm
        o = torch.stack(rows, 1)
        o = ((o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()).flatten(2)
        o = o if norm.weight is None else o * norm.weight + norm.bias
        return self.o_proj(o * self.gate_fn(g))


class RWKV6ChannelMix(ChannelMix):
    """RWKV-6's MLP, `sigmoid(W_r (x_t + d_t mu_r)) W_v act(W_k (x_t + d_t mu_k))` with `d_t = x_{t-1} - x_t`.

    `key` and `receptance` are `LerpLinear`s, `[D] -> [I]` and `[D] -> [D]`; `value.weight` is `[D, I]`.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "sqrelu",
        layer_idx: int | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        hidden_ratio = 3.5 if hidden_ratio is None else hidden_ratio
        super().__init__(hidden_size, hidden_ratio, intermediate_size, hidden_act, layer_idx, num_hidden_layers)
        self.key = LerpLinear(hidden_size, self.intermediate_size)
        self.value = nn.Linear(self.intermediate_size, hidden_size, bias=False)
        self.receptance = LerpLinear(hidden_size, hidden_size)
        draw_weights(self)

    def reset_parameters(self) -> None:
        """The initial weights of the official code, by the layer's place in the model; loaded ones stay."""
        _, left, _ = depth(self.layer_idx, self.num_hidden_layers)
        key: Any = self.key
        receptance: Any = self.receptance
        for lerp in (key, receptance):
            fill_(lerp.mu, 1 - (channels(lerp.mu) / self.hidden_size) ** left)
        orthogonal_(key.linear.weight)
        fill_(self.value.weight, 0.0)
        fill_(receptance.linear.weight, 0.0)

    def transform(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.receptance(x, delta).sigmoid() * self.value(self.act_fn(self.key(x, delta)))
