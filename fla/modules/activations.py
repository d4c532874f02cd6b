"""Activations, gated linear units, and the table of activations by name.

Results and gradients have the input's dtype, arithmetic is float32. `x`, `y` [..., D]. The gated units are of the
family `fused`. Paper of the gated units: https://arxiv.org/abs/2002.05202
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.backends import fused


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`."""
    return torch.sigmoid(x)


def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """`log(sigmoid(x)) / temperature`."""
    if temperature == 1.0:
        return F.logsigmoid(x)
    return (F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) / temperature).to(x.dtype)


def swish(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    return F.silu(x)


def fast_gelu_impl(x: Tensor) -> Tensor:
    """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
    return F.gelu(x, approximate="tanh")


def bias_gelu_impl(x: Tensor, bias: Tensor) -> Tensor:
    """Tanh GELU of `x + bias`, `bias` [D]."""
    return fast_gelu_impl(x.to(torch.promote_types(x.dtype, torch.float32)) + bias).to(x.dtype)


def sqrelu(x: Tensor) -> Tensor:
    """`relu(x)^2`."""
    return F.relu(x).square()


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """`silu(x) * y`."""
    return fused.glu(x, y, "swish")


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(silu(x) * y) @ weight.T + bias`; the product is recomputed in the backward pass. `weight` [O, D]."""
    return fused.glu_linear(x, y, weight, bias, "swish")


def sigmoidglu(x: Tensor, y: Tensor) -> Tensor:
    """`sigmoid(x) * y`."""
    return fused.glu(x, y, "sigmoid")


def sigmoidglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(sigmoid(x) * y) @ weight.T + bias`; the product is recomputed in the backward pass. `weight` [O, D]."""
    return fused.glu_linear(x, y, weight, bias, "sigmoid")


ACT2FN = {
    "relu": F.relu,
    "sigmoid": sigmoid,
    "logsigmoid": logsigmoid,
    "silu": swish,
    "swish": swish,
    "sqrelu": sqrelu,
    "gelu": fast_gelu_impl,
    "bias_gelu": bias_gelu_impl,
}
