"""Rotary position embedding, and XPos.

    angle(t, i) = t * base^(-2i / dim)          i < dim / 2
    y1 = x1 cos(angle) - x2 sin(angle)
    y2 = x1 sin(angle) + x2 cos(angle)

The pairs `(x1, x2)` are `(x[i], x[i + dim/2])`, or `(x[2i], x[2i + 1])` if interleaved. XPos also multiplies q by `s^p`
and k by `s^-p`:

    s = (2i + 0.4 dim) / (1.4 dim)
    p = (t - centre) / scale_base

`q` [B, T, H, d], `k` [B, T, Hkv, d]; only the first `dim` channels are rotated. Family: `fused`.
Papers: https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/2212.10554
"""

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fla.backends import fused
from fla.varlen import prepare_position_ids, prepare_sequence_ids


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """`(-x2, x1)` for the channel pairs of `x` [..., d]: the rotation by 90 degrees."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary_embedding_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary_embedding` from position 0 on in plain PyTorch, in the dtype of its inputs; for comparison.

    `x` [..., T, H, d], with any number of axes before the tokens.
    """
    width = 2 * cos.shape[-1]
    cos, sin = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1))[: x.shape[-3], None] for t in (cos, sin)
    )
    x_rotary = x[..., :width]
    return torch.cat((x_rotary * cos + rotate_half(x_rotary, interleaved) * sin, x[..., width:]), -1)


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """Rotate `x` [B, T, H, d] by the rows of the tables `cos`, `sin` [L, R]: token `t` takes row `t + seqlen_offsets`.

    Args:
        inplace: write the result to `x` too.
        seqlen_offsets: an int, or an integer tensor with one offset per row of the batch or per packed sequence.
            Tokens at negative positions are rotated in the opposite direction.
        cu_seqlens: `[N + 1]`, bounds of packed sequences (B = 1); positions start anew in every sequence.
        max_seqlen, chunk_indices: accepted for compatibility; not used.

    Raises:
        ValueError: a shape does not fit, or a position lies outside the tables. Positions on a GPU are left to
            PyTorch's check on the device.
    """
    _check(x, "x", 2 * cos.shape[-1], seqlen_offsets, cu_seqlens)
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    readable = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and positions.numel() and int(positions.abs().max()) >= cos.shape[0]:
        raise ValueError(
            f"cos and sin must reach position {int(positions.abs().max())}, got tables of {cos.shape[0]} rows"
        )
    rows = positions.abs().flatten()
    cos, sin = (table.index_select(0, rows).view(*positions.shape, -1) for table in (cos, sin))
    sin = torch.where(positions.unsqueeze(-1) < 0, -sin, sin)
    y = fused.rotary(x, cos, sin, interleaved)
    return x.copy_(y) if inplace else y


def _check(x: Tensor, name: str, dim: int, offsets: int | Tensor, cu_seqlens: Tensor | None) -> None:
    fused.check_float(name, x)
    if x.dim() != 4 or x.shape[-1] < dim:
        raise ValueError(f"{name} must have shape [B, T, H, d] with d >= {dim}, got {list(x.shape)}")
    fused.check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens is not None and (x.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(
            f"cu_seqlens must have shape [N + 1] and {name} batch size 1, got {list(cu_seqlens.shape)}, {list(x.shape)}"
        )
    fused.check_packing_values(cu_seqlens, x.shape[1])
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(offsets, Tensor):
        if offsets.is_floating_point() or offsets.shape not in ((), (sequences,)):
            raise ValueError(
                f"the offsets must be an integer or an integer tensor of shape [{sequences}], "
                f"got {offsets.dtype} {list(offsets.shape)}"
            )
    elif not isinstance(offsets, (int, torch.SymInt)):
        raise TypeError(f"the offsets must be an integer or an integer tensor, got {type(offsets).__name__}")


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The position of every token, int64 [T] or [B, T]."""
    offsets = offsets.to(x.device).long() if isinstance(offsets, Tensor) else offsets
    if cu_seqlens is None:
        tokens = torch.arange(x.shape[1], device=x.device)
        return tokens + (offsets.unsqueeze(-1) if isinstance(offsets, Tensor) and offsets.dim() else offsets)
    if isinstance(offsets, Tensor) and offsets.dim():
        offsets = offsets[prepare_sequence_ids(cu_seqlens, x.shape[1]).long()]
    return prepare_position_ids(cu_seqlens, x.shape[1]).long() + offsets


class _Angles(NamedTuple):
    """The settings that determine the angle of every channel pair at every position."""

    dim: int
    base: float
    scale_base: float | None
    centre: int  # of XPos; 0 without it
    wide: torch.dtype  # the dtype in which angles are computed

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """cos and sin [..., R] at `positions` [...].

        With XPos they are four: cos and sin times its factor for queries, then cos and sin divided by it for keys.
        """
        angle = positions.to(self.wide).unsqueeze(-1) * self.frequencies(positions.device).to(self.wide)
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            return cos.to(dtype), sin.to(dtype)
        power = (positions - self.centre).to(self.wide).unsqueeze(-1) / self.scale_base
        factor = self.decay(positions.device).to(self.wide) ** power
        return tuple(t.to(dtype) for t in (cos * factor, sin * factor, cos / factor, sin / factor))

    def frequencies(self, device: torch.device | str | None) -> Tensor:
        return self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float64) / self.dim)

    def decay(self, device: torch.device | str | None) -> Tensor:
        channel = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        return (channel + 0.4 * self.dim) / (1.4 * self.dim)


class _Table:
    """cos and sin of the positions from 0 on. Modules with the same angles, dtype and device share one table."""

    def __init__(self, angles: _Angles, dtype: torch.dtype, device: torch.device) -> None:
        self.key, self.rows = (angles, dtype, device), ()

    rows: tuple[Tensor, ...]

    def rows_for(self, length: int) -> tuple[Tensor, ...]:
        """The table, grown to at least `length` rows if need be. A grown table is made of new tensors."""
        angles, dtype, device = self.key
        rows, present = self.rows, len(self.rows[0]) if self.rows else 0
        if present >= length:
            return rows
        # rows in reserve: a decoding loop needs one row more for every token
        wanted = _GROWTH * -(-max(length, present + present // 8) // _GROWTH)
        with torch.inference_mode(False), torch.no_grad():  # training cannot use a table made in inference mode
            more = angles.table(torch.arange(present, wanted, device=device), dtype)
            rows = tuple(torch.cat(pair) for pair in zip(rows, more, strict=True)) if rows else more
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams may read the table at once
        self.rows = rows
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Table":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_table, self.key  # a pickle holds no rows, only what they are computed from


_GROWTH = 1024  # a table has a multiple of it in rows; it grows by at least an eighth
_tables: WeakValueDictionary[tuple, _Table] = WeakValueDictionary()  # a table lives as long as modules use it


def _shared_table(*key: Any) -> _Table:
    return _tables.setdefault(key, _Table(*key))


class RotaryEmbedding(nn.Module):
    """Rotary embedding of queries and keys; XPos with `scale_base`. It has no parameters and no state-dict keys.

    Angles are computed in float64, or with `pos_idx_in_fp32=False` in the dtype of the module's buffers. Their cosines
    and sines are kept in float32 (float64 for float64 inputs) in a table, which grows if a longer sequence comes. All
    modules with the same angles, dtype and device share a table, so that a model has one. The centre of XPos is half
    the length of the first call and never changes, so that keys in a cache and later queries agree.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        fused.check_count("dim", dim)
        if dim % 2:
            raise ValueError(f"dim must be an even number of channels, got {dim}")
        for name, value in (("base", base), ("scale_base", scale_base)):
            fused.check_number(name, value, above=0, optional=name == "scale_base")
        self.dim, self.base, self.scale_base = dim, float(base), scale_base
        self.interleaved, self.pos_idx_in_fp32 = interleaved, pos_idx_in_fp32
        # callers may read these buffers; nothing is computed from them, since deferred initialisation leaves them empty
        angles = _Angles(dim, self.base, scale_base, 0, torch.float64)
        self.register_buffer("inv_freq", angles.frequencies(device).float(), persistent=False)
        scale = None if scale_base is None else angles.decay(device).float()
        self.register_buffer("scale", scale, persistent=False)
        self._centre: int | None = None
        self._table: _Table | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        chunk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate `q` [B, T, H, d] and `k` [B, T, Hkv, d].

        Args:
            seqlen_offset: position of the first token: an int, or an integer tensor with one offset per row of the
                batch or per packed sequence. It may be negative.
            cu_seqlens: `[N + 1]`, bounds of packed sequences (B = 1); positions start anew in every sequence.
            max_seqlen: a length for which to prepare the table; optional, since the table grows by itself.
            chunk_indices: accepted for compatibility; not used.

        Raises:
            ValueError, TypeError: a shape or `seqlen_offset` does not fit; the message names the argument.
        """
        _check(q, "q", self.dim, seqlen_offset, cu_seqlens)
        fused.check_float("k", k)
        if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[-1] < self.dim:
            raise ValueError(
                f"k must have shape [{q.shape[0]}, {q.shape[1]}, H, d] with d >= {self.dim}, got {list(k.shape)}"
            )
        rows = self._rows(q, seqlen_offset, cu_seqlens, max_seqlen)
        q = fused.rotary(q, rows[0], rows[1], self.interleaved)
        return q, fused.rotary(k, rows[-2], rows[-1], self.interleaved)

    def _rows(
        self, q: Tensor, offset: int | Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> tuple[Tensor, ...]:
        """cos and sin of every token; with XPos followed by those for keys."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        first = 0 if isinstance(offset, Tensor) else offset
        length = max(max_seqlen or 0, q.shape[1] + first, 1)
        if self._centre is None:
            self._centre = length // 2
        # how far positions in a tensor reach is not known without reading it
        if isinstance(offset, Tensor) or first < 0 or _cannot_use_table(q):
            return self._angles().table(_positions(q, offset, cu_seqlens), dtype)
        key = (self._angles(), dtype, q.device)
        if self._table is None or self._table.key != key:
            self._table = _shared_table(*key)
        tables = self._table.rows_for(length)
        if cu_seqlens is None:
            return tuple(table[first : first + q.shape[1]] for table in tables)
        positions = _positions(q, offset, cu_seqlens)
        return tuple(table.index_select(0, positions) for table in tables)

    def _angles(self) -> _Angles:
        centre = 0 if self.scale_base is None else self._centre or 0
        wide = torch.float64 if self.pos_idx_in_fp32 else self.inv_freq.dtype
        return _Angles(self.dim, self.base, self.scale_base, centre, wide)


def _cannot_use_table(q: Tensor) -> bool:
    """Whether the angles must be computed in this call instead of read from a table.

    That holds in a compiled graph, where the compiler fuses the computation; for tensor subclasses, which may hold no
    values (fake tensors); and in a CUDA graph, which would replay reads of a table that has been replaced since.
    """
    if torch.compiler.is_compiling() or (type(q) is not Tensor and not isinstance(q, nn.Parameter)):
        return True
    return q.is_cuda and torch.cuda.is_current_stream_capturing()
