"""`TokenMixer`: what every token mixer repeats, once.

    [B, T, D] -> projections (-> short convolutions) -> heads -> op -> norm and gate -> output projection -> [B, T, D]

A mixer's file says which projections it has and writes `mix()`, from tokens to the heads' outputs. Padding, packing,
caches, short convolutions, grouped heads, the choice of the op's form, output norm and gate and the two names of its
weight are here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla.layers.utils import Padding, check_mask, get_layer_cache, update_layer_cache
from fla.modules import FusedRMSNormSwishGate, RMSNorm, ShortConvolution
from fla.modules.activations import ACT2FN
from fla.shapes import check_shapes, merge_cu_seqlens

# Constructor parameter -> field of a model's config, where the two have different names.
CONFIG_ALIASES = {"mode": "attn_mode", "do_feature_map_norm": "norm_feature_map"}
# Up to this many tokens the recurrent form is at least as fast as the chunked one, when no gradient is needed.
SHORT = 64


@dataclass
class Call:
    """What one forward call knows besides its tokens."""

    batch_size: int
    seq_len: int  # before unpadding
    attention_mask: Tensor | None  # [B, T_total]; None for packed input
    padding: Padding | None  # set: the tokens were packed by the mask
    cu_seqlens: Tensor | None  # of the packed row, the caller's or the padding's
    cache: Any
    state: Mapping[str, Any]  # what the cache holds for this layer
    seen: int  # columns in earlier calls
    start: int | Tensor  # position of each row's first token, an int or [B]; 0 for layers without positions
    keep: bool  # whether the state after this call is wanted
    slots: dict[str, Any] = field(default_factory=dict)  # collected for the cache


class TokenMixer(nn.Module):
    """Base of all token mixers; not used by itself.

    `forms` are the forms of the mixer's op by the name of their mode; `uses_positions` says that results depend on
    where a token stands in its sequence (rotary embeddings).
    """

    forms: ClassVar[dict[str, Callable[..., tuple[Tensor, Any]]]] = {}
    uses_positions: ClassVar[bool] = False
    g_norm: nn.Module  # one of the two, see add_output
    g_norm_swish_gate: nn.Module

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None, layer_idx: int | None, mode: str | None = None
    ) -> None:
        super().__init__()
        if self.forms and mode not in self.forms:
            raise ValueError(f"mode must be one of {', '.join(self.forms)}, got {mode!r}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        self.mode = mode
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_kv_groups = num_heads // num_kv_heads
        self.layer_idx = layer_idx
        self.use_short_conv = False

    @classmethod
    def from_config(cls, config: Any, layer_idx: int | None = None) -> TokenMixer:
        """Build from a model's config: every constructor parameter that the config has a field for takes its value."""
        settings = {}
        for name in inspect.signature(cls).parameters:
            for field_name in (CONFIG_ALIASES.get(name, name), name):
                if name != "layer_idx" and hasattr(config, field_name):
                    settings[name] = getattr(config, field_name)
                    break
        return cls(**settings, layer_idx=layer_idx)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        """Tokens `[B, T, D]` (one packed row when `call.cu_seqlens` is set) to the heads' outputs `[B, T, H, V]`."""
        raise NotImplementedError(f"{type(self).__name__} must define mix()")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Padding | str | None = "from_mask",
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """Mix the tokens of `hidden_states` `[B, T, D]`; returns `(o [B, T, D], None, past_key_values)`.

        Args:
            attention_mask: `[B, at least T]`, 1 = token, 0 = padding; the last `T` columns belong to this call.
                Padding changes nothing, wherever it is, and its outputs are 0.
            past_key_values: a cache. The layer goes on from what the cache holds for `layer_idx` and stores its state
                there.
            use_cache: part of the common call of all layers; the state is kept exactly when `past_key_values` is given.
            output_attentions: must be False; there is no attention matrix to return.
            cu_seqlens: `[N + 1]`, boundaries of sequences packed into one row (`B = 1`); wins over a mask.
                `cu_seq_lens_q` is another name of it.
            padding: what a model computed once from the mask for all its layers; by default the layer does it itself.

        Other keywords are for other layers of a model and are not looked at. Raises ValueError or TypeError, naming
        the argument.
        """
        if output_attentions:
            raise ValueError(f"output_attentions must be False: {type(self).__name__} never forms the attention matrix")
        cu_seqlens = merge_cu_seqlens(cu_seqlens, kwargs.get("cu_seq_lens_q"))
        shape = {"hidden_states": f"B T {self.hidden_size}"}
        check_shapes(shape, cu_seqlens=cu_seqlens, hidden_states=hidden_states)
        call = self._begin(hidden_states, attention_mask, past_key_values, cu_seqlens, padding)
        x = hidden_states if call.padding is None else call.padding.unpad(hidden_states)
        o = self.o_proj(self.mix(x, call).flatten(2))
        return (o if call.padding is None else call.padding.repad(o)), None, past_key_values

    def _begin(
        self, x: Tensor, mask: Tensor | None, cache: Any, cu_seqlens: Tensor | None, padding: Padding | str | None
    ) -> Call:
        B, T, _ = x.shape
        packed = cu_seqlens is not None
        if packed:
            mask = padding = None
        if mask is not None:
            check_mask(mask, T, B)
        if isinstance(padding, str):
            padding = None if mask is None else Padding.from_mask(mask, T)
        if padding is not None:
            if (padding.batch_size, padding.seq_len) != (B, T):
                raise ValueError(f"padding must be of a batch {[B, T]}, got {[padding.batch_size, padding.seq_len]}")
            cu_seqlens = padding.cu_seqlens
        state = get_layer_cache(self, cache) or {}
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        keep = cache is not None
        start: int | Tensor = 0
        if self.uses_positions:
            # The cache counts columns, not the tokens of each packed sequence: nothing could go on from there.
            keep = keep and not packed
            if seen and (packed or not state):
                raise ValueError(
                    f"cu_seqlens must be None in every call of a sequence that {type(self).__name__} continues from a "
                    "cache, which does not know each packed sequence's length; pass a padded batch and attention_mask"
                )
            start = _first_positions(mask, padding, seen, T)
        return Call(B, T, mask, padding, cu_seqlens, cache, state, seen, start, keep)

    def remember(self, call: Call, **slots: Any) -> Any:
        """Store what the call collected, and `slots`, in its cache; returns what that returns (None without one)."""
        slots = {**call.slots, **slots} if call.keep else {}
        return update_layer_cache(self, call.cache, offset=call.seq_len, **slots)

    # ---- projections: q, k and v, short convolutions

    def add_projections(self, expand_k: float, expand_v: float) -> None:
        """q, k and v of a linear mixer, `int(D expand_k)` and `int(D expand_v)` wide, k and v for the kv heads only."""
        H, D = self.num_heads, self.hidden_size
        self.key_dim, self.value_dim = int(D * expand_k), int(D * expand_v)
        for argument, factor, width in (("expand_k", expand_k, self.key_dim), ("expand_v", expand_v, self.value_dim)):
            if width <= 0 or width % H:
                raise ValueError(
                    f"{argument} * hidden_size must be a positive multiple of num_heads={H}, "
                    f"got {factor} * {D} = {width}"
                )
        self.head_k_dim, self.head_v_dim = self.key_dim // H, self.value_dim // H
        self.key_dim_per_group = self.key_dim // self.num_kv_groups
        self.value_dim_per_group = self.value_dim // self.num_kv_groups
        self.q_proj = nn.Linear(D, self.key_dim, bias=False)
        self.k_proj = nn.Linear(D, self.key_dim_per_group, bias=False)
        self.v_proj = nn.Linear(D, self.value_dim_per_group, bias=False)

    def add_short_convs(self, use_short_conv: bool, conv_size: int, conv_bias: bool) -> None:
        """A causal depthwise convolution with SiLU after each of q, k and v."""
        self.use_short_conv = use_short_conv
        if not use_short_conv:
            return
        check_positive(conv_size=conv_size)
        self.q_conv1d = ShortConvolution(self.key_dim, conv_size, bias=conv_bias, activation="silu")
        self.k_conv1d = ShortConvolution(self.key_dim_per_group, conv_size, bias=conv_bias, activation="silu")
        self.v_conv1d = ShortConvolution(self.value_dim_per_group, conv_size, bias=conv_bias, activation="silu")

    def project(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, K]`, k and v of the kv heads, after their convolutions, whose state goes on from the cache."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.use_short_conv:
            return q, k, v
        before = call.state.get("conv_state") or (None, None, None)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        options: dict[str, Any] = {"output_final_state": call.keep, "cu_seqlens": call.cu_seqlens}
        done = [conv(y, cache=c, **options) for conv, y, c in zip(convs, (q, k, v), before, strict=True)]
        if call.keep:
            call.slots["conv_state"] = tuple(state for _, state in done)
        return done[0][0], done[1][0], done[2][0]

    def split_heads(self, x: Tensor, head_dim: int, grouped: bool = False) -> Tensor:
        """`[B, T, H d]` -> `[B, T, H, d]`; `grouped`: from kv heads, each followed by its copies."""
        x = x.unflatten(-1, (-1, head_dim))
        return x.repeat_interleave(self.num_kv_groups, 2) if grouped and self.num_kv_groups > 1 else x

    # ---- the op

    def recur(self, call: Call, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, **settings: Any) -> Tensor:
        """Run the op in the form that fits, from the cached state, and keep the new one."""
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast widens what some feature maps return
        state = call.state.get("recurrent_state")
        inference = not (self.training or torch.is_grad_enabled())
        mode = "fused_recurrent" if inference and call.seq_len <= SHORT else self.mode
        if mode == "parallel" and (call.keep or state is not None):
            mode = "chunk"  # parallel forms have no state
        assert mode is not None
        if mode != "parallel":
            settings |= {"initial_state": state, "output_final_state": call.keep}
        with torch.autocast(v.device.type, enabled=False):  # the op chooses its precision itself
            o, state = self.forms[mode](q, k, v, *gates, cu_seqlens=call.cu_seqlens, **settings)
        self.remember(call, recurrent_state=state)
        return o

    # ---- output: norm, gate, projection

    def add_output_gate(self, use_output_gate: bool) -> None:
        """The projection of the output gate, if there is one."""
        self.use_output_gate = use_output_gate
        if use_output_gate:
            self.g_proj = nn.Linear(self.hidden_size, self.value_dim, bias=False)

    def add_output(self, gate_fn: str, fuse_norm: bool, elementwise_affine: bool, norm_eps: float) -> None:
        """Output projection and RMSNorm per head; `fuse_norm` with a swish gate: norm and gate in one module."""
        self.gate_fn = activation(gate_fn, "gate_fn")
        self.fuse_norm_and_gate = fuse_norm and self.use_output_gate and gate_fn in ("swish", "silu")
        self.o_proj = nn.Linear(self.value_dim, self.hidden_size, bias=False)
        name, norm = ("g_norm_swish_gate", FusedRMSNormSwishGate) if self.fuse_norm_and_gate else ("g_norm", RMSNorm)
        self.add_module(name, norm(self.head_v_dim, elementwise_affine=elementwise_affine, eps=norm_eps))
        self.register_load_state_dict_pre_hook(_rename_norm)

    def norm_and_gate(self, o: Tensor, x: Tensor) -> Tensor:
        """`RMSNorm(o) * gate_fn(g_proj(x))` per head, `[B, T, H, V]`."""
        if not self.use_output_gate:
            return self.g_norm(o)
        g = self.split_heads(self.g_proj(x), self.head_v_dim)
        return self.g_norm_swish_gate(o, g) if self.fuse_norm_and_gate else self.g_norm(o) * self.gate_fn(g)

    def state_size(self, **kwargs: Any) -> int:
        """Elements of state per sequence: the recurrent state and the short convolutions'."""
        size = self.key_dim * self.head_v_dim
        if self.use_short_conv:
            channels = self.key_dim + self.key_dim_per_group + self.value_dim_per_group
            size += channels * self.q_conv1d.weight.shape[-1]
        return size


def activation(name: str, argument: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function called `name`; ValueError naming `argument` otherwise."""
    known = [key for key in ACT2FN if key != "bias_gelu"]  # which takes two arguments
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}")
    function: Any = ACT2FN[name]
    return function


def check_positive(**sizes: int) -> None:
    """Raise unless every size is an int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__} {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _first_positions(mask: Tensor | None, padding: Padding | None, seen: int, seq_len: int) -> int | Tensor:
    """Tokens that each row has seen before this call, without its padding: where its positions go on."""
    if not seen:
        return 0
    if mask is None and padding is None:
        return seen
    if mask is None or mask.shape[1] != seen + seq_len:
        raise ValueError(
            f"attention_mask must cover the cached tokens too: {seen} + {seq_len} columns, "
            f"got {'no mask' if mask is None else mask.shape[1]}"
        )
    return (mask[:, :seen] != 0).sum(-1)


def _rename_norm(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """One weight, two names: which one a checkpoint has depends on how its layer computed, so both load."""
    names = [f"{prefix}{name}.weight" for name in ("g_norm", "g_norm_swish_gate")]
    ours, other = names[::-1] if hasattr(module, "g_norm_swish_gate") else names
    if other in state_dict and ours not in state_dict:
        state_dict[ours] = state_dict.pop(other)
