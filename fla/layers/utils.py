"""Padding and caches as layers use them. The index arithmetic is in `fla.varlen`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla import varlen


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch `[batch_size, seq_len]` are.

    A model computes it once per forward pass for all layers. Every layer computes on one packed row of tokens, so that
    padding (left, right or in between) has no effect.
    """

    indices: Tensor  # [T_total] int64: positions of the tokens in the flattened batch
    cu_seqlens: Tensor  # [batch_size + 1] int32: bounds of the rows in the packed row
    batch_size: int
    seq_len: int

    @classmethod
    def from_mask(cls, attention_mask: Tensor, seq_len: int) -> Padding | None:
        """The padding in the last `seq_len` columns of a mask `[B, T_total]` (0 = padding), or None if there is none.

        It waits for the GPU, since the number of tokens is a size of the results.
        """
        check_mask(attention_mask, seq_len)
        mask = attention_mask[:, attention_mask.shape[1] - seq_len :]
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would be waited for once more
            other = mask[(mask != 0) & (mask != 1)]
            if other.numel():
                raise ValueError(f"attention_mask must be 1 at a token and 0 at padding, got {other[0].item()}")
        mask = mask != 0
        if bool(mask.all()):
            return None
        return cls(*varlen.mask_indices(mask), batch_size=mask.shape[0], seq_len=seq_len)

    def unpad(self, x: Tensor) -> Tensor:
        """`[batch_size, seq_len, ...]` -> `[1, T_total, ...]`."""
        return varlen.unpad(x, self.indices)

    def repad(self, x: Tensor) -> Tensor:
        """`[1, T_total, ...]` -> `[batch_size, seq_len, ...]`, with zeros at padding."""
        return varlen.repad(x, self.indices, self.batch_size, self.seq_len)

    def mask(self) -> Tensor:
        """The mask of the batch, bool `[batch_size, seq_len]`."""
        flat = torch.zeros(self.batch_size * self.seq_len, dtype=torch.bool, device=self.indices.device)
        return flat.index_fill(0, self.indices, True).unflatten(0, (self.batch_size, self.seq_len))


def check_mask(attention_mask: Tensor, seq_len: int, batch_size: int | None = None) -> None:
    """Raise TypeError or ValueError unless `attention_mask` is `[B, at least seq_len]`."""
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, T_total], got {type(attention_mask).__name__}")
    shape = list(attention_mask.shape)
    rows = shape[:1] if batch_size is None else [batch_size]
    if len(shape) != 2 or shape[1] < seq_len or shape[:1] != rows:
        expected = f"[{'B' if batch_size is None else batch_size}, at least {seq_len}]"
        raise ValueError(f"attention_mask must have shape {expected}, 1 = token and 0 = padding, got {shape}")


def get_layer_cache(module: nn.Module, cache: Any) -> Mapping[str, Any] | None:
    """What `cache` holds for this layer: slot name -> tensor or tuple of tensors. None without a cache or a state.

    Raises ValueError if a cache is given to a layer that was built without `layer_idx`, TypeError for a cache of
    another kind.
    """
    if cache is None:
        return None
    layer_idx = require_cache_layer_idx(module, cache)
    if not hasattr(type(cache), "__getitem__"):
        raise _foreign(cache)
    try:
        slots = cache[layer_idx]
    except KeyError:
        return None
    if not isinstance(slots, Mapping):
        raise _foreign(cache)
    return slots


def _foreign(cache: Any) -> TypeError:
    return TypeError(
        "past_key_values must be a fla.models.utils.Cache where a layer is called by itself, "
        f"got {type(cache).__name__}"
    )


def check_batch(slots: Mapping[str, Any], num_sequences: int) -> None:
    """Raise ValueError unless what a cache holds for a layer is of `num_sequences` sequences."""
    for value in slots.values():
        while not isinstance(value, Tensor):
            value = value[0]
        if value.shape[0] != num_sequences:
            raise ValueError(
                f"past_key_values must hold the states of as many sequences as this call has, {num_sequences}, "
                f"got those of {value.shape[0]}"
            )
        return  # the others have as many


def update_layer_cache(module: nn.Module, cache: Any, *, offset: int, **slots: Any) -> Any:
    """Store `slots` for this layer, and count `offset` more tokens. Returns what the cache returns, or None."""
    if cache is None:
        return None
    return cache.update(layer_idx=require_cache_layer_idx(module, cache), offset=offset, **slots)


def require_cache_layer_idx(module: nn.Module, past_key_values: Any) -> int | None:
    """The layer's place in a cache. Raises ValueError if a cache is given to a layer built without `layer_idx`."""
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None and past_key_values is not None:
        raise ValueError(
            f"layer_idx must be given when {type(module).__name__} is built, to be used with past_key_values, got None"
        )
    return layer_idx


def get_unpad_data(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Positions of the tokens of a mask `[B, T]` in the flattened batch, int32 `cu_seqlens`, and the longest length.

    It waits for the GPU.
    """
    check_mask(mask, 0)
    indices, cu_seqlens = varlen.mask_indices(mask != 0)
    return indices, cu_seqlens, int(varlen.prepare_lens(cu_seqlens).max())


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` of `x` `[N, ...]`. Differentiable."""
    return x.index_select(0, indices)


def index_put_first_axis(x: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros `[first_axis_dim, ...]` whose rows `indices` are `x` `[T_total, ...]`. Differentiable."""
    return x.new_zeros(first_axis_dim, *x.shape[1:]).index_copy(0, indices, x)


def pad_input(hidden_states: Tensor, indices: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """`[T_total, ...]` -> `[batch_size, seq_len, ...]`, with zeros at padding."""
    return varlen.repad(hidden_states.unsqueeze(0), indices, batch_size, seq_len)


def unpad_input(
    q: Tensor, states: tuple[Tensor, ...], attention_mask: Tensor, q_len: int, keepdim: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor], tuple[int, int]]:
    """Drop the padding of queries `[B, q_len, ...]` and of keys and values `[B, S, ...]`, given their mask `[B, S]`.

    Returns `(q, states, indices_q, (cu_seqlens_q, cu_seqlens_k), (max_q, max_k))`. The packed tensors are
    `[T_total, ...]`, or `[1, T_total, ...]` with `keepdim`. `q_len` is `S`, or 1 for a decoding step, in which every
    row has one query.
    """
    indices_k, cu_k, max_k = get_unpad_data(attention_mask)
    if q_len == attention_mask.shape[1]:
        indices_q, cu_q, max_q = indices_k, cu_k, max_k
    elif q_len == 1:
        cu_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        indices_q, max_q = cu_q[:-1].long(), 1
    else:
        raise ValueError(f"q_len must be 1 or the length {attention_mask.shape[1]} of attention_mask, got {q_len}")
    q, *rest = (index_first_axis(x.flatten(0, 1), at) for x, at in ((q, indices_q), *((s, indices_k) for s in states)))
    if keepdim:
        q, rest = q.unsqueeze(0), [x.unsqueeze(0) for x in rest]
    return q, tuple(rest), indices_q, (cu_q, cu_k), (max_q, max_k)


def unpad_hidden_states(
    hidden_states: Tensor, cu_seqlens: Tensor | None, attention_mask: Tensor | None, q_len: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`[B, q_len, ...]` -> `([1, T_total, ...], indices, cu_seqlens)`, by the last `q_len` columns of the mask.

    With `cu_seqlens` or without a mask, `hidden_states` are returned unchanged and `indices` is None.
    """
    if cu_seqlens is not None or attention_mask is None:
        return hidden_states, None, cu_seqlens
    check_mask(attention_mask, q_len, hidden_states.shape[0])
    indices, cu_seqlens = varlen.mask_indices(attention_mask[:, attention_mask.shape[1] - q_len :] != 0)
    return varlen.unpad(hidden_states, indices), indices, cu_seqlens


def repad_hidden_states(hidden_states: Tensor, indices: Tensor | None, batch_size: int, q_len: int) -> Tensor:
    """Inverse of `unpad_hidden_states`, with zeros at padding. With `indices` None the input is unchanged."""
    return hidden_states if indices is None else varlen.repad(hidden_states, indices, batch_size, q_len)
