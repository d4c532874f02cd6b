"""The four kinds of scores of a chunk as one matrix, with their gradients.

The rows are those of Q, then those of A; the columns those of K, then those of B:

    P = [ A_qk  A_qb ]    x_i . y_j, each channel times exp(X_i - G_j), where X is G for Q and E for A
        [ A_ak  A_ab ]    for j <= i in the rows of Q, j < i in those of A, else 0

P is one matrix product of `x exp(X - M)` and `y exp(M - G)`, where M is G in the middle of the chunk. Where one of the
exponents is too large, the chunk of a head is `far`, and its scores come from `fla.backends.torch._scores`.
"""

import torch
from torch import Tensor

from fla.backends.torch._scores import SAFE_RANGE, pair_decay


class Scores:
    """`x`, `y` `[NC, H, 2 C, K]`; `log_decay` is G `[NC, H, C, K]` in float64, or None."""

    def __init__(self, x: Tensor, y: Tensor, log_decay: Tensor | None) -> None:
        size = x.shape[2] // 2
        strict = torch.ones(size, size, dtype=torch.bool, device=x.device).triu()
        self.zeros = torch.cat((strict.triu(1), strict))
        self.zeros = torch.cat((self.zeros, self.zeros), 1)
        self.x, self.y, self.any_far = x, y, False
        self.x_factor: Tensor | None = None
        self.y_factor: Tensor | None = None
        if log_decay is not None:
            self._scale(x, y, log_decay)

    def _scale(self, x: Tensor, y: Tensor, log_decay: Tensor) -> None:
        size = log_decay.shape[2]
        middle = log_decay[:, :, (size - 1) // 2, None]
        from_middle = log_decay - middle
        far = torch.maximum(from_middle.abs().amax((2, 3)), middle.abs().amax((2, 3))) > SAFE_RANGE
        self.any_far = bool(far.any())
        if self.any_far:
            self._take_far(far, x, y, log_decay)
            from_middle = from_middle.masked_fill(far[..., None, None], 0.0)
            middle = middle.masked_fill(far[..., None, None], 0.0)
        decay = from_middle.exp_()
        self.x_factor = x_factor = with_first(torch.empty_like(x), decay, middle.neg().exp_())
        self.y_factor = y_factor = decay.reciprocal_().to(y.dtype)
        self.x, self.y = x * x_factor, twice(y, y_factor)

    def _take_far(self, far: Tensor, x: Tensor, y: Tensor, log_decay: Tensor) -> None:
        self.far = far
        q, a, k, b = (part for z in (x[far], y[far]) for part in z.chunk(2, -2))
        total = log_decay[far]
        before = torch.cat((torch.zeros_like(total[:, :1]), total[:, :-1]), 1)
        to_q, to_a = pair_decay(total, x.dtype), pair_decay(total, x.dtype, before)
        self.of_far = [[to_q.between(q, k), to_q.between(q, b)]]
        self.of_far += [[to_a.between(a, k, strict=True), to_a.between(a, b, strict=True)]]

    def values(self) -> Tensor:
        """`P` `[NC, H, 2 C, 2 C]`."""
        scores = (self.x @ self.y.mT).masked_fill_(self.zeros, 0.0)
        if self.any_far:
            scores[self.far] = torch.cat([torch.cat([part.values() for part in row], -1) for row in self.of_far], -2)
        return scores

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `x` and `y` from that of `P`, which is overwritten."""
        d_scores = d_scores.masked_fill_(self.zeros, 0.0)
        dx, dy = d_scores @ self.y, d_scores.mT @ self.x
        if self.x_factor is not None and self.y_factor is not None:
            dx, dy = dx.mul_(self.x_factor), twice(dy, self.y_factor, in_place=True)
        if self.any_far:
            dx[self.far], dy[self.far] = self._far_gradients(d_scores[self.far])
        return dx, dy

    def _far_gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        (qk, qb), (ak, ab) = (
            [scores.gradients(d) for scores, d in zip(row, given.chunk(2, -1), strict=True)]
            for row, given in zip(self.of_far, d_scores.chunk(2, -2), strict=True)
        )
        return torch.cat((qk[0] + qb[0], ak[0] + ab[0]), 1), torch.cat((qk[1] + ak[1], qb[1] + ab[1]), 1)


def with_first(out: Tensor, later: Tensor, first: Tensor) -> Tensor:
    """Fill `out` `[., 2 C, K]` with the rows `later` `[., C, K]`, then with these moved on by one after `first`."""
    size = later.shape[-2]
    out[..., :size, :] = later
    out[..., size : size + 1, :] = first
    out[..., size + 1 :, :] = later[..., :-1, :]
    return out


def scaled(x: Tensor, factor: Tensor | None, in_place: bool = False) -> Tensor:
    """`x` times `factor`, if there is one. `in_place` overwrites `x`, which saves memory that must be cleared first."""
    return x if factor is None else x.mul_(factor) if in_place else x * factor


def twice(y: Tensor, factor: Tensor | None, in_place: bool = False) -> Tensor:
    """Both halves of the rows of `y` `[., 2 C, K]` times `factor` `[., C, K]`, if there is one; as `scaled`."""
    if factor is None:
        return y
    return scaled(y.unflatten(-2, (2, -1)), factor.unsqueeze(-3), in_place).flatten(-3, -2)
