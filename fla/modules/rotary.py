"""Rotary position embedding, and XPos.

    angle(t, i) = t * base^(-2i / dim)                i < dim / 2
    y1 = x1 cos - x2 sin,   y2 = x1 sin + x2 cos      pairs (x[i], x[i + dim/2]), interleaved (x[2i], x[2i + 1])
    XPos: q also times s^p, k times s^-p, with s = (2i + 0.4 dim) / (1.4 dim), p = (t - centre) / scale_base

`q` [B, T, H, d], `k` [B, T, Hkv, d]; only the first `dim` channels turn. Family `fused`.
Papers: https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/2212.10554
"""

import torch
from torch import Tensor, nn

from fla.backends import fused
from fla.varlen import prepare_position_ids, prepare_sequence_ids


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """`(-x2, x1)` of the channel pairs of `x` [..., d]: the quarter turn."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary_embedding_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary_embedding` from position 0 in plain PyTorch, in the dtype of its inputs; for comparison."""
    width = 2 * cos.shape[-1]
    cos, sin = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1))[: x.shape[1], None] for t in (cos, sin)
    )
    turning = x[..., :width]
    return torch.cat((turning * cos + rotate_half(turning, interleaved) * sin, x[..., width:]), -1)


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
    """Turn `x` [B, T, H, d] by the rows of the tables `cos`, `sin` [L, R]: token `t` takes row `t + seqlen_offsets`.

    `seqlen_offsets`: a number or an integer tensor, one per row of the batch or per packed sequence; a negative
    position turns the other way. `cu_seqlens` (batch 1): positions restart at every sequence. `inplace`: the result is
    also written to `x`. `max_seqlen` and `chunk_indices` are hints that are not needed. Raises ValueError where a
    position lies outside the tables (for positions in GPU tensors PyTorch's own device-side check does).
    """
    _check(x, "x", 2 * cos.shape[-1], seqlen_offsets, cu_seqlens)
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    known = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and positions.numel() and int(positions.abs().max()) >= cos.shape[0]:
        raise ValueError(
            f"cos and sin must reach position {int(positions.abs().max())}, got tables of {cos.shape[0]} rows"
        )
    rows = positions.abs().flatten()
    cos, sin = (table.index_select(0, rows).view(*positions.shape, -1) for table in (cos, sin))
    sin = torch.where(positions.unsqueeze(-1) < 0, -sin, sin)
    y = fused.rotary(x, cos, sin, interleaved)
    return x.copy_(y) if inplace else y


def _check(x: Tensor, name: str, dim: int, offsets: int | Tensor, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 4 or x.shape[-1] < dim:
        raise ValueError(f"{name} must have shape [B, T, H, d] with d >= {dim}, got {list(x.shape)}")
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
    """Position of every token, [T] or [B, T], int64."""
    offsets = offsets.to(x.device).long() if isinstance(offsets, Tensor) else offsets
    if cu_seqlens is None:
        tokens = torch.arange(x.shape[1], device=x.device)
        return tokens + (offsets.unsqueeze(-1) if isinstance(offsets, Tensor) and offsets.dim() else offsets)
    if isinstance(offsets, Tensor) and offsets.dim():
        offsets = offsets[prepare_sequence_ids(cu_seqlens, x.shape[1]).long()]
    return prepare_position_ids(cu_seqlens, x.shape[1]).long() + offsets


class RotaryEmbedding(nn.Module):
    """Rotary embedding of queries and keys; XPos with `scale_base`. No parameters, no state-dict keys.

    The angles are formed in float64 and their cosines kept in float32 (float64 for float64 inputs), in a table that
    grows when a longer sequence comes. `pos_idx_in_fp32=False` forms the angles in the dtype of the module's buffers
    instead. The centre of XPos is half the length of the first call and stays, so that keys in a cache and later
    queries agree.
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
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be an even number of channels, got {dim}")
        self.dim, self.base, self.scale_base = dim, float(base), scale_base
        self.interleaved, self.pos_idx_in_fp32 = interleaved, pos_idx_in_fp32
        # for others to look at: nothing is computed from their values, which deferred initialisation leaves undefined
        self.register_buffer("inv_freq", self._frequencies(device).float(), persistent=False)
        scale = None if scale_base is None else self._decay(device).float()
        self.register_buffer("scale", scale, persistent=False)
        self._centre: int | None = None
        self._table: tuple[Tensor, ...] = ()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        chunk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`q` [B, T, H, d] and `k` [B, T, Hkv, d], turned.

        `seqlen_offset`: position of the first token, a number or one per batch row or packed sequence (int tensor); may
        be negative. `cu_seqlens` (batch 1): positions restart at every sequence. `max_seqlen`: a length for which the
        table is made at once; never needed. `chunk_indices` is not needed. Raises ValueError for sizes that do not fit.
        """
        _check(q, "q", self.dim, seqlen_offset, cu_seqlens)
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
        """cos, sin of every token, and with XPos those of the keys behind them."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        first = 0 if isinstance(offset, Tensor) else offset
        length = max(max_seqlen or 0, q.shape[1] + first, 1)
        if self._centre is None:
            self._centre = length // 2
        # a compiled graph computes its angles (the compiler fuses them); positions in a tensor have no bound known here
        if torch.compiler.is_compiling() or isinstance(offset, Tensor) or first < 0:
            return self._angles(_positions(q, offset, cu_seqlens), dtype)
        self._grow(length, dtype, q.device)
        if cu_seqlens is None:
            return tuple(table[first : first + q.shape[1]] for table in self._table)
        positions = _positions(q, offset, cu_seqlens)
        return tuple(table.index_select(0, positions) for table in self._table)

    def _grow(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        old = self._table[0] if self._table else None
        if old is not None and old.device == device and old.dtype == dtype and len(old) >= length:
            return
        # doubling: a decoding loop asks for one more row every token. Made outside inference mode, for later training
        length = length if old is None else max(length, 2 * len(old))
        with torch.inference_mode(False), torch.no_grad():
            self._table = self._angles(torch.arange(length, device=device), dtype)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.float64 if self.pos_idx_in_fp32 else self.inv_freq.dtype
        angle = positions.to(wide).unsqueeze(-1) * self._frequencies(positions.device).to(wide)
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            return cos.to(dtype), sin.to(dtype)
        power = (positions - (self._centre or 0)).to(wide).unsqueeze(-1) / self.scale_base
        factor = self._decay(positions.device).to(wide) ** power
        return tuple(t.to(dtype) for t in (cos * factor, sin * factor, cos / factor, sin / factor))

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        return self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float64) / self.dim)

    def _decay(self, device: torch.device | str | None) -> Tensor:
        channel = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        return (channel + 0.4 * self.dim) / (1.4 * self.dim)
