"""Small functions that other programs import from here: tables of packed sequences, sums over chunks, softmax and the
like, in plain PyTorch and differentiable. Our own ops use none of them but the tables, which are `fla.varlen`'s.

The same module is `fla.ops.common.utils`, and its tables alone `fla.ops.utils.index`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._names import make_module
from fla.shapes import check_bounds
from fla.varlen import (
    check_cu_seqlens,
    get_max_num_splits,
    pack_sequence,
    prepare_chunk_indices,
    prepare_chunk_offsets,
    prepare_cu_seqlens_from_lens,
    prepare_cu_seqlens_from_mask,
    prepare_lens,
    prepare_lens_from_mask,
    prepare_position_ids,
    prepare_sequence_ids,
    prepare_token_indices,
    unpack_sequence,
)

__all__ = [
    "addmm",
    "chunk_global_cumsum",
    "chunk_global_cumsum_scalar",
    "chunk_global_cumsum_vector",
    "chunk_local_cumsum",
    "chunk_local_cumsum_scalar",
    "chunk_local_cumsum_vector",
    "get_max_num_splits",
    "logsumexp_fwd",
    "matmul",
    "pack_sequence",
    "prepare_chunk_indices",
    "prepare_chunk_offsets",
    "prepare_cu_seqlens_from_lens",
    "prepare_cu_seqlens_from_mask",
    "prepare_lens",
    "prepare_lens_from_mask",
    "prepare_position_ids",
    "prepare_sequence_ids",
    "prepare_token_indices",
    "softmax_bwd",
    "softmax_fwd",
    "solve_tril",
    "unpack_sequence",
]
_INDEX = ["get_max_num_splits", *(name for name in __all__ if name.startswith("prepare_"))]
_LEAKY_SLOPE = 0.01


def chunk_local_cumsum(
    g: Tensor,
    chunk_size: int,
    reverse: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.float,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """Running sums of `scale * g` along the tokens, anew in every chunk.

    Args:
        g: `[B, T, H]` or `[B, T, H, D]`.
        chunk_size: tokens of a chunk, a power of two.
        reverse: sums from every token to the end of its chunk, in place of those from its beginning.
        cu_seqlens: int `[N + 1]` bounds of sequences packed into one row; their chunks begin with them.
        output_dtype: of the result; None is that of `g`. The sums are float32, and float64 for float64.
        chunk_indices: no effect; the table follows from `cu_seqlens`.
    """
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size!r}")
    x, dtype = _prepared("g", g, scale, cu_seqlens, output_dtype)
    chunks, slots = _chunked(x, chunk_size, cu_seqlens)
    return _running(chunks, 2, reverse).flatten(1, 2).index_select(1, slots).to(dtype)


def chunk_global_cumsum(
    s: Tensor,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_dtype: torch.dtype | None = torch.float,
) -> Tensor:
    """Running sums of `scale * s` along the tokens of a row, or with `cu_seqlens` of each packed sequence.

    Arguments as in `chunk_local_cumsum`. With `cu_seqlens` it waits for a GPU.
    """
    x, dtype = _prepared("s", s, scale, cu_seqlens, output_dtype)
    pieces = [x] if cu_seqlens is None else x.split(prepare_lens(cu_seqlens).tolist(), 1)
    return torch.cat([_running(piece, 1, reverse) for piece in pieces], 1).to(dtype)


# under the names that say what `g` is
chunk_local_cumsum_scalar = chunk_local_cumsum_vector = chunk_local_cumsum
chunk_global_cumsum_scalar = chunk_global_cumsum_vector = chunk_global_cumsum


def _prepared(
    name: str, x: Tensor, scale: float | None, cu_seqlens: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, torch.dtype]:
    """`scale * x` in the dtype of the sums, and the dtype of the result."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{name} must have shape [B, T, H] or [B, T, H, D], got {list(x.shape)}")
    if cu_seqlens is not None:
        check_bounds("cu_seqlens", cu_seqlens, x, name, x.device)
        check_cu_seqlens(cu_seqlens, x.shape[1])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if scale is None else wide * scale, x.dtype if dtype is None else dtype


def _running(x: Tensor, axis: int, reverse: bool) -> Tensor:
    return x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis)


def _slots(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """Where each token lies when every chunk has its whole size, and the number of chunks, or more: counting those of
    a pack would wait for a GPU."""
    T = x.shape[1]
    if cu_seqlens is None:
        return torch.arange(T, device=x.device), -(-T // chunk_size)
    position = prepare_position_ids(cu_seqlens, T).long()
    before = prepare_chunk_offsets(cu_seqlens, chunk_size).long()[prepare_sequence_ids(cu_seqlens, T).long()]
    return before * chunk_size + position, T // chunk_size + cu_seqlens.shape[0] - 1


def _chunked(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens of `x` `[B, T, ...]` in chunks `[B, chunks, C, ...]`, the short ones filled up with zeros, and the
    place of each token when the chunks follow each other, `[T]`."""
    slots, count = _slots(x, chunk_size, cu_seqlens)
    rows = x.new_zeros(x.shape[0], count * chunk_size, *x.shape[2:]).index_copy(1, slots, x)
    return rows.unflatten(1, (count, chunk_size)), slots


def solve_tril(
    A: Tensor,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.float,
) -> Tensor:
    """`(I + A)^-1` of every chunk, for `A` `[B, T, H, C]` that holds a strictly lower triangle `[C, C]` a chunk, row by
    row: C is the chunk's size, and a shorter last chunk has its own first columns. Same shape.

    `cu_seqlens`, `output_dtype` and `chunk_indices` as in `chunk_local_cumsum`.
    """
    x, dtype = _prepared("A", A, None, cu_seqlens, output_dtype)
    if x.dim() != 4 or x.shape[3] < 1:
        raise ValueError(f"A must have shape [B, T, H, C], got {list(A.shape)}")
    C = x.shape[3]
    rows, slots = _chunked(x, C, cu_seqlens)
    lower = rows.transpose(2, 3).tril(-1)  # [B, chunks, H, C, C]
    unit = torch.eye(C, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.solve_triangular(lower + unit, unit.expand_as(lower), upper=False, unitriangular=True)
    return inverse.transpose(2, 3).flatten(1, 2).index_select(1, slots).to(dtype)


def logsumexp_fwd(x: Tensor, scale: float | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`log sum exp(scale * x)` over the last axis, in float32 or `dtype`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.logsumexp(x if scale is None else x * scale, -1).to(torch.float32 if dtype is None else dtype)


def softmax_fwd(x: Tensor, dtype: torch.dtype | None = torch.float) -> Tensor:
    """Softmax over the last axis, in `dtype`; None is that of `x`."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype if dtype is None else dtype)


def softmax_bwd(p: Tensor, dp: Tensor, dtype: torch.dtype | None = torch.float) -> Tensor:
    """The gradient of what a softmax over the last axis made `p` of: `p * (dp - sum(p * dp))`. `dtype` as there."""
    wide = torch.promote_types(p.dtype, torch.float32)
    p, dp, out = p.to(wide), dp.to(wide), p.dtype if dtype is None else dtype
    return (p * (dp - (p * dp).sum(-1, keepdim=True))).to(out)


def matmul(a: Tensor, b: Tensor, activation: str = "") -> Tensor:
    """`a @ b` of two matrices, and on request "leaky_relu" with the slope 0.01."""
    if activation not in ("", "leaky_relu"):
        raise ValueError(f"activation must be '' or 'leaky_relu', got {activation!r}")
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"a and b must be matrices, got {list(a.shape)} and {list(b.shape)}")
    return F.leaky_relu(a @ b, _LEAKY_SLOPE) if activation else a @ b


def addmm(
    x: Tensor, a: Tensor, b: Tensor, alpha: Tensor | float | None = None, beta: Tensor | float | None = None
) -> Tensor:
    """`beta * x + alpha * (a @ b)`; None is 1."""
    product = a @ b if alpha is None else alpha * (a @ b)
    return (x if beta is None else beta * x) + product


make_module(f"{__name__}.index", "Tables of packed sequences.", {name: globals()[name] for name in _INDEX})
make_module("fla.ops.common", "Where other programs look for `fla.ops.utils`.", {})
make_module("fla.ops.common.utils", "`fla.ops.utils`.", {name: globals()[name] for name in __all__})
