"""RWKV-7: every head's state is a memory that decays in every key channel and has one direction rewritten per token.

    x'_t = x_t + (x_{t-1} - x_t) m                           for each of r, w, k, v, a, g its own m
    r, k, v = W_r x', W_k x', W_v x';  w = -e^(-1/2) sigmoid(w_lora(x'));  a = sigmoid(a_lora(x'));  g = g_lora(x')
    v <- v + (v1 - v) sigmoid(v_lora(x'))                    v1: the values of the first layer
    c = normalise(k k_k),   k <- k (1 + (a - 1) k_a)
    S_t = diag(exp(w_t)) S_{t-1} + (c_t a_t) (-c_t^T S_{t-1}) + k_t v_t^T
    o_t = W_o (g_t (GroupNorm(r_t^T S_t) + (sum_d r_t k_t r_k) v_t))

Op: `rwkv7`. Paper: https://arxiv.org/abs/2503.14456
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._heads import split_width
from fla.layers._initial import fill_, orthogonal_
from fla.layers._mixer import Call, TokenMixer, draw_weights
from fla.layers._rwkv import ChannelMix, LoRA, channels, depth
from fla.modules import GroupNorm
from fla.modules.l2norm import l2norm
from fla.ops import chunk_rwkv7, fused_recurrent_rwkv7
from fla.ops.rwkv7 import fused_addcmul_rwkv7, fused_k_rwkv7, gate_output_correction

_DECAY = -math.exp(-0.5)  # the strongest log decay
_MIXED = ("r", "w", "k", "v", "a", "g")  # the order of the rows of `x_x`, in which older checkpoints have them


class RWKV7Attention(TokenMixer):
    """RWKV-7's time mix, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Between the layers of a model goes `v_first` `[B, T, V]`, the values of the first layer. A layer that is given none
    hands on its own values.

    Args:
        mode: form of the op in training and for long inputs: "chunk" or "fused_recurrent".
        head_dim, num_heads: width and number of heads, whose product must be `hidden_size`; one of them may be None.
        decay_low_rank_dim, gate_low_rank_dim, a_low_rank_dim, v_low_rank_dim: ranks of the projections w, g, a and v;
            None: what the official models of this width have.
        elementwise_affine, norm_eps: settings of the group norm, which adds `head_dim * norm_eps`.
        layer_idx, num_hidden_layers: the layer's place in a model, for the cache and the initial weights.
        fuse_norm: divide keys by `sqrt(|k|^2 + 1e-6)` in one kernel, else by `max(|k|, 1e-12)` as the official code.
        value_dim: width V of all values, a multiple of the number of heads; None: `hidden_size`.
        v_first_layer: the layer whose values are `v_first`; the others have a `v_lora`.

    Checkpoints with one `x_x` `[6, D]` load too. Raises ValueError or TypeError, naming the argument.
    State: `[B, H, head_dim, V / H]` in float32, and the last input `[B, D]`.
    """

    forms: ClassVar = {"chunk": chunk_rwkv7, "fused_recurrent": fused_recurrent_rwkv7}
    inputs: ClassVar = {"v_first": "B T V"}
    carry_name = "v_first"
    gate_names = ("w_lora", "x_w")
    tiny: ClassVar = {"head_dim": 16}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wide": {"head_dim": None, "num_heads": 4, "value_dim": 48, "fuse_norm": True, "gate_low_rank_dim": 5},
    }

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        fuse_norm: bool = False,
        value_dim: int | None = None,
        num_hidden_layers: int | None = None,
        v_first_layer: int = 0,
    ) -> None:
        super().__init__(hidden_size, layer_idx, mode)
        D = hidden_size
        self.head_dim, self.num_heads = split_width(D, head_dim, num_heads)
        self.value_dim = V = D if value_dim is None else value_dim
        if V % self.num_heads:
            raise ValueError(f"value_dim must be a multiple of the number of heads {self.num_heads}, got {V}")
        self.head_v_dim = V // self.num_heads
        self.size_inputs(D=D, V=V)
        self.num_hidden_layers, self.fuse_norm = num_hidden_layers, fuse_norm
        for name in _MIXED:
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, D)))
        self.k_k, self.k_a = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.r_k = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.r_proj, self.k_proj = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.v_proj, self.o_proj = nn.Linear(D, V, bias=False), nn.Linear(V, D, bias=False)
        per_head = math.sqrt(D) * self.head_dim / 64
        self.w_lora = LoRA(D, D, _rank(decay_low_rank_dim, 2.5 * per_head))
        self.v_lora = None
        if layer_idx != v_first_layer:
            self.v_lora = LoRA(D, V, _rank(v_low_rank_dim, 1.7 * per_head), activation=None)
        self.a_lora = LoRA(D, D, _rank(a_low_rank_dim, 2.5 * per_head), activation=None)
        self.g_lora = LoRA(D, V, _rank(gate_low_rank_dim, 5 * math.sqrt(D)), bias=False, activation="sigmoid")
        options: dict[str, Any] = {"eps": self.head_dim * norm_eps}
        self.g_norm: nn.Module
        if fuse_norm:
            self.g_norm = GroupNorm(self.num_heads, V, elementwise_affine, bias=elementwise_affine, **options)
        else:
            self.g_norm = nn.GroupNorm(self.num_heads, V, affine=elementwise_affine, **options)
        self.register_load_state_dict_pre_hook(_split_mixed)
        draw_weights(self)

    def reset_parameters(self) -> None:
        """The initial weights of the official code, by the layer's place in the model; loaded ones stay."""
        deep, left, height = depth(self.layer_idx, self.num_hidden_layers)
        for names, power in (("rg", 0.2), ("wa", 0.9), ("kv", 0.7)):
            for name in names:
                mixed = getattr(self, f"x_{name}")
                fill_(mixed, 1 - (channels(mixed) / self.hidden_size) ** (power * left))
        n = channels(self.k_k)
        ramp = n / max(self.hidden_size - 1, 1)
        middle = (self.head_dim - 1) / 2
        zigzag = (n % self.head_dim - middle) / max(middle, 0.5)
        zigzag = zigzag * zigzag.abs()
        fill_(self.k_k, 0.71 - 0.1 * (ramp - 0.5))
        fill_(self.k_a, 1.02)
        fill_(self.r_k, -0.04)
        _reset_lora(self.w_lora, -5.5 + 6 * ramp ** (1 + deep**0.3) + 2.5 * zigzag)
        _reset_lora(self.a_lora, -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        _reset_lora(self.g_lora, None)
        if self.v_lora is not None:
            n = torch.arange(self.value_dim, dtype=torch.float32, device=n.device)
            _reset_lora(self.v_lora, 0.73 - 0.4 * (n / max(self.value_dim - 1, 1) - 0.5))
        for linear, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            orthogonal_(linear.weight, gain)
        fill_(self.o_proj.weight, 0.0)
        norm: Any = self.g_norm
        if norm.weight is not None:
            fill_(norm.weight, height**0.7)
            fill_(norm.bias, 0.0)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        delta = self.shift(x, call, "attn_shift")
        mixed = [getattr(self, f"x_{name}") for name in _MIXED]
        xr, xw, xk, xv, xa, xg = fused_addcmul_rwkv7(x, delta, *mixed)
        r, k, v, g = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv), self.g_lora(xg)
        w, a = _DECAY * self.w_lora(xw).sigmoid(), self.a_lora(xa).sigmoid()
        if call.carry is None or self.v_lora is None:
            call.carry = v
        else:
            v = (v + (call.carry - v) * self.v_lora(xv).sigmoid()).to(v.dtype)
        # Under autocast the parameters are float32, and so is what they are multiplied with.
        removed = self.normalise((k * self.k_k).unflatten(-1, (-1, self.head_dim))).to(v.dtype)
        k = fused_k_rwkv7(k, a, self.k_a)
        r, w, k, a = (y.unflatten(-1, (-1, self.head_dim)) for y in (r, w, k, a))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        o = self.recur(call, r, w, k, v, -removed, removed * a.to(v.dtype), scale=1.0)
        o = self.g_norm(o.flatten(0, 1).flatten(1)).view(*x.shape[:2], self.value_dim)
        return gate_output_correction(o, r, k, self.r_k, v, g)

    def normalise(self, k: Tensor) -> Tensor:
        """Every head's vector of `[B, T, H, K]`, divided by its length."""
        return l2norm(k) if self.fuse_norm else F.normalize(k, dim=-1, eps=1e-12)

    def output(self, o: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(o)

    def recurrent_size(self) -> int:
        """Elements of a sequence's recurrent state, a key x value matrix per head, and of its token shift."""
        return self.head_dim * self.value_dim + self.hidden_size

    def naive(self, x: Tensor, v_first: Tensor) -> Tensor:
        """The formulas at the top for one sequence `[1, T, D]`, in the dtype of `x`."""
        before = F.pad(x, (0, 0, 1, -1))
        xr, xw, xk, xv, xa, xg = (x + (before - x) * getattr(self, f"x_{name}") for name in _MIXED)
        r, k, v, a = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv), self.a_lora(xa).sigmoid()
        decay = (-math.exp(-0.5) * self.w_lora(xw).sigmoid()).exp()
        if self.v_lora is not None:
            v = v + (v_first - v) * self.v_lora(xv).sigmoid()
        c, k = (k * self.k_k).unflatten(-1, (-1, self.head_dim)), k * (1 + (a - 1) * self.k_a)
        length = c.square().sum(-1, keepdim=True)
        c = c / ((length + 1e-6).sqrt() if self.fuse_norm else length.sqrt().clamp(min=1e-12))
        r, k, a, decay = (y.unflatten(-1, (-1, self.head_dim)) for y in (r, k, a, decay))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        state, rows = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
        for t in range(x.shape[1]):
            read = torch.einsum("bhk,bhkv->bhv", c[:, t], state)
            state = decay[:, t, ..., None] * state - (c * a)[:, t, ..., None] * read[:, :, None]
            state = state + k[:, t, ..., None] * v[:, t, :, None]
            rows.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
        norm: Any = self.g_norm
        o = torch.stack(rows, 1)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
        o = o.flatten(2) if norm.weight is None else o.flatten(2) * norm.weight + norm.bias
        return self.o_proj((o + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)) * self.g_lora(xg))


class RWKV7ChannelMix(ChannelMix):
    """RWKV-7's MLP, `W_v act(W_k (x_t + (x_{t-1} - x_t) x_k))`; `x_k` `[D]`, `key.weight` `[I, D]`."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "sqrelu",
        layer_idx: int | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        hidden_ratio = 4 if hidden_ratio is None else hidden_ratio
        super().__init__(hidden_size, hidden_ratio, intermediate_size, hidden_act, layer_idx, num_hidden_layers)
        self.x_k = nn.Parameter(torch.empty(hidden_size))
        self.key = nn.Linear(hidden_size, self.intermediate_size, bias=False)
        self.value = nn.Linear(self.intermediate_size, hidden_size, bias=False)
        draw_weights(self)

    def reset_parameters(self) -> None:
        """The initial weights of the official code, by the layer's place in the model; loaded ones stay."""
        _, left, _ = depth(self.layer_idx, self.num_hidden_layers)
        fill_(self.x_k, 1 - (channels(self.x_k) / self.hidden_size) ** (left**4))
        orthogonal_(self.key.weight)
        fill_(self.value.weight, 0.0)

    def transform(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.value(self.act_fn(self.key(torch.addcmul(x, delta, self.x_k))))


def _rank(given: int | None, wanted: float) -> int:
    """A rank: as given, or the multiple of 32 nearest to `wanted`."""
    return max(32, round(wanted / 32) * 32) if given is None else given


def _reset_lora(lora: LoRA, bias: Tensor | None) -> None:
    """The initial weights of a low-rank projection, whose result at first is its bias."""
    down: Any = lora.lora[0]
    up: Any = lora.lora[2]
    fill_(down.weight, 0.0)
    orthogonal_(up.weight, 0.1 * max(1.0, math.sqrt(lora.low_rank_dim / lora.output_dim)))
    if bias is not None:
        fill_(up.bias, bias)


def _split_mixed(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load `x_x` `[6, D]`, which checkpoints of January 2025 have in place of the six vectors."""
    rows = state_dict.get(prefix + "x_x")
    if rows is not None and rows.shape[0] == len(_MIXED) and f"{prefix}x_{_MIXED[0]}" not in state_dict:
        del state_dict[prefix + "x_x"]
        state_dict.update({f"{prefix}x_{name}": row[None, None] for name, row in zip(_MIXED, rows, strict=True)})
