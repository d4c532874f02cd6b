"""What a model makes of its inputs before the first block: checks, and which tokens form a sequence.

Sequences come from `cu_seqlens`, from the mask, or from `position_ids` and `seq_idx` that start anew inside a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers._settings import did_you_mean
from fla.layers.utils import Padding, check_mask
from fla.shapes import check_bounds, merge_cu_seqlens
from fla.varlen import check_cu_seqlens

# Keywords that callers send along whatever the model; what they say is also in the mask and in cu_seqlens.
_REDUNDANT = {"cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "cache_position"}

# What a misspelt keyword may have meant.
_KEYWORDS = (
    *("input_ids", "attention_mask", "inputs_embeds", "past_key_values", "cache", "labels", "use_cache"),
    *("output_hidden_states", "logits_to_keep", "num_items_in_batch"),
    *("cu_seqlens", "cu_seq_lens_q", "position_ids", "seq_idx"),
)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def refuse_unknown(keywords: dict[str, Any]) -> None:
    """TypeError for keywords that mean nothing to a model."""
    unknown = sorted(set(keywords) - _REDUNDANT)
    if unknown:
        named = ", ".join(name + did_you_mean(name, _KEYWORDS) for name in unknown)
        raise TypeError(f"unexpected keyword arguments of forward(): {named}")


def merge_cache(past_key_values: Any, cache: Any) -> Any:
    """One cache from its two names: transformers calls it `cache` from 5.24 on."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, got two different caches")
    return cache if past_key_values is None else past_key_values


def check_tokens(name: str, tokens: Any, num_embeddings: int | None, ignored: int | None = None) -> None:
    """Raise unless `tokens`, an argument called `name`, is an integer tensor `[B, T]`.

    On the CPU its values are checked too; reading them from a GPU would wait for it.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be an integer tensor [B, T], got {type(tokens).__name__}")
    if tokens.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an integer tensor [B, T], got one of {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must have shape [B, T], got {list(tokens.shape)}")
    if num_embeddings is None or tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (tokens < 0) | (tokens >= num_embeddings)
    if ignored is not None:
        wrong &= tokens != ignored
    if wrong.any():
        but = "" if ignored is None else f" or be {ignored}"
        raise ValueError(f"{name} must lie in [0, {num_embeddings}){but}, got {int(tokens[wrong][0])}")


def embed(
    embeddings: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int
) -> tuple[str, Tensor]:
    """The embedded input `[B, T, hidden_size]`, checked, and the name of the argument that it is from."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {got}")
    if input_ids is not None:
        check_tokens("input_ids", input_ids, getattr(embeddings, "num_embeddings", None))
        return "input_ids", embeddings(input_ids)
    if not isinstance(inputs_embeds, Tensor):
        raise TypeError(f"inputs_embeds must be a tensor [B, T, D], got {type(inputs_embeds).__name__}")
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden_size:
        raise ValueError(
            f"inputs_embeds must have shape [B, T, D] with D = hidden_size = {hidden_size}, got "
            f"{list(inputs_embeds.shape)}"
        )
    return "inputs_embeds", inputs_embeds


def merge_packing(cu_seqlens: Any, cu_seq_lens_q: Any, name: str, x: Tensor) -> Tensor | None:
    """`cu_seqlens` by either of its names, checked against the tokens `x` `[B, T, D]` of the argument `name`."""
    for key, bounds in (("cu_seqlens", cu_seqlens), ("cu_seq_lens_q", cu_seq_lens_q)):
        if bounds is not None:
            check_bounds(key, bounds, x, name, x.device)
            if bounds.device != x.device:
                raise ValueError(f"{key} must be on {x.device} like {name}, got {bounds.device}")
    cu_seqlens = merge_cu_seqlens(cu_seqlens, cu_seq_lens_q)
    if cu_seqlens is not None and not torch.compiler.is_compiling():  # a graph cannot branch on values
        check_cu_seqlens(cu_seqlens, x.shape[1])
    return cu_seqlens


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one call are, computed once for all blocks, which see `join(x)`."""

    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    padding: Padding | None = None
    rows: Padding | None = None  # set where rows hold several sequences each: they become one row with `cu_seqlens`

    def join(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` as the blocks see it."""
        return x if self.rows is None else self.rows.unpad(x)

    def split(self, x: Tensor) -> Tensor:
        """Back to `[B, T, ...]`, zeros at padding where there was something to join."""
        return x if self.rows is None else self.rows.repad(x)


def lay_out(
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    seen: int,
) -> Layout:
    """The layout of tokens `x` `[B, T, D]` of which the cache has `seen` columns before them.

    `cu_seqlens` says all there is to say. Otherwise positions that do not grow from one token of a row to the next, or
    a `seq_idx` that changes, begin a sequence; to know that, a GPU is waited for.

    In transformers flash attention and the other kinds have a rule each. Where the two find the same sequences in
    `position_ids`, so does this one: zeros everywhere are sequences of one token each. A gap begins no sequence, as for
    flash attention. Rows of a batch are looked at one by one, and a restart at another number than the first begins a
    sequence, as for the other kinds.
    """
    if cu_seqlens is not None:
        return Layout(cu_seqlens=cu_seqlens)
    padding = None
    if attention_mask is not None:
        rows, new = x.shape[:2]
        check_mask(attention_mask, new, rows)
        if attention_mask.shape[1] != seen + new:
            raise ValueError(
                f"attention_mask must cover the {seen} cached and the {new} new tokens, got "
                f"{attention_mask.shape[1]} columns"
            )
        padding = Padding.from_mask(attention_mask, new)
        attention_mask = None if padding is None and not seen else attention_mask
    named = {"position_ids": position_ids, "seq_idx": seq_idx}
    given = {name: _check_per_token(name, value, x) for name, value in named.items() if value is not None}
    packed = _sequences(given, padding, *x.shape[:2]) if given else None
    if packed is None:
        return Layout(attention_mask, padding=padding)
    if seen:
        raise ValueError(
            f"{' and '.join(given)} must not start anew inside a row of a call that continues from a cache: packed "
            "sequences begin with the call"
        )
    return Layout(cu_seqlens=packed.cu_seqlens, rows=None if len(x) == 1 and padding is None else packed)


def _check_per_token(name: str, value: Any, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor [B, T], got {type(value).__name__}")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an integer tensor [B, T], got one of {value.dtype}")
    rows, new = x.shape[:2]
    if value.dim() not in (1, 2) or value.shape[-1] != new or (value.dim() == 2 and value.shape[0] not in (1, rows)):
        raise ValueError(f"{name} must have shape {[rows, new]} like the input, got {list(value.shape)}")
    return value.to(x.device).expand(rows, new)


def _sequences(given: dict[str, Tensor], padding: Padding | None, rows: int, new: int) -> Padding | None:
    """The tokens of all rows as one packed row, if a row holds more than one sequence.

    Padding stands between no tokens: only the positions of tokens are compared.
    """
    if new < 2:
        return None
    begins = None
    for name, value in given.items():
        flat = value.flatten() if padding is None else value.flatten()[padding.indices]
        here, before = flat[1:], flat[:-1]
        anew = here <= before if name == "position_ids" else here != before
        begins = anew if begins is None else begins | anew
    assert begins is not None
    if padding is None:
        device, total = begins.device, rows * new
        indices = torch.arange(total, device=device)
        is_first, num_rows = indices[1:] % new == 0, rows
    else:
        indices, total, device = padding.indices, padding.indices.shape[0], begins.device
        row = indices // new
        is_first = row[1:] != row[:-1]
        num_rows = 1 + int(is_first.sum())
    bounds = F.pad(begins | is_first, (1, 0), value=True).nonzero().flatten()
    if total == 0 or bounds.shape[0] == num_rows:
        return None
    cu_seqlens = torch.cat((bounds, bounds.new_tensor([total]))).to(torch.int32)
    return Padding(indices, cu_seqlens, batch_size=rows, seq_len=new)


def begins_anew(position_ids: Any, attention_mask: Any) -> bool:
    """Whether `position_ids` `[B, T]` pack several sequences into a row; the last columns of the mask are theirs."""
    if position_ids is None:
        return False
    rows = position_ids[None] if isinstance(position_ids, Tensor) and position_ids.dim() == 1 else position_ids
    given = {"position_ids": _check_per_token("position_ids", rows, rows)}
    padding = None if attention_mask is None else Padding.from_mask(attention_mask, rows.shape[1])
    return _sequences(given, padding, *rows.shape) is not None
