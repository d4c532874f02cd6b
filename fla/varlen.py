"""Packed sequences: the only place that knows how `cu_seqlens`, masks and chunk tables relate.

`cu_seqlens` `[N + 1]` (int32 or int64) starts at 0, never decreases and ends at the number of packed tokens `T`:
sequence `n` owns the tokens `cu_seqlens[n] : cu_seqlens[n + 1]`. Results have its dtype and device. Functions that
return a Python number, or a result whose size depends on values (`prepare_chunk_indices`, `prepare_token_indices`),
wait for the GPU; the kernels use none of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

_check_on_device = False


@contextmanager
def check_packing() -> Iterator[None]:
    """Within this context the values of `cu_seqlens` on a GPU are checked too, on the device (`torch._assert_async`).

    The check does not wait for the GPU. It is off by default because it costs a few launches in every call; values on
    the CPU are always checked.
    """
    global _check_on_device
    before, _check_on_device = _check_on_device, True
    try:
        yield
    finally:
        _check_on_device = before


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless `cu_seqlens` starts at 0, never decreases and ends at `num_tokens`. `name`: what its
    caller calls it."""
    _check_tensor(name, cu_seqlens)
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ValueError(f"{name} must start at 0, got {bounds[0]}")
        if bounds[-1] != num_tokens:
            raise ValueError(f"{name} must end at the number of tokens {num_tokens}, got {bounds[-1]}")
        if any(b < a for a, b in pairwise(bounds)):
            raise ValueError(f"{name} must never decrease, got {bounds}")
    elif _check_on_device:
        ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
        torch._assert_async(ends & (cu_seqlens.diff() >= 0).all(), "cu_seqlens must run from 0 to T without decreasing")


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(x).__name__}; make one with torch.tensor({name}, dtype=torch.int32)"
        )


def prepare_lens(cu_seqlens: Tensor) -> Tensor:
    """Length of every sequence, `[N]`."""
    _check_tensor("cu_seqlens", cu_seqlens)
    return cu_seqlens.diff()


def prepare_lens_from_mask(mask: Tensor) -> Tensor:
    """Tokens of every row of a padding mask `[B, T]` (1 = token), int32 `[B]`."""
    _check_tensor("mask", mask)
    return mask.sum(dim=-1, dtype=torch.int32)


def prepare_cu_seqlens_from_lens(lens: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """`cu_seqlens` `[N + 1]` of sequences of these lengths."""
    _check_tensor("lens", lens)
    return torch.nn.functional.pad(lens.cumsum(0, dtype=dtype), (1, 0))


def prepare_cu_seqlens_from_mask(mask: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """`cu_seqlens` `[B + 1]` of the unpadded rows of a mask `[B, T]`."""
    return prepare_cu_seqlens_from_lens(prepare_lens_from_mask(mask), dtype)


def prepare_sequence_ids(cu_seqlens: Tensor, num_tokens: int | None = None) -> Tensor:
    """Index of the sequence that every token belongs to, `[T]`. Sequences may be empty.

    With `num_tokens` (which is T) the function does not wait for the GPU.
    """
    _check_tensor("cu_seqlens", cu_seqlens)
    num_tokens = int(cu_seqlens[-1]) if num_tokens is None else num_tokens
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).to(cu_seqlens.dtype)


def prepare_position_ids(cu_seqlens: Tensor, num_tokens: int | None = None) -> Tensor:
    """Position of every token in its sequence, `[T]`: 0, 1, 2, ... from the start of every sequence."""
    sequence = prepare_sequence_ids(cu_seqlens, num_tokens)
    tokens = torch.arange(sequence.shape[0], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return tokens - cu_seqlens[sequence.long()]


def prepare_token_indices(cu_seqlens: Tensor) -> Tensor:
    """(sequence, position) of every token, `[T, 2]`."""
    return torch.stack((prepare_sequence_ids(cu_seqlens), prepare_position_ids(cu_seqlens)), 1)


def prepare_chunk_offsets(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Number of chunks in all sequences before each one, `[N + 1]`; the last is the number of all chunks."""
    chunks = -(-prepare_lens(cu_seqlens) // chunk_size)
    return torch.nn.functional.pad(chunks.cumsum(0), (1, 0)).to(cu_seqlens.dtype)


def prepare_chunk_indices(cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """(sequence, chunk inside the sequence) of every chunk, `[NC, 2]`; an empty sequence has none."""
    source = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    table = prepare_token_indices(prepare_chunk_offsets(source, chunk_size))
    return table.to(device=cu_seqlens.device, dtype=cu_seqlens.dtype)


def get_max_num_splits(cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None) -> int:
    """Number of chunks of the longest sequence."""
    lens = prepare_lens(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    return -(-int(lens.max()) // chunk_size)


def pack_sequence(x: Tensor, cu_seqlens: Tensor, padding_side: str = "left") -> Tensor:
    """Drop the padding of `x`: `[N, S, ...]` -> `[T, ...]`. Differentiable."""
    rows, columns = _padded_positions(cu_seqlens, x.shape[1], padding_side)
    return x[rows, columns]


def unpack_sequence(
    x: Tensor, cu_seqlens: Tensor, padding_side: str = "left", desired_shape: tuple[int, ...] | None = None
) -> Tensor:
    """Pad packed `x` with zeros: `[T, ...]` -> `[N, S, ...]`. Differentiable.

    `S` is `desired_shape[1]`, or the length of the longest sequence.
    """
    size = int(prepare_lens(cu_seqlens).max()) if desired_shape is None else desired_shape[1]
    rows, columns = _padded_positions(cu_seqlens, size, padding_side)
    return x.new_zeros(cu_seqlens.shape[0] - 1, size, *x.shape[1:]).index_put((rows, columns), x)


def _padded_positions(cu_seqlens: Tensor, size: int, padding_side: str) -> tuple[Tensor, Tensor]:
    """Row and column of every token in the padded batch `[N, size]`, each `[T]`."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    rows, columns = prepare_token_indices(cu_seqlens).long().unbind(1)
    if padding_side == "left":
        columns = columns + (size - prepare_lens(cu_seqlens).long())[rows]
    return rows, columns


def mask_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions `[T]` of the tokens of a padding mask `[B, S]`, and the int32 `cu_seqlens` of its rows."""
    _check_tensor("mask", mask)
    return mask.flatten().nonzero().flatten(), prepare_cu_seqlens_from_mask(mask)


def unpad(x: Tensor, indices: Tensor) -> Tensor:
    """Gather the tokens of `x` `[B, S, ...]` at flat `indices` into one packed row `[1, T, ...]`."""
    return x.flatten(0, 1).index_select(0, indices).unsqueeze(0)


def repad(x: Tensor, indices: Tensor, batch_size: int, size: int) -> Tensor:
    """Inverse of `unpad`: `[1, T, ...]` -> `[batch_size, size, ...]`, with zeros at padding."""
    return x.new_zeros(batch_size * size, *x.shape[2:]).index_copy(0, indices, x[0]).unflatten(0, (batch_size, size))
