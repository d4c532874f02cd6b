"""Feature maps `phi` of linear attention, on the last axis of `x` [..., d]: `softmax(q k^T)` becomes `phi(q) phi(k)^T`.

Papers:
    Hedgehog https://arxiv.org/abs/2402.04347
    T2R https://arxiv.org/abs/2103.13076
    DPFP https://arxiv.org/abs/2102.11174
    polynomial sketches https://arxiv.org/abs/2310.01655
    Taylor https://arxiv.org/abs/2402.18668
    ReBased https://arxiv.org/abs/2402.10644
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flatten_diag_outer_product(x: Tensor, y: Tensor) -> Tensor:
    """`x_i y_j` for `i <= j`, row by row: [..., d], [..., d] -> [..., d (d + 1) / 2]."""
    rows, columns = torch.triu_indices(x.shape[-1], y.shape[-1], device=x.device)
    return x.index_select(-1, rows) * y.index_select(-1, columns)


def flatten_diag_outer_product_off1(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`x_i y_j` for `i < j`, row by row [..., d (d - 1) / 2], and the diagonal `x_i y_i` [..., d]."""
    rows, columns = torch.triu_indices(x.shape[-1], y.shape[-1], offset=1, device=x.device)
    return x.index_select(-1, rows) * y.index_select(-1, columns), x * y


class HedgehogFeatureMap(nn.Module):
    """`softmax([2u, -2u])` with `u = layer(x)`, which starts as the identity: 2d features."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to the identity and the bias to zero."""
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., 2d]`."""
        u = 2 * self.layer(x)
        return torch.cat((u, -u), -1).softmax(-1)


class T2RFeatureMap(nn.Module):
    """`relu(layer(x))`: `dot_dim` features, by default d."""

    def __init__(self, head_dim: int, dot_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim if dot_dim is None else dot_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., dot_dim]`."""
        return self.layer(x).relu()


class DPFPFeatureMap(nn.Module):
    """Parameter-free projection: `u * roll(u, j)` for j = 1..nu, with `u = [relu(x), relu(-x)]`: 2 d nu features."""

    def __init__(self, head_dim: int, nu: int = 4) -> None:
        super().__init__()
        if nu < 1:
            raise ValueError(f"nu must be at least 1, got {nu}")
        self.head_dim, self.nu = head_dim, nu

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., 2 d nu]`."""
        u = torch.cat((x.relu(), (-x).relu()), -1)
        return torch.cat([u * u.roll(j, -1) for j in range(1, self.nu + 1)], -1)


class HadamardFeatureMap(nn.Module):
    """`layer1(x) * layer2(x)`: d features."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(head_dim, head_dim)
        self.layer2 = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., d]`."""
        return self.layer1(x) * self.layer2(x)


class LearnableOuterProductFeatureMap(nn.Module):
    """The upper triangle of `layer1(x) layer2(x)^T` with its diagonal: f (f + 1) / 2 features, f = `feature_dim`."""

    def __init__(self, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(head_dim, feature_dim, bias=False)
        self.layer2 = nn.Linear(head_dim, feature_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., f (f + 1) / 2]`."""
        return flatten_diag_outer_product(self.layer1(x), self.layer2(x))


class LearnablePolySketchNonNegativeFeatureMap(nn.Module):
    """A learned sketch of a polynomial kernel, squared so that inner products are >= 0: s (s + 1) / 2 features.

        x <- layer_norm(x) * gamma + beta
        x <- s1(x) * s2(x) * d^-1/2        max(1, log2(degree) - 1) times
        output: the upper triangle of x x^T

    `s` is `sketch_size`, by default `head_dim`. Raises ValueError unless `degree` is a power of two, at least 2.
    """

    def __init__(self, head_dim: int, sketch_size: int | None = None, degree: int = 2) -> None:
        super().__init__()
        if degree < 2 or degree & (degree - 1):
            raise ValueError(f"degree must be a power of two, at least 2, got {degree}")
        size = head_dim if sketch_size is None else sketch_size
        self.head_dim, self.sketch_size, self.degree = head_dim, size, degree
        self.gamma, self.beta = nn.Parameter(torch.ones(head_dim)), nn.Parameter(torch.zeros(head_dim))
        widths = [head_dim, *[size] * (max(1, int(math.log2(degree)) - 1) - 1)]
        self.sketches1 = nn.ModuleList(nn.Linear(width, size, bias=False) for width in widths)
        self.sketches2 = nn.ModuleList(nn.Linear(width, size, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., s (s + 1) / 2]`."""
        # products of products are rounded once, at the end
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        x = F.layer_norm(x, (self.head_dim,), self.gamma.to(x.dtype), self.beta.to(x.dtype))
        for first, second in zip(self.sketches1, self.sketches2, strict=True):
            u, v = (x @ layer.weight.to(x.dtype).mT for layer in (first, second))  # type: ignore[union-attr, operator]
            x = u * v * self.head_dim**-0.5
        return flatten_diag_outer_product(x, x).to(dtype)


class TaylorFeatureMap(nn.Module):
    """The second-order Taylor expansion of the exponential.

        phi(q) . phi(k) = 1 + s + s^2 / 2        s = q . k / sqrt(d)
        phi(x) = [1, x / d^(1/4), x_i^2 / sqrt(2 d), x_i x_j / sqrt(d) for i < j]

    These are 1 + d + d (d + 1) / 2 features.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., 1 + d + d (d + 1) / 2]`."""
        root = math.sqrt(self.head_dim)
        off_diagonal, squares = flatten_diag_outer_product_off1(x, x)
        one = torch.ones_like(x[..., :1])
        return torch.cat((one, x / math.sqrt(root), squares / (root * math.sqrt(2)), off_diagonal / root), -1)


class RebasedFeatureMap(nn.Module):
    """The square of the inner product, after a layer norm with learned `gamma` and `beta` [d].

        phi(q) . phi(k) = (q . k)^2 / d
        phi(x) = [x_i^2 / sqrt(d), x_i x_j sqrt(2 / d) for i < j]

    These are d (d + 1) / 2 features. `normalize=False` leaves out the layer norm, but not `gamma` and `beta`.
    """

    def __init__(self, head_dim: int, use_gamma: bool = True, use_beta: bool = True, normalize: bool = True) -> None:
        super().__init__()
        self.head_dim, self.normalize = head_dim, normalize
        self.gamma = nn.Parameter(torch.ones(head_dim)) if use_gamma else None
        self.beta = nn.Parameter(torch.zeros(head_dim)) if use_beta else None

    def forward(self, x: Tensor, flatten: bool = True) -> Tensor:
        """`[..., d] -> [..., d (d + 1) / 2]`. `flatten=False` returns the normalised, scaled and shifted `[..., d]`."""
        if self.normalize:
            x = F.layer_norm(x, (self.head_dim,), self.gamma, self.beta)
        else:
            x = x if self.gamma is None else x * self.gamma
            x = x if self.beta is None else x + self.beta
        if not flatten:
            return x
        off_diagonal, squares = flatten_diag_outer_product_off1(x, x)
        return torch.cat((squares * self.head_dim**-0.5, off_diagonal * (2 / self.head_dim) ** 0.5), -1)


class ElementwiseFeatureMap(nn.Module):
    """Base of feature maps that apply a function to every channel: d features."""

    function: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., d]`."""
        return type(self).function(x)


class ReLUFeatureMap(ElementwiseFeatureMap):
    """`relu(x)`."""

    function = staticmethod(F.relu)


class SquaredReLUFeatureMap(ElementwiseFeatureMap):
    """`relu(x)^2`."""

    @staticmethod
    def function(x: Tensor) -> Tensor:
        """`relu(x)^2`."""
        return F.relu(x).square()


class GELUFeatureMap(ElementwiseFeatureMap):
    """`gelu(x)`."""

    function = staticmethod(F.gelu)


class SwishFeatureMap(ElementwiseFeatureMap):
    """`x sigmoid(x)`."""

    function = staticmethod(F.silu)


class SigmoidFeatureMap(ElementwiseFeatureMap):
    """`sigmoid(x)`."""

    function = staticmethod(torch.sigmoid)
