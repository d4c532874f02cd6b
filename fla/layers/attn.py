"""Softmax attention with rotary positions, the layer of the Transformer and of hybrid models.

    o_t = sum_{s <= t} softmax_s(d^-1/2 rope(q_t)^T rope(k_s)) v_s

Papers: https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2104.09864 (rotary positions)
"""

from typing import Any

import torch
from torch import Tensor, nn

from fla.layers._heads import MultiHeadMixer
from fla.layers._mixer import Call, packing
from fla.layers.utils import Padding
from fla.modules import RMSNorm, RotaryEmbedding
from fla.ops.attention import attention


class Attention(MultiHeadMixer):
    """Causal softmax attention, `[B, T, hidden_size] -> [B, T, hidden_size]`.

    Args:
        num_kv_heads: heads of keys and values, each shared by `num_heads / num_kv_heads` query heads; by default
            `num_heads`.
        qkv_bias: whether the projections of q, k and v have biases.
        qk_norm: apply an RMSNorm to q and k of every head before the rotation.
        window_size: how many tokens a token sees, including itself; None means all.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: a length to prepare rotary tables for; longer inputs are fine.
        layer_idx: the layer's place in a model's cache.

    Raises ValueError or TypeError, naming the argument. The cache holds `attn_state = (k, v)`, each `[B, T, H_kv d]`,
    with k rotated and zeros at padding. With a window it holds only the columns that some row still sees.
    """

    uses_positions = True

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, layer_idx)
        if hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size must be a multiple of 2 * num_heads = {2 * num_heads}, got {hidden_size}")
        self.head_dim = hidden_size // num_heads
        self.kv_dim = self.num_kv_heads * self.head_dim
        self.window_size = window_size
        self.max_position_embeddings = max_position_embeddings
        self.qkv_bias, self.rope_theta = qkv_bias, rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, dtype=torch.float32)
            self.k_norm = RMSNorm(self.head_dim, dtype=torch.float32)
        self.rotary = RotaryEmbedding(dim=self.head_dim, base=rope_theta)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Padding | str | None = "from_mask",
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """As in every layer, but by position `output_attentions` comes before `use_cache`.

        `cu_seqlens` may also pack the rows of a batch: the tokens of all rows in turn are then one packed row.
        """
        rows = _packs_rows(hidden_states, packing(hidden_states, cu_seqlens, kwargs))
        o, *rest = super().forward(
            hidden_states.flatten(0, 1)[None] if rows else hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            cu_seqlens=cu_seqlens,
            padding=padding,
            **kwargs,
        )
        return o.view_as(hidden_states) if rows else o, *rest

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = (self.split_heads(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        longest = max(call.seen + call.seq_len, self.max_position_embeddings or 0)
        q, k = self.rotary(q, k, seqlen_offset=call.start, cu_seqlens=call.cu_seqlens, max_seqlen=longest)
        if call.padding is None and not call.keep:
            self.remember(call)
            return attention(q, k, v, window_size=self.window_size, cu_seqlens=call.cu_seqlens, max_seqlen=call.seq_len)
        return self._attend(q, k, v, call)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention in the padded batch, where the cached keys of a row and its new ones line up in columns."""
        if call.padding is not None:
            q, k, v = (call.padding.repad(y) for y in (q, k, v))
        if call.keep:
            self.stored(call, "attn_state")
            kept = self.remember(call, attn_state=(k.flatten(2), v.flatten(2)), cache_kwargs=self._window(call))
            k, v = (self.split_heads(y, self.head_dim) for y in kept["attn_state"])
        mask = call.attention_mask
        if mask is None and call.padding is not None:
            mask = call.padding.mask()
        if call.padding is None and k.shape[1] == call.seq_len:
            mask = None  # every key is a token of this call, and this call has no padding
        mask = None if mask is None else mask[:, mask.shape[1] - k.shape[1] :]
        o = attention(q, k, v, window_size=self.window_size, mask=mask)
        return o if call.padding is None else call.padding.unpad(o)

    def _window(self, call: Call) -> dict[str, int] | None:
        """How many columns the cache must keep so that every row keeps its last `window_size` tokens.

        With a mask the columns must be counted, since padding may lie between or after the tokens. Reading the count
        waits for the GPU.
        """
        if self.window_size is None:
            return None
        if call.attention_mask is None:
            return {"window_size": self.window_size}
        mask = call.attention_mask
        real = mask[:, mask.shape[1] - (call.seen + call.seq_len) :] != 0
        last = real.flip(-1).cumsum(-1)  # [:, j]: tokens in the last j + 1 columns
        wanted = last[:, -1:].clamp(max=self.window_size)
        return {"window_size": int((last < wanted).sum(-1).max()) + 1}

    def state_size(self, sequence_length: int | None = None) -> int:
        """Elements of a sequence's cached keys and values: of `sequence_length` tokens, or of the window if shorter."""
        sizes = [size for size in (self.window_size, sequence_length) if size is not None]
        if not sizes:
            raise ValueError("sequence_length must be given: without window_size the cache grows with it, got None")
        return 2 * self.kv_dim * min(sizes)


def _packs_rows(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether `cu_seqlens` covers the tokens of several rows; where its values cannot be read, it is taken to."""
    if not (isinstance(cu_seqlens, Tensor) and isinstance(x, Tensor)) or x.dim() != 3 or len(x) == 1:
        return False
    unread = cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling()
    return unread or cu_seqlens.flatten()[-1:].tolist() == [x.shape[0] * x.shape[1]]
