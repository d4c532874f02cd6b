"""Activations, gated linear units, and the table `ACT2FN` of activations by name.

`ACT2FN` has all names of the table in transformers that is called the same, with the same meanings (`gelu` is the exact
GELU), and also `logsigmoid`, `sqrelu` and `bias_gelu`.

`x`, `y` [..., D]. Results and gradients have the input's dtype; arithmetic is float32. The family `fused` computes the
gated linear units. Their paper: https://arxiv.org/abs/2002.05202
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """`fast_gelu_impl(x + bias)`, `bias` [D]."""
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


def clipped_gelu(x: Tensor) -> Tensor:
    """`min(gelu(x), 10)`."""
    return F.gelu(x).clamp(-10.0, 10.0)


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`."""
    return x * torch.sigmoid(1.702 * x)


def laplace(x: Tensor) -> Tensor:
    """`(1 + erf((x - mean) / (std sqrt(2)))) / 2`, a normal distribution function; mean 0.707107, std 0.282095."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def linear(x: Tensor) -> Tensor:
    """`x`."""
    return x


def sqrtsoftplus(x: Tensor) -> Tensor:
    """`sqrt(log(1 + exp(x)))`."""
    return F.softplus(x).sqrt()


class XIELU(nn.Module):
    """xIELU, an activation with two learned parameters.

        y = a x^2 + x / 2                               for x > 0
        y = b (exp(min(x, eps)) - 1 - x) + x / 2        otherwise

    `a = softplus(alpha_p)` and `b = 1/2 + softplus(alpha_n)` start at 0.8; `eps = -1e-6`. State-dict keys as in
    transformers: `alpha_p`, `alpha_n` [1], `beta`, `eps` []. Paper: https://arxiv.org/abs/2411.13010
    """

    beta: Tensor
    eps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (nn.Parameter(torch.tensor([a]).expm1().log()) for a in (0.8, 0.3))
        self.register_buffer("beta", torch.tensor(0.5))
        self.register_buffer("eps", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """The activation of `x` [..., D], in its dtype."""
        u = x.to(torch.promote_types(x.dtype, torch.float32))
        a, b = F.softplus(self.alpha_p.to(u.dtype)), self.beta + F.softplus(self.alpha_n.to(u.dtype))
        curved = torch.where(u > 0, a * u * u, b * (torch.expm1(torch.minimum(u, self.eps.to(u.dtype))) - u))
        return (curved + self.beta * u).to(x.dtype)


class _Activations(dict[str, Any]):
    """Name -> function of one tensor. Activations with parameters are stored as classes, and a look-up makes one."""

    def __getitem__(self, name: str) -> Any:
        entry = super().__getitem__(name)
        return entry() if isinstance(entry, type) else entry


ACT2FN = _Activations(
    relu=F.relu,
    sigmoid=sigmoid,
    logsigmoid=logsigmoid,
    silu=swish,
    swish=swish,
    sqrelu=sqrelu,
    relu2=sqrelu,
    relu6=F.relu6,
    leaky_relu=F.leaky_relu,
    prelu=nn.PReLU,
    gelu=F.gelu,
    gelu_python=F.gelu,
    gelu_10=clipped_gelu,
    gelu_new=fast_gelu_impl,
    gelu_fast=fast_gelu_impl,
    gelu_accurate=fast_gelu_impl,
    gelu_pytorch_tanh=fast_gelu_impl,
    gelu_python_tanh=fast_gelu_impl,
    quick_gelu=quick_gelu,
    bias_gelu=bias_gelu_impl,
    hardswish=F.hardswish,
    mish=F.mish,
    tanh=torch.tanh,
    laplace=laplace,
    linear=linear,
    sqrtsoftplus=sqrtsoftplus,
    xielu=XIELU,
)


def get_activation(name: str, argument: str = "name") -> Callable[[Tensor], Tensor]:
    """The function of one tensor that `ACT2FN` has under `name`; a new module if it has parameters.

    Raises ValueError for an unknown name. The message says which `argument` is wrong and which names exist.
    """
    known = [key for key in ACT2FN if key != "bias_gelu"]  # bias_gelu takes two tensors
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}")
    return ACT2FN[name]
