"""L2 normalisation: `y = x / sqrt(sum(x^2) + eps)` over the last axis, in float32. Family: `fused`."""

import torch
from torch import Tensor, nn

from fla.backends import fused


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis of `x` [..., D], in `output_dtype` (default: the dtype of `x`)."""
    return fused.l2norm(x, eps, output_dtype)


l2_norm = l2norm


def l2norm_fwd(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`l2norm(x)` and `r = 1 / sqrt(sum(x^2) + eps)` [...], both without a gradient; `l2norm_bwd` takes both."""
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return l2norm(x, eps, output_dtype), torch.rsqrt(wide.square().sum(-1) + eps)


def l2norm_bwd(y: Tensor, rstd: Tensor, dy: Tensor, eps: float = 1e-6) -> Tensor:
    """The gradient of `x`, `r (dy - y (y . dy))`, from the results `y` and `rstd` (r) of `l2norm_fwd`.

    `eps` has no effect: it is contained in `rstd`.
    """
    with torch.no_grad():
        u, du = (z.to(rstd.dtype) for z in (y, dy))
        return (rstd.unsqueeze(-1) * (du - u * (u * du).sum(-1, keepdim=True))).to(y.dtype)


class L2Norm(nn.Module):
    """`l2norm` as a module without parameters."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """`x / sqrt(sum(x^2) + eps)`."""
        return l2norm(x, self.eps, self.output_dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
