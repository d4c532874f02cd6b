"""Cutting tokens into chunks: `[B, T, H, D] <-> [NC, H, C, D]`, with zeros after the end of a sequence.

Step `n` of `Layout.steps` holds the `n`-th chunk of every sequence that has one, so that a loop over the steps advances
all sequences together, packed or not.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout:
    """How tensors of one shape `[B, T, ...]`, packed by `cu_seqlens` or not, are cut into chunks.

    `size` (C) is the number of tokens in a chunk, `counts` are the numbers of chunks of the sequences, and `num_chunks`
    (NC) is their sum.
    """

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device, chunk_size: int):
        self.batch, self.tokens = shape[:2]
        self.device = device
        self.packed = cu_seqlens is not None
        bounds = [0, self.tokens] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = [b - a for a, b in pairwise(bounds)]
        self.size = min(chunk_size, 1 << max(max(lengths) - 1, 0).bit_length())
        if self.packed:
            self.counts = [-(-length // self.size) for length in lengths]
            self.index = self._token_table(bounds)
        else:
            self.counts = [-(-self.tokens // self.size)] * self.batch
        self.num_chunks = sum(self.counts)

    def _token_table(self, bounds: list[int]) -> Tensor:
        """Index of the token at every place of every chunk, `[NC, C]`.

        After the end of a sequence it is T, where `split` puts a row of zeros.
        """
        table = torch.full((sum(self.counts), self.size), self.tokens)
        row = 0
        for start, stop, count in zip(bounds, bounds[1:], self.counts, strict=False):
            table[row : row + count].view(-1)[: stop - start] = torch.arange(start, stop)
            row += count
        return table.to(self.device)

    def split(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` -> `[NC, H, C, D]`."""
        return self._cut(x).contiguous()

    def split_into(self, out: Tensor, x: Tensor) -> None:
        """Write `split(x)` to `out`, in its dtype: one pass over memory where no token has to be filled in."""
        out.copy_(self._cut(x))

    def _cut(self, x: Tensor) -> Tensor:
        if self.packed:
            return F.pad(x[0], (0, 0, 0, 0, 0, 1))[self.index].transpose(1, 2)
        if self.tokens % self.size:
            x = F.pad(x, (0, 0, 0, 0, 0, -self.tokens % self.size))
        return x.unflatten(1, (-1, self.size)).flatten(0, 1).transpose(1, 2)

    def join(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`[NC, H, C, D]` -> `[B, T, H, D]`, by default in the dtype of `x`."""
        x = x.transpose(1, 2).to(x.dtype if dtype is None else dtype, memory_format=torch.contiguous_format)
        if not self.packed:
            return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.tokens].contiguous()
        joined = x.new_zeros(self.tokens + 1, *x.shape[2:])
        joined[self.index] = x
        return joined[None, : self.tokens]

    def steps(self) -> list[tuple[Tensor, Tensor]]:
        """For every step, the indices of its chunks and the indices of the sequences that they belong to."""
        return list(self._steps())

    def views(self) -> list[tuple[slice, slice]] | list[tuple[Tensor, Tensor]]:
        """`steps`, as slices where there is no pack: what they pick is a view."""
        if self.packed:
            return self.steps()
        count = self.counts[0]
        return [(slice(step, None, count), slice(None)) for step in range(count)]

    def _steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        first = torch.tensor([0, *self.counts[:-1]]).cumsum(0)
        counts = torch.tensor(self.counts)
        for step in range(max(self.counts)):
            rows = (counts > step).nonzero().flatten()
            yield (first[rows] + step).to(self.device), rows.to(self.device)
