"""L2 normalisation: `y = x / sqrt(sum(x^2) + eps)` over the last axis, in float32. Family: `fused`."""

import torch
from torch import Tensor, nn

from fla.backends import fused
from fla.backends.fused import l2norm_bwd as l2norm_bwd
from fla.backends.fused import l2norm_fwd as l2norm_fwd


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis of `x` [..., D], in `output_dtype` (default: the dtype of `x`)."""
    return fused.l2norm(x, eps, output_dtype)


l2_norm = l2norm


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
