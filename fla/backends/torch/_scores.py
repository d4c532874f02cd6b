"""What families of chunks with decays share: decayed scores with their gradients, and the loop over chunks.

Tensors are `[NC, H, C, D]`, or with any other axes in front of `[C, D]` (`C` tokens of a chunk). `G` is the running sum
of the log decays of a chunk in float64, `[..., C, 1]` for one decay per head and `[..., C, K]` for one per key channel.
Axes of size 1 stand for all values of that axis, as ever in PyTorch: value heads may share a query and a key.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fla.backends.torch._layout import Layout

SAFE_RANGE = 60.0  # nats: exp(60) and exp(-60), with room in float32 for the numbers that they scale


def pair_decay(log_decay: Tensor | None, dtype: torch.dtype, rows: Tensor | None = None) -> "PairDecay":
    """The decays `exp(R_i - G_j)` between the tokens of a chunk, where `R` is `rows`, by default `G`.

    `log_decay` is `G`; None means no decay. With the sums before each token, `G_i - w_i`, as `rows` only strict scores
    are meaningful. `dtype`: that of the scores.
    """
    if log_decay is None:
        return PairDecay()
    rows = log_decay if rows is None else rows
    return (_ScalarDecay if log_decay.shape[-1] == 1 else _VectorDecay)(rows, log_decay, dtype)


class PairDecay:
    """No decay; its subclasses have one."""

    def between(self, x: Tensor, y: Tensor, strict: bool = False) -> "Scores":
        """`P_ij = sum_c x_ic y_jc exp(R_ic - G_jc)` for `j <= i`, or `j < i` if `strict`; else 0."""
        return _ScalarScores(x, y, -1 if strict else 0, None)


class _ScalarDecay(PairDecay):
    """One decay per head: a factor of each score."""

    def __init__(self, rows: Tensor, log_decay: Tensor, dtype: torch.dtype):
        # lower triangle before the exponential: above the diagonal it could overflow
        below = -1 if rows is not log_decay else 0
        self.factor = (rows - log_decay.mT).tril(below).exp().to(dtype)

    def between(self, x: Tensor, y: Tensor, strict: bool = False) -> "Scores":
        return _ScalarScores(x, y, -1 if strict else 0, self.factor)


class _VectorDecay(PairDecay):
    """One decay per key channel.

    The scores are a matrix product of `x exp(R - M)` and `y exp(M - G)`, where M is -SAFE_RANGE. From the first token
    of a chunk on whose sums are further from M than that, rows are far: they are computed one by one from
    `exp(R_ik - G_jk)`, whose exponents are never positive. So no gate of a later token changes how a row is rounded.
    """

    def __init__(self, rows: Tensor, log_decay: Tensor, dtype: torch.dtype):
        lowest, highest = torch.minimum(rows, log_decay).amin(-1), torch.maximum(rows, log_decay).amax(-1)
        outside = (lowest < -2 * SAFE_RANGE) | (highest > SAFE_RANGE / 16)  # exp(85) is the largest factor
        is_far = outside.cummax(-1).values  # of every token
        self.dtype = dtype
        self.x_factor = (rows + SAFE_RANGE).masked_fill(is_far[..., None], -torch.inf).exp().to(dtype)
        self.y_factor = (-SAFE_RANGE - log_decay).masked_fill(is_far[..., None], -torch.inf).exp().to(dtype)
        self.far = is_far[..., -1]  # of every chunk: whether it has far rows
        self.any_far = bool(self.far.any())
        if self.any_far:
            self.far_rows, self.far_columns = rows[self.far], log_decay[self.far]
            self.is_far = is_far[self.far].to(dtype)
            self.first = int(outside.any(tuple(range(outside.dim() - 1))).byte().argmax())

    def between(self, x: Tensor, y: Tensor, strict: bool = False) -> "Scores":
        return _VectorScores(x, y, -1 if strict else 0, self)

    def to_row(self, i: int, end: int) -> Tensor:
        """`exp(R_i - G_j)` for `j < end` in the chunks with far rows, `[chunks, end, K]`; 0 if their row i is not."""
        decay = (self.far_rows[:, i : i + 1] - self.far_columns[:, :end]).exp().to(self.dtype)
        return decay * self.is_far[:, i, None, None]


class Scores:
    """`P` of `PairDecay.between`."""

    def values(self) -> Tensor:
        raise NotImplementedError

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `x` and `y`, in their shapes, from that of `P`; only its lower triangle counts."""
        raise NotImplementedError

    def gradients_and_decays(self, scores: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """These and, in float64, what the gradients of `R` and `G` add up to; `scores` are the values.

        What two tokens give is added to one and subtracted from the other, so it cancels where a sum has both.
        """
        raise NotImplementedError


class _ScalarScores(Scores):
    def __init__(self, x: Tensor, y: Tensor, diagonal: int, factor: Tensor | None):
        self.x, self.y, self.diagonal, self.factor = x, y, diagonal, factor

    def values(self) -> Tensor:
        return self._decayed(self.x @ self.y.mT)

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        d_scores = self._decayed(d_scores)
        if self.x.shape == self.y.shape:  # summed over value heads before the products, of which there are fewer then
            d_scores = sum_to_heads(d_scores, self.x)
        return sum_to_heads(d_scores @ self.y, self.x), sum_to_heads(d_scores.mT @ self.x, self.y)

    def gradients_and_decays(self, scores: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exchanged = scores * d_scores.tril(self.diagonal)  # between two tokens
        to_row, to_column = (exchanged.sum(axis, dtype=torch.float64) for axis in (-1, -2))
        return *self.gradients(d_scores), (to_row - to_column)[..., None]

    def _decayed(self, scores: Tensor) -> Tensor:
        return (scores if self.factor is None else scores * self.factor).tril(self.diagonal)


class _VectorScores(Scores):
    def __init__(self, x: Tensor, y: Tensor, diagonal: int, decay: _VectorDecay):
        self.given = x, y
        self.diagonal, self.decay = diagonal, decay
        self.x, self.y = x * decay.x_factor, y * decay.y_factor
        if decay.any_far:
            self.far_x, self.far_y = x.expand_as(self.x)[decay.far], y.expand_as(self.y)[decay.far]

    def values(self) -> Tensor:
        scores = (self.x @ self.y.mT).tril(self.diagonal)
        if self.decay.any_far:
            scores[self.decay.far] += (
                self._far_scores()
            )  # which are 0 for rows that are not far, as theirs are for these
        return scores

    def gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        dx, dy = self._of_every_head(d_scores)
        return sum_to_heads(dx, self.given[0]), sum_to_heads(dy, self.given[1])

    def gradients_and_decays(self, scores: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, y), (dx, dy) = self.given, self._of_every_head(d_scores)
        return sum_to_heads(dx, x), sum_to_heads(dy, y), x.double() * dx - y.double() * dy

    def _of_every_head(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        d_scores = d_scores.tril(self.diagonal)
        dx = self.decay.x_factor * (d_scores @ self.y)
        dy = self.decay.y_factor * (d_scores.mT @ self.x)
        if self.decay.any_far:
            far_dx, far_dy = self._far_gradients(d_scores[self.decay.far])
            dx[self.decay.far] += far_dx
            dy[self.decay.far] += far_dy
        return dx, dy

    def _far_scores(self) -> Tensor:
        rows, size = self.far_x.shape[:2]
        scores = self.far_x.new_zeros(rows, size, size)
        for i in range(self.decay.first, size):
            end = i + 1 + self.diagonal
            scores[:, i, :end] = (self.far_x[:, i : i + 1] * self.far_y[:, :end] * self.decay.to_row(i, end)).sum(-1)
        return scores

    def _far_gradients(self, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        dx, dy = torch.zeros_like(self.far_x), torch.zeros_like(self.far_y)
        for i in range(self.decay.first, d_scores.shape[1]):
            end = i + 1 + self.diagonal
            weight = d_scores[:, i, :end, None] * self.decay.to_row(i, end)
            dx[:, i] = (weight * self.far_y[:, :end]).sum(1)
            dy[:, :end] += weight * self.far_x[:, i : i + 1]
        return dx, dy


def sum_to_heads(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient` summed over the axes in front of the last two in which `x` has size 1 and stands for all."""
    axes = [axis for axis in range(x.dim() - 2) if x.shape[axis] == 1 and gradient.shape[axis] != 1]
    return gradient.sum(axes, keepdim=True) if axes else gradient


def scan(
    steps: list[tuple[Tensor, Tensor]], found: Tensor, state: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Run `state <- advance(chunk, state)` along the steps of a layout, from `state`, which is overwritten.

    Returns `found`, filled with the state that every chunk found, and the last state of every sequence.
    """
    for chunk, row in steps:
        current = state[row]
        found[chunk] = current
        state[row] = advance(chunk, current)
    return found, state


def states_at_ends(layout: Layout, starts: Tensor, final_state: Tensor) -> Tensor:
    """The state at the end of every chunk: that at the start of the sequence's next chunk, or the final state."""
    ends = torch.empty_like(starts)
    for chunk, _ in layout.steps()[1:]:
        ends[chunk - 1] = starts[chunk]
    counts = torch.tensor(layout.counts, device=layout.device)
    ends[(counts.cumsum(0) - 1)[counts > 0]] = final_state[counts > 0]
    return ends


def sums_to_end(x: Tensor) -> Tensor:
    """The sum of `x` `[..., C, D]` from every token to the end of its chunk."""
    return x.flip(-2).cumsum(-2).flip(-2)
