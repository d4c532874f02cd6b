"""The gate of Kimi Delta Attention: log decays of key channels out of a projection.

    g = -exp(A_log) softplus(x + dt_bias)                            softplus is linear above 20
    g = lower_bound sigmoid(exp(A_log) (x + dt_bias))                with a lower bound < 0

Shapes: x, g `[..., H, K]`; `A_log` has H elements and `dt_bias` H K, of any shape. `chunk_kda` computes the same in the
op (`use_gate_in_kernel`).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fla.ops._delta import naive_gate

FORMER = "fused_kda_gate(g [..., H * K], A, head_k_dim, g_bias=None, beta=1.0, threshold=20.0)"


def naive_kda_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`-exp(A_log) softplus(g + dt_bias)` of `g` `[..., H, K]`."""
    return naive_gate(g, *shaped(g, A_log, dt_bias)).to(output_dtype)


def naive_kda_lowerbound_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`lower_bound sigmoid(exp(A_log) (g + dt_bias))` of `g` `[..., H, K]`; without `A_log` its factor is 1."""
    return naive_gate(g, *shaped(g, A_log, dt_bias), lower_bound).to(output_dtype)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | int | None = None,
    lower_bound: float | Tensor | None = None,
    output_dtype: torch.dtype | float = torch.float32,
    threshold: float | None = None,
    *,
    A: Tensor | None = None,
    head_k_dim: int | None = None,
    g_bias: Tensor | None = None,
    beta: float | None = None,
) -> Tensor:
    """Log decays `[..., H, K]` in `output_dtype` out of `g` `[..., H, K]`, by the formulas at the top. Differentiable.

    Args:
        A_log: H elements; None means the factor 1, which needs a `lower_bound`.
        dt_bias: H K elements; None means 0.
        lower_bound: below 0; None means the gate without a bound.
        A, head_k_dim, g_bias, beta, threshold: the former signature, `fused_kda_gate(g [..., H K], A, head_k_dim,
            g_bias=None, beta=1.0, threshold=20.0)`, with one DeprecationWarning: `-exp(A) softplus(g + g_bias)`, whose
            softplus is `log(1 + e^{beta x}) / beta`, linear above `beta x > threshold`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, type or value; the message names it.
    """
    if isinstance(dt_bias, int):
        head_k_dim, dt_bias = dt_bias, None
        if isinstance(lower_bound, Tensor):
            g_bias, lower_bound = lower_bound, None
        if isinstance(output_dtype, (int, float)):
            beta, output_dtype = output_dtype, torch.float32
    if any(x is not None for x in (A, head_k_dim, g_bias, beta, threshold)):
        A = A_log if A is None else A
        others = (1.0 if beta is None else beta, 20.0 if threshold is None else threshold)
        return _former_gate(g, A, head_k_dim, g_bias if dt_bias is None else dt_bias, *others)
    if isinstance(lower_bound, Tensor) or not isinstance(output_dtype, torch.dtype):
        raise TypeError(
            f"lower_bound must be a number and output_dtype a dtype, got {type(lower_bound).__name__} and "
            f"{output_dtype}; the former signature is {FORMER}"
        )
    check_lower_bound(lower_bound)
    if A_log is None and lower_bound is None:
        raise ValueError("A_log must be a tensor without lower_bound, got None for both")
    return naive_gate(g, *shaped(g, A_log, dt_bias), lower_bound).to(output_dtype)


def shaped(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`A_log` as `[H, 1]` and `dt_bias` as `[H, K]` for `g` `[..., H, K]`. ValueError if sizes do not fit."""
    if g.dim() < 2:
        raise ValueError(f"g must have shape [..., H, K], got {list(g.shape)}")
    H, K = g.shape[-2:]
    meant = f"g must be [..., H, K], got {list(g.shape)}; for [..., H * K] there is the former {FORMER}"
    return of_elements("A_log", A_log, (H, 1), meant), of_elements("dt_bias", dt_bias, (H, K), meant)


def of_elements(name: str, x: Tensor | None, shape: tuple[int, ...], meant: str = "") -> Tensor | None:
    """`x` in this shape. ValueError unless it has so many elements; `meant` is added to what it says."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    expected = torch.Size(shape).numel()
    if x.numel() != expected:
        said = f"{name} must have {expected} elements, got {x.numel()} in the shape {list(x.shape)}"
        raise ValueError(f"{said}: {meant}" if meant else said)
    return x.reshape(shape)


def check_lower_bound(lower_bound: float | None) -> None:
    """TypeError or ValueError unless it is None or a number below 0."""
    if lower_bound is None:
        return
    if not isinstance(lower_bound, (int, float)):
        raise TypeError(f"lower_bound must be a number or None, got {type(lower_bound).__name__}")
    if not -float("inf") < lower_bound < 0:
        raise ValueError(f"lower_bound must be a finite number below 0, got {lower_bound}")


def _former_gate(
    g: Tensor, A: Tensor | None, head_k_dim: int | None, g_bias: Tensor | None, beta: float, threshold: float
) -> Tensor:
    if not is_compiling():  # a warning would break the graph
        warnings.warn(
            "fused_kda_gate(g [..., H * K], A, head_k_dim) is the former signature of "
            "fused_kda_gate(g [..., H, K], A_log, dt_bias)",
            DeprecationWarning,
            stacklevel=3,
        )
    if A is None or not isinstance(head_k_dim, int):
        raise TypeError(
            f"A must be a tensor and head_k_dim an int in {FORMER}, got {type(A).__name__} and {head_k_dim}"
        )
    H = A.numel()
    if g.dim() < 1 or g.shape[-1] != H * head_k_dim:
        raise ValueError(
            f"g must have shape [..., H * head_k_dim] with H * head_k_dim = {H} * {head_k_dim}, got {list(g.shape)}"
        )
    dtype = torch.promote_types(g.dtype, torch.float32)
    x = g.to(dtype).unflatten(-1, (H, head_k_dim))
    if g_bias is not None:
        bias = of_elements("g_bias", g_bias, (H, head_k_dim))
        assert bias is not None
        x = x + bias.to(dtype)
    return -A.to(dtype).reshape(H, 1).exp() * F.softplus(x, beta, threshold)
